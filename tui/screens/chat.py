"""The chat screen: layout, keys, mouse, and what the prompt sends."""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.timer import Timer
from textual.widgets import Static, TextArea

from glmchat.chat import hangup
from glmchat.chat.launch import LaunchOptions
from glmchat.core.language import tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.tui import commands, editor
from glmchat.tui.completing import suggestions as suggestions_for
from glmchat.tui.link import EngineLink
from glmchat.tui.screens.comparing import Comparing
from glmchat.tui.screens.prompt_search import PromptSearch
from glmchat.tui.theme import Palette
from glmchat.tui.turns import Turn
from glmchat.tui.widgets.actions import ACTIONS, TurnActions
from glmchat.tui.widgets.prompt import MAX_LINES, Prompt
from glmchat.tui.widgets.sidebar import Sidebar
from glmchat.tui.widgets.status import StatusLine
from glmchat.tui.widgets.suggestions import Suggestions
from glmchat.tui.widgets.transcript import Clicked, Transcript

LOW = 16  # rows; below, the title is given up
NARROW = 72  # columns; below, the sidebar takes the whole width
_BARE = ("clear", "stop", "exit", "quit", "help")  # words that other programs take as commands
_DRAFT_AFTER = 1.0
_MEASURE_AFTER = 0.4


