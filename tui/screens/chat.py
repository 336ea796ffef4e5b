"""The chat screen: layout, keys, mouse, and what the prompt sends."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from glmchat.chat import hangup
from glmchat.chat.commands import table as commands
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.tui.link import EngineLink
from glmchat.tui.reading import Reading
from glmchat.tui.transcript.transcript import Transcript
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.widgets.actions import TurnActions
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.sidebar import Sidebar
from glmchat.tui.widgets.status import StatusLine
from glmchat.tui.widgets.suggestions import Suggestions

LOW = 16  # rows; below, the title is given up
NARROW = 72  # columns; below, the sidebar takes the whole width


class ChatScreen(Reading):
    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(c.key, f"command('{c.name}')", c.summary, id=c.name, show=False, priority=True)
            for c in commands.COMMANDS
            if c.key
        ),
        Binding("escape", "escape", show=False),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+r", "search_prompts", show=False, priority=True),
        Binding("ctrl+up", "step(-1)", show=False, priority=True),
        Binding("ctrl+down", "step(1)", show=False, priority=True),
        Binding("shift+pageup,alt+up", "page(-1)", show=False, priority=True),
        Binding("shift+pagedown,alt+down", "page(1)", show=False, priority=True),
        Binding("pageup", "page(-1)", show=False),
        Binding("pagedown", "page(1)", show=False),
        Binding("ctrl+end", "end", show=False, priority=True),
        Binding("f3", "hit(1)", show=False, priority=True),
        Binding("shift+f3", "hit(-1)", show=False, priority=True),
    ]

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__(launch, settings, link)
        self._deletions = []
        self._editing = None

    def compose(self) -> ComposeResult:
        yield Static("", id="title")
        with Horizontal(id="body"):
            yield Sidebar(id="sidebar")
            with Vertical(id="main"):
                yield Transcript(self.palette, id="transcript")
                yield TurnActions(id="actions")
                yield Suggestions(id="suggestions")
                yield Static("", id="queue")
                with Vertical(id="prompt-box"):
                    yield Prompt(enter_sends=self.settings.enter_sends, id="prompt")
                yield StatusLine(id="status")

    def on_mount(self) -> None:
        self.prompt.placeholder = tr("Ask anything · / for commands")
        if self.launch.prompt:
            self.prompt.set_text(self.launch.prompt)
        self.prompt.focus()
        self.status.show(model=self.launch.model, quant=self.launch.quant_label, revision=self.launch.revision)
        self.apply_palette()
        self.transcript.show([self.welcome()])
        self.refresh_title()
        self.set_interval(2.0, self.watch_engine)
        # The first frame is drawn before anything is loaded.
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        self.begin()
        if not self.link.has_target:
            self.run_command("model")

    def apply_palette(self) -> None:
        for widget in (self.status, self.query_one(Suggestions), self.query_one(TurnActions), self.query_one(Sidebar)):
            widget.palette = self.palette
            widget.refresh()
        self.transcript.set_palette(self.palette)
        self.query_one(Sidebar).reload()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < NARROW, "narrow")
        low = event.size.height < LOW
        self.query_one("#title").display = not low
        box = self.query_one("#prompt-box")
        # Where rows are few the prompt gives up its frame.
        box.styles.border = ("none", "transparent") if event.size.height < 8 else None
        self._grow()

    # What the base classes leave to the layout

    def welcome(self) -> Turn:
        keys = [
            ("Enter", tr("send")),
            ("Ctrl+J", tr("new line")),
            ("Esc", tr("stop an answer")),
            ("/", tr("commands")),
            ("Ctrl+P", tr("everything else")),
            ("Ctrl+Q", tr("leave")),
        ]
        return Turn(
            "welcome", "welcome", "\n".join(f"{k}\t{v}" for k, v in keys), label=one_line(self.launch.model or "", 40)
        )

    def refresh_title(self) -> None:
        title = self.session.tree.conversation.title if self.session else ""
        sidebar = self.query_one(Sidebar)
        if self.session is not None:
            sidebar.history = self.session.history
            sidebar.open_id = self.session.tree.conversation.id
        sidebar.reload()
        self.query_one("#title", Static).update(Text(one_line(title or tr("new conversation"), 200)))
        self.app.title = f"glmchat · {one_line(title, 60)}" if title else "glmchat"

    def set_theme(self, name: str) -> None:
        self.app.change_theme(name)  # type: ignore[attr-defined]

    def leave(self) -> None:
        self.stop_all()
        self._save_draft()
        self.app.exit(0)

    def hang_up(self) -> None:
        """The terminal is gone: what stood in the prompt or waited is kept; the answer ends unless it is left to go on.

        Nothing else of the screen is touched any more.
        """
        session = self.session
        if session is None:
            return
        unsent = "\n\n".join([*self.queue, *([self.prompt.text] if self.prompt.text else [])])
        session.history.save_draft(session.tree, unsent)
        for answering in self.being_written:
            if not hangup.goes_on(answering.session, self.launch.finish_on_hangup):
                answering.stop()

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Where Enter is a newline F5 sends, while something stands in the prompt."""
        if action == "command" and parameters == ("restart",) and self.prompt.sends_with_f5:
            return self.settings.keys.get("restart", "f5") != "f5"
        return super().check_action(action, parameters)

    def action_command(self, name: str) -> None:
        self.run_command(name)

    def on_sidebar_open(self, event: Sidebar.Open) -> None:
        try:
            self.open_conversation(event.conversation, event.message)
        except GlmchatError as error:  # another window removed it
            self.complain(error)
            self.query_one(Sidebar).reload()
            return
        self.transcript.search(event.query)
        if self.has_class("narrow"):
            self.query_one(Sidebar).action_close()
        elif event.message is None:
            self.prompt.focus()

    def on_sidebar_changed(self) -> None:
        if self.session is None:
            return
        is_there = self.session.history.find
        for other in self.behind:
            if is_there(other.session.tree.conversation.id) is None:
                other.stop()
        if is_there(self.session.tree.conversation.id) is None and self.session.tree.messages:
            self.stop()
            self.turn_to(None)
        else:
            self.session.refresh()
            self.refresh_title()

    def on_sidebar_closed(self) -> None:
        self.prompt.focus()