class ChatScreen(Comparing):
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
        self._measure_timer: Timer | None = None
        self._draft_timer: Timer | None = None

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

    @property
    def palette(self) -> Palette:
        palette: Palette = self.app.palette  # type: ignore[attr-defined]
        return palette

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
            self.command_model("")

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

    def queue_changed(self) -> None:
        super().queue_changed()
        box = self.query_one("#queue", Static)
        box.display = bool(self.queue)
        p = self.palette
        text = Text()
        for waiting in self.queue:
            text.append("◦ ", p.style(p.user))
            text.append(
                set_cell_size(
                    one_line(waiting, 400), min(cell_len(one_line(waiting, 400)), max(8, self.size.width - 12))
                )
            )
            text.append("\n", p.quiet)
        when = tr("sent when the answer has ended") if self.ready else tr("sent when the model is ready")
        if self.status.facts.lost:
            when = tr("F5 starts the engine, then it is sent")
        text.append(f"{when} · {tr('↑ takes it back')}", p.faded)
        box.update(text)

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

    def show_prompt_state(self) -> None:
        box = self.query_one("#prompt-box")
        editing = self._editing is not None
        box.set_class(editing, "editing")
        box.border_title = tr("editing a question · Esc leaves it") if editing else ""

    # The prompt

    def on_prompt_sent(self, event: Prompt.Sent) -> None:
        self._save_draft()  # what was sent must not come back as a draft
        kind, word, argument = commands.parse(event.text)
        if kind == "unknown":
            hint = tr("did you mean /{name}? ", name=argument) if argument else ""
            self.tell(
                tr("there is no command /{word}", word=one_line(word, 40)),
                hint + tr("// at the beginning sends the slash"),
                "warning",
            )
            if not self.prompt.text:
                self.prompt.set_text(event.text)  # to be mended
            return
        if kind == "command":
            self.run_command(word, argument)
            return
        if self._editing is not None and self.ready:
            self.guarded(lambda: self.ask_edited(word))
            return
        self.transcript.make_current(None)
        self.ask(word)
        if word.strip().lower() in _BARE:
            self.tell(tr("“{word}” was sent as text; the command is /{word}", word=word.strip().lower()))

    def on_prompt_leave(self) -> None:
        self.leave()

    def on_prompt_edge(self, event: Prompt.Edge) -> None:
        if event.step < 0 and self.queue and not self.prompt.text:
            self.prompt.set_text(self.queue.pop())
            self.queue_changed()
        elif not self.prompt.recall(event.step) and event.step < 0 and not self.prompt.text:
            self._recall_from_history()

    def _recall_from_history(self) -> None:
        """The questions of this conversation are earlier prompts too."""
        if not self.prompt.entered and self.session is not None:
            for message in self.session.tree.path():
                if message.role == "user":
                    self.prompt.remember(message.text)
            self.prompt.recall(-1)

    def on_prompt_complete(self) -> None:
        if (chosen := self.query_one(Suggestions).chosen) is not None:
            self.prompt.set_text(chosen.text)

    def on_prompt_choose(self, event: Prompt.Choose) -> None:
        self.query_one(Suggestions).move(event.step)

    def on_suggestions_taken(self, event: Suggestions.Taken) -> None:
        self.prompt.set_text(event.suggestion.text)
        self.prompt.focus()

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        if event.text_area is not self.prompt:
            return
        text = self.prompt.text
        self._grow()
        suggestions = self.query_one(Suggestions)
        found = suggestions_for(text) if self.size.height >= 10 else []
        exact = len(found) == 1 and text == found[0].shown
        suggestions.suggest(found)
        self.prompt.suggesting = bool(found) and not exact
        if self._measure_timer is not None:
            self._measure_timer.stop()
        if self._draft_timer is not None:
            self._draft_timer.stop()
        self._draft_timer = self.set_timer(_DRAFT_AFTER, self._save_draft)
        if not text.startswith("/"):
            self._measure_timer = self.set_timer(_MEASURE_AFTER, lambda: self.measure(self.prompt.text))

    def _grow(self) -> None:
        """As high as its text, up to ten lines and two fifths of the screen."""
        prompt = self.prompt
        lines = prompt.wrapped_document.height if prompt.size.width else prompt.document.line_count
        prompt.styles.height = max(1, min(lines, MAX_LINES, max(1, self.size.height * 2 // 5)))

    def _save_draft(self) -> None:
        if self.session is not None:
            session, text = self.session, self.prompt.text
            if session.tree.conversation.draft != text:
                self._thread(lambda: session.history.save_draft(session.tree, text), "draft")

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Where Enter is a newline F5 sends, while something stands in the prompt."""
        if action == "command" and parameters == ("restart",) and self.prompt.sends_with_f5:
            return self.settings.keys.get("restart", "f5") != "f5"
        return super().check_action(action, parameters)

    def action_command(self, name: str) -> None:
        self.run_command(name)

    def action_escape(self) -> None:
        """Stop the answer; else leave, one after the other: editing, the current turn, the transcript's focus."""
        if self.stop():
            return
        if self._editing is not None:
            self.prompt.set_text("")
            self._stop_editing()
        elif self.transcript.current is not None or self.focused is not self.prompt:
            self.transcript.make_current(None)
            self.transcript.search("")
            self.prompt.focus()
        elif self.query_one(Suggestions).found:
            self.query_one(Suggestions).suggest([])
            self.prompt.suggesting = False
        else:
            self.stop_behind()

    def action_interrupt(self) -> None:
        """Ctrl+C: a selection is copied, an answer is stopped, and an idle window says how to leave."""
        if selected := self.transcript.selected_text:
            self.copy_text(selected)
            self.transcript.clear_selection()
        elif self.prompt.has_focus and self.prompt.selected_text:
            self.copy_text(self.prompt.selected_text)
        elif not self.stop() and not self.stop_behind():
            self.notify(tr("Ctrl+Q or /quit leaves"), timeout=3)

    def action_search_prompts(self) -> None:
        earlier = list(dict.fromkeys(reversed([*self._questions(), *self.prompt.entered])))

        def chosen(text: str | None) -> None:
            if text is not None:
                self.prompt.set_text(text)

        self.app.push_screen(PromptSearch(earlier), chosen)

    def _questions(self) -> list[str]:
        if self.session is None:
            return []
        return [m.text for m in self.session.tree.path() if m.role == "user"]

    def action_step(self, step: int) -> None:
        if self.transcript.move_current(step):
            self.transcript.focus()
        elif step > 0:
            self.transcript.make_current(None)
            self.prompt.focus()

    def action_page(self, pages: int) -> None:
        self.transcript.scroll_page(pages)

    def action_end(self) -> None:
        self.transcript.action_go_end()

    def action_hit(self, step: int) -> None:
        self.transcript.go_to_hit(step)

    def edit_in_editor(self) -> None:
        """Ctrl+G: the prompt in $VISUAL or $EDITOR; the window waits meanwhile."""
        try:
            with self.app.suspend():
                text = editor.edit(self.prompt.text)
        except SuspendNotSupported:
            self.tell(tr("this terminal cannot be lent to an editor"), role="warning")
            return
        if text is not None:
            self.prompt.set_text(text)

    def on_key(self, event: events.Key) -> None:
        """Keys on the current turn, while the transcript has the focus; other letters go to the prompt."""
        if not self.transcript.has_focus:
            return
        turn = self.transcript.current
        key = event.key
        if turn is None:
            if event.is_printable and event.character:
                self.prompt.focus()
                self.prompt.insert(event.character)
                event.stop()
            return
        act = next((a.act for a in ACTIONS if key in a.keys and turn.role in a.roles), None)
        if act is not None:
            self._act(turn, act)
        elif key in ("up", "k", "down", "j"):
            self.action_step(-1 if key in ("up", "k") else 1)
        elif key == "enter":
            self.transcript.toggle_fold(turn.key)
        else:
            return
        event.stop()

    def _act(self, turn: Turn, act: str) -> None:
        name, _, argument = act.partition(" ")
        if act == "copy" and turn.role == "user":
            self.copy_text(turn.text)
        elif act == "leave":
            self.action_escape()
        elif act in ("previous", "next", "delete"):
            if turn.key.isdigit():  # a question that is not stored yet has no versions
                message = int(turn.key)
                steps = {"previous": -1, "next": 1}
                self.guarded(
                    lambda: self.walk_branch(message, steps[act]) if act in steps else self.delete_message(message)
                )
        else:
            self.run_command(name, argument)

    def on_turn_actions_chosen(self, event: TurnActions.Chosen) -> None:
        if (turn := self.transcript.current) is not None:
            self._act(turn, event.act)

    # Mouse

    def on_clicked(self, event: Clicked) -> None:
        if event.name == "copy-code":
            self.copy_text(event.argument)
        elif event.name == "open-link":
            # Opening would start a browser on the machine that glmchat runs on, which over SSH is the wrong one.
            self.copy_text(event.argument)

    def on_transcript_current_changed(self) -> None:
        turn = self.transcript.current
        if turn is None:
            self.query_one(TurnActions).offer(())
            return
        self.transcript.focus()
        versions = self._versions(turn)
        self.query_one(TurnActions).offer(
            tuple(a for a in ACTIONS if turn.role in a.roles and (versions or a.act not in ("previous", "next")))
        )

    def _versions(self, turn: Turn) -> bool:
        """Are there other versions of this turn?"""
        tree = self.session.tree if self.session is not None else None
        message = tree.messages.get(int(turn.key)) if tree is not None and turn.key.isdigit() else None
        return message is not None and tree is not None and len(tree.siblings(message)) > 1

    def on_sidebar_open(self, event: Sidebar.Open) -> None:
        self.guarded(lambda: self.open_conversation(event.conversation, event.message))
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
        self.remove_class("with-sidebar")
        self.prompt.focus()
