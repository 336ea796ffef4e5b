"""The chat screen: it puts its parts together, draws its layout, binds keys, and hands what happens to the parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Static, TextArea

from glmchat.chat.commands import actions, table
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.tui.composer import Composer
from glmchat.tui.connection import EngineLink, ModelConnection
from glmchat.tui.face import WindowFace
from glmchat.tui.messages import (
    Ended,
    EngineLost,
    Heard,
    Listed,
    Loading,
    Measured,
    Names,
    Opened,
    PartsCounted,
    Reached,
    Ready,
    Replied,
    Resources,
    Served,
    Titled,
    Weighed,
)
from glmchat.tui.reading import Reading
from glmchat.tui.steady import SteadyScreen
from glmchat.tui.talk import Talk
from glmchat.tui.transcript.transcript import Clicked, Transcript
from glmchat.tui.transcript.turns import Role, Turn
from glmchat.tui.unsent import Unsent
from glmchat.tui.widgets.actions import FEW_ROWS, TurnActions, hint_line
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.sidebar import Sidebar, when
from glmchat.tui.widgets.status import StatusLine
from glmchat.tui.widgets.suggestions import Suggestions

if TYPE_CHECKING:
    from glmchat.chat.history.history import History
    from glmchat.chat.session import ChatSession

_HINTED = {"help": "help", "history": "conversations", "model": "models", "quit": "quit"}  # commands with keys
LOW = FEW_ROWS  # below, the title is given up
_RECENT = 5  # conversations that an empty one lists
_DIGITS = tuple(map(str, range(1, _RECENT + 1)))
_HEADS = 50  # among so many, pinned ones first, the last are looked for
_TWICE = 1.5  # seconds between two presses of Esc that belong together
WIDE = 130  # columns; from here on the sidebar opens by itself
NARROW = 72  # columns; below, the sidebar takes the whole width


class ChatScreen(SteadyScreen, Screen[None]):
    """talk: the conversation. connection: what answers. composer: the prompt and what surrounds it. face: the commands.

    reading: the turn one stands on. The transcript draws. Each part has the screen as a `View`.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *(
            Binding(c.key, f"command('{c.name}')", c.summary, id=c.name, show=False, priority=True)
            for c in table.COMMANDS
            if c.key
        ),
        Binding("escape", "escape", show=False),
        Binding("ctrl+c", "interrupt", show=False, priority=True),
        Binding("ctrl+r", "search_prompts", show=False, priority=True),
        Binding("ctrl+up", "step(-1)", show=False, priority=True),
        Binding("ctrl+down", "step(1)", show=False, priority=True),
        Binding("shift+pageup,alt+up", "page(-1)", show=False, priority=True),
        Binding("shift+pagedown,alt+down", "page(1)", show=False, priority=True),
        Binding("pageup", "page(-1)", show=False, priority=True),  # the prompt would take them for itself
        Binding("pagedown", "page(1)", show=False, priority=True),
        Binding("ctrl+home", "top", show=False, priority=True),
        Binding("ctrl+end", "end", show=False, priority=True),
        Binding("f3", "hit(1)", show=False, priority=True),
        Binding("shift+f3", "hit(-1)", show=False, priority=True),
    ]

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__()
        self.settings = settings
        self.headline = Static("", id="title")
        self.sidebar = Sidebar(id="sidebar")
        self.transcript = Transcript(id="transcript")
        self.turn_actions = TurnActions(id="actions")
        self.suggestions = Suggestions(id="suggestions")
        self.queue_box = Static("", id="queue")
        self.prompt = Prompt(enter_sends=settings.enter_sends, id="prompt")
        self.prompt_box = Vertical(self.prompt, id="prompt-box")
        self.prompt_column = Vertical(self.prompt_box, id="prompt-column")
        self.status = StatusLine(id="status")
        self.connection = ModelConnection(self, launch, link)
        unsent = Unsent(self)
        self.talk = Talk(self, self.connection, unsent)
        self.composer = Composer(self, self.talk, unsent, self.suggestions, self.queue_box, self.prompt_box)
        self.face = WindowFace(self, self.talk, self.connection, self.composer, self.sidebar, settings)
        self.reading = Reading(self, self.talk, self.face, self.turn_actions, self.action_escape)
        self._notices = 0
        self._started = False
        self._recent: list[int] = []  # conversations, as the empty one numbers them
        self._listed: History | None = None  # what lists them until there is a session
        self._meant: int | None = None  # one of them that was chosen until then
        self._warm: tuple[str, ...] = ()
        self._was_wide = False
        self._early: list[str] = []  # commands that wait until the history is open
        self._escaped = float("-inf")  # when Esc had nothing else to do

    def compose(self) -> ComposeResult:
        with Horizontal(id="body"):
            yield self.sidebar
            with Vertical(id="main"):
                yield self.headline
                yield self.transcript
                yield self.turn_actions
                yield self.suggestions
                yield self.queue_box
                yield self.prompt_column
                yield self.status

    def on_mount(self) -> None:
        launch = self.connection.launch
        self.prompt.placeholder = tr("Ask anything · / for commands")
        if launch.prompt:
            self.prompt.set_text(launch.prompt)
        self.prompt.focus()
        self.status.show(model=launch.engine.model, quant=launch.engine.quant_label, revision=launch.engine.revision)
        self.apply_palette()
        self.transcript.show([self.welcome()])
        self.show_title()
        self.set_interval(2.0, self.connection.watch)
        self.set_interval(1.0, self.talk.watch)
        self.app.call_later(self.app.hear_typed_ahead)  # type: ignore[attr-defined]
        # The first frame is drawn before anything is loaded.
        self.call_after_refresh(self._start)

    def _start(self) -> None:
        """Open the history and start the engine, both in threads; without a model the list of them opens."""
        if self._started:
            return
        self._started = True
        self.start_thread(lambda: self.talk.open_history(self.settings), "history")
        if self.connection.link.has_target:
            self.connection.connect()
        else:
            self.face.run("model")

    def apply_palette(self) -> None:
        for widget in (self.status, self.suggestions, self.turn_actions, self.sidebar):
            widget.palette = self.palette
            widget.refresh()
        self.transcript.set_palette(self.palette)
        self.sidebar.reload()
        self.show_hints()

    def on_screen_suspend(self) -> None:
        self._start()  # no frame is drawn below a dialog, and what waits for the first would wait for its end
        self.prompt_box.add_class("behind")  # the corners of its frame would stand out below a dialog
        self.show_hints()

    def on_screen_resume(self) -> None:
        self.prompt_box.remove_class("behind")
        self.show_hints()
        self.talk.show_in_force()  # a dialog may have changed it

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < NARROW, "narrow")
        self.headline.display = event.size.height >= LOW
        # Where rows are few the prompt gives up its frame.
        self.prompt_box.styles.border = ("none", "transparent") if event.size.height < 8 else None
        self.composer.grow()
        self.show_beside(event.size.width)

    def show_beside(self, width: int) -> None:
        """Where there is room the conversations stand beside, until somebody closes them."""
        is_wide = width >= WIDE and self._recent != [] and self.talk.session is not None
        if is_wide is not self._was_wide:
            self._was_wide = is_wide
            self.sidebar.stand_by(is_wide)

    def on_transcript_resized(self) -> None:
        """Title, prompt and what surrounds it stand in the column of the text."""
        side = self.transcript.margin
        self.headline.styles.padding = (0, side)
        self.prompt_column.styles.padding = (0, max(0, side - 1))  # a margin would narrow its siblings too
        self.status.styles.padding = (0, max(0, side - 1))
        for widget in (self.suggestions, self.queue_box, self.turn_actions):
            widget.styles.padding = (0, side + 1)
        self.call_after_refresh(self.show_hints)

    def leave_for_good(self, going_on: Sequence[ChatSession] = ()) -> None:
        """The window ends from outside: what stood in the prompt or waited is kept; all answers end but those going on.

        Nothing else of the screen is touched any more.
        """
        self.composer.keep_unsent()
        for answering in self.talk.being_written:
            if answering.session not in going_on:
                answering.stop()

    # The keys that exist now

    def show_hints(self) -> None:
        """In the lower border of the prompt, which costs no row."""
        if not self.settings.hints:
            return
        is_behind, width = self.prompt_box.has_class("behind"), self.prompt_box.outer_size.width - 6
        line = "" if is_behind else hint_line(self._hints(), width, self.palette)
        self.prompt_box.border_subtitle = line if line else ""

    def _hints(self) -> list[tuple[str, str]]:
        sends, breaks = ("Enter", "Ctrl+J") if self.settings.enter_sends else ("F5", "Enter")
        if self.focused is not None and self.sidebar in self.focused.ancestors:
            return [("Enter", tr("open")), ("Esc", tr("close"))]
        if self.transcript.has_focus:
            return [("Ctrl+↑ ↓", tr("turns")), ("PgUp PgDn", tr("scroll")), ("Esc", tr("back to the prompt"))]
        if self.prompt.suggesting:
            return [("Tab", tr("complete")), ("↑ ↓", tr("choose")), ("Esc", tr("close"))]
        stop = [("Esc", tr("stop"))] if self.talk.busy or self.connection.asking else []
        if self.prompt.text:
            rest = [] if self.talk.busy else [("Esc Esc", tr("empty the prompt"))]
            return [*stop, (sends, tr("queue") if self.talk.busy else tr("send")), (breaks, tr("new line")), *rest]
        keys = {name: table.key_name(self.settings.keys.get(name, table.BY_NAME[name].key)) for name in _HINTED}
        return [*stop, ("Ctrl+P", tr("palette")), *((keys[name], tr(does)) for name, does in _HINTED.items())]

    def on_descendant_focus(self) -> None:
        self.show_hints()

    def on_descendant_blur(self) -> None:
        self.show_hints()

    # What the parts have of the screen (`View`)

    def start_thread(self, work: Callable[[], None], group: str, *, exclusive: bool = False) -> None:
        self.run_worker(work, thread=True, group=group, exclusive=exclusive, exit_on_error=True)

    def tell(self, text: str, hint: str = "", role: Role = "notice") -> None:
        self._notices += 1
        self.transcript.add(Turn(f"notice-{self._notices}", role, text, hint=hint))

    def show_error(self, error: GlmchatError) -> None:
        if self.has_class("narrow") and self.sidebar.display:
            super().show_error(error)  # the list stands before the transcript
        else:
            self.tell(error.message, error.hint, "warning" if error.exit == 2 else "error")

    def show_title(self) -> None:
        session = self.talk.session
        title = session.tree.conversation.title if session else ""
        if session is not None:
            self.sidebar.history = session.history
            self.sidebar.open_id = session.tree.conversation.id
        self.sidebar.reload()
        self.show_hints()
        self.headline.update(Text(one_line(title or tr("new conversation"), 200)))
        self.app.title = f"glmchat · {one_line(title, 60)}" if title else "glmchat"

    def show_queue(self) -> None:
        self.show_hints()
        self.composer.show_queue(self.palette, self.connection.takes_questions, self.connection.link.has_target)

    def show_editing(self, is_editing: bool) -> None:
        self.composer.show_editing(is_editing)

    def welcome(self) -> Turn:
        sends, breaks = ("Enter", "Ctrl+J") if self.settings.enter_sends else ("F5", "Enter")
        keys = [
            (sends, tr("send")),
            (breaks, tr("new line")),
            ("Esc", tr("stop an answer")),
            ("/", tr("commands")),
            ("Ctrl+P", tr("palette")),
            ("Ctrl+B", tr("conversations")),
            ("F4", tr("models")),
            ("Ctrl+Q", tr("quit")),
        ]
        if not self.connection.link.has_target:
            keys = [("F4", tr("choose a model")), *(row for row in keys if row[0] != "F4")]
        model = one_line(self.connection.launch.engine.model or "", 40)
        lines = [*self._recent_lines(), *(f"{key}\t{does}" for key, does in keys)]
        return Turn("welcome", "welcome", "\n".join(lines), label=model)

    def _recent_lines(self) -> list[str]:
        """The last conversations, numbered, and what runs, for the top of an empty one."""
        lines: list[str] = []
        self._recent.clear()
        history = self._listed if self.talk.session is None else self.talk.session.history
        if history is not None:
            heads = [
                head
                for head in history.conversations(limit=_HEADS)
                if head.message_count and not head.settings.one_shot
            ]
            for head in sorted(heads, key=lambda head: -head.updated)[:_RECENT]:
                self._recent.append(head.id)
                title = one_line(head.title or tr("untitled"), 60).replace("\t", " ")
                lines.append(f"{len(self._recent)}\t{title}\t{when(head.updated, time.time())}\t{head.id}")
        if self._recent:
            typed = self.prompt.text
            at = int(typed) - 1 if typed in _DIGITS else 0
            if typed in _DIGITS and at < len(self._recent):
                sends = "Enter" if self.settings.enter_sends else "F5"
                does = tr("open {n}; with a space before it, {n} is asked", n=typed)
                lines += ["", f"{sends}\t{does}"]
            else:
                numbers = "1" if len(self._recent) == 1 else f"1 … {len(self._recent)}"
                lines += ["", f"Enter\t{tr('open the latest')}", f"{numbers}\t{tr('open that one')}"]
        if self._warm:
            lines.append(f"{tr('running')}\t{one_line(', '.join(self._warm), 60)}")
        return [*lines, ""] if lines else []

    def _recent_meant(self, typed: str) -> int | None:
        """The conversation that a number (or nothing) means where the last ones are listed."""
        if self.transcript.layout_of("welcome") is None or not self._recent:
            return None
        number = 1 if not typed else int(typed) if typed in _DIGITS else 0
        return self._recent[number - 1] if 0 < number <= len(self._recent) else None

    # News of the threads

    def on_listed(self, news: Listed) -> None:
        self._listed = news.history
        self.transcript.change("welcome", text=self.welcome().text)

    def on_opened(self, news: Opened) -> None:
        self._warm = news.running
        self.talk.opened(news)
        if self.face.leaving:
            self.face.leave()
            return
        self.transcript.change("welcome", text=self.welcome().text)
        self.show_beside(self.size.width)
        if self.connection.launch.resume is not None:
            self.composer.restore_draft()
        self.talk.meet()
        if self._meant is not None:
            self.face.turn_to(self._meant)
        early, self._early = self._early, []
        for text in early:
            self.face.take(text)

    def on_loading(self, news: Loading) -> None:
        self.connection.loading(news)

    def on_ready(self, news: Ready) -> None:
        self.connection.connected(news)
        welcome = self.welcome()  # perhaps of the first model
        self.transcript.change("welcome", text=welcome.text, label=welcome.label)
        self.talk.meet()

    def on_engine_lost(self, news: EngineLost) -> None:
        if not self.talk.busy:  # else the end of the answer says it
            self.connection.lost(news.error)
            self.talk.disconnect()

    def on_resources(self, news: Resources) -> None:
        self.connection.show_resources(news)

    def on_heard(self, news: Heard) -> None:
        self.talk.hear(news.answering)
        self.show_hints()

    def on_ended(self, news: Ended) -> None:
        self.talk.end(news.answering, news.error)
        self.show_hints()

    def on_titled(self, news: Titled) -> None:
        self.show_title()

    def on_measured(self, news: Measured) -> None:
        self.talk.measured(news)

    def on_replied(self, news: Replied) -> None:
        try:
            self.connection.replied(news)
        finally:
            self.call_later(self.talk.send_queued)  # behind the reply

    def on_parts_counted(self, news: PartsCounted) -> None:
        actions.show_context(self.face, news.parts)

    def on_served(self, news: Served) -> None:
        if news.adapters:
            self.face.use_adapters_of_server(news)
        else:
            self.face.switch_on_server(news)

    def on_reached(self, news: Reached) -> None:
        self.face.switch_server(news)

    def on_weighed(self, news: Weighed) -> None:
        self.face.show_weight(news)

    def on_names(self, news: Names) -> None:
        self.composer.names_read(news)

    # The prompt

    def on_prompt_sent(self, event: Prompt.Sent) -> None:
        if (conversation := self._recent_meant(event.text)) is not None:
            if event.text:
                self.prompt.entered.pop()  # a number is no earlier prompt
            if self.talk.session is None:
                self._meant = conversation
            else:
                self.face.turn_to(conversation)
            return
        if not event.text:
            return
        if self.talk.session is None and event.text.startswith("/"):  # waits, as questions do
            self._early.append(event.text)
            return
        self.composer.save_unsent()  # what was sent must not come back as a draft
        self.face.take(event.text)

    def on_prompt_leave(self) -> None:
        self.face.leave()

    def on_prompt_edge(self, event: Prompt.Edge) -> None:
        self.composer.leave_edge(event.step)

    def on_prompt_complete(self) -> None:
        self.composer.take_suggestion()

    def on_prompt_choose(self, event: Prompt.Choose) -> None:
        self.suggestions.move(event.step)

    def on_suggestions_taken(self, event: Suggestions.Taken) -> None:
        self.composer.fill(event.suggestion.text)

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        if event.text_area is self.prompt:
            self.composer.text_changed()
            self.show_hints()
            if self._recent:
                self.transcript.change("welcome", text=self.welcome().text)  # what a number would do

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Where Enter is a newline F5 goes to the prompt, which sends or hands it back."""
        if action == "command" and parameters == ("restart",) and self.prompt.sends_with_f5:
            return not self._restarts_with_f5
        return super().check_action(action, parameters)

    @property
    def _restarts_with_f5(self) -> bool:
        return self.settings.keys.get("restart", "f5") == "f5"

    def on_prompt_nothing_to_send(self) -> None:
        if self._restarts_with_f5:
            self.face.run("restart")

    def action_command(self, name: str) -> None:
        self.face.run(name)

    def action_escape(self) -> None:
        """Stop the answer, or the wait for a server; else leave, one after the other: editing, the current turn, the
        transcript's focus."""
        if self.talk.stop() or self._give_up():
            self.show_hints()
            return
        if self.talk.editing is not None:
            self.prompt.set_text("")
            self.talk.stop_editing()
        elif self.transcript.current is not None or self.focused is not self.prompt:
            self.transcript.make_current(None)
            self.transcript.search("")
            self.prompt.focus()
        elif not self.composer.hide_suggestions() and not self.talk.stop_behind():
            self._empty_prompt()

    def _give_up(self) -> bool:
        """The wait for a server's word; what waited for it goes to the model that answers."""
        if not self.connection.give_up():
            return False
        self.talk.send_queued()
        return True

    def _empty_prompt(self) -> None:
        """The second Esc in a row empties the prompt; one alone could be meant for something that has just ended."""
        now = time.monotonic()
        if not self.prompt.text:
            return
        if now - self._escaped < _TWICE:
            self.prompt.empty()
            self.notify(tr("Ctrl+_ brings it back"), timeout=3)
        else:
            self.notify(tr("Esc again empties the prompt"), timeout=2)
        self._escaped = now

    def action_interrupt(self) -> None:
        """Ctrl+C: a selection is copied, an answer is stopped, the prompt is emptied; else how to leave is said."""
        if selected := self.transcript.selected_text:
            self.face.copy_text(selected)
            self.transcript.clear_selection()
        elif self.prompt.has_focus and self.prompt.selected_text:
            self.face.copy_text(self.prompt.selected_text)
        elif self.talk.stop() or self._give_up() or self.talk.stop_behind():
            self.show_hints()
        elif self.prompt.text:
            self.prompt.empty()
            self.notify(tr("Ctrl+_ brings it back"), timeout=3)
        else:
            self.notify(tr("Ctrl+Q or /quit to quit"), timeout=3)

    def action_search_prompts(self) -> None:
        self.composer.search_prompts()

    def action_step(self, step: int) -> None:
        self.reading.step(step)

    def action_page(self, pages: int) -> None:
        self.transcript.scroll_page(pages)

    def action_top(self) -> None:
        self.transcript.action_go_top()

    def action_end(self) -> None:
        self.transcript.action_go_end()

    def action_hit(self, step: int) -> None:
        self.transcript.go_to_hit(step)

    def on_key(self, event: events.Key) -> None:
        if self.transcript.has_focus:
            self.reading.press(event)

    # The transcript and the conversations

    def on_paste(self, event: events.Paste) -> None:
        """What is pasted where nothing takes text belongs to the prompt."""
        event.stop()  # at the app it would be sent here again
        self.prompt.focus()
        self.prompt.paste(event.text)

    def on_turn_actions_chosen(self, event: TurnActions.Chosen) -> None:
        self.reading.act(event.act)

    def on_clicked(self, event: Clicked) -> None:
        if event.name == "open-conversation":
            self.face.turn_to(int(event.argument))
            self.prompt.focus()
            return
        # A link is copied too. Opening would start a browser where glmchat runs, which over SSH is the wrong machine.
        self.face.copy_text(event.argument)

    def on_transcript_current_changed(self) -> None:
        self.reading.offer_actions()

    def on_sidebar_open(self, event: Sidebar.Open) -> None:
        try:
            self.face.turn_to(event.conversation)
        finally:
            self.sidebar.reload()  # another window may have removed it
        if event.message is not None:
            self.reading.show_message(event.message)
        self.transcript.search(event.query)
        if event.message is not None and event.query:
            self.transcript.show_hit(str(event.message))
        if self.has_class("narrow"):
            self.sidebar.action_close()
        elif event.message is None:
            self.prompt.focus()

    def on_sidebar_changed(self) -> None:
        self.talk.refresh()
        self.transcript.change("welcome", text=self.welcome().text)

    def on_sidebar_closed(self) -> None:
        if not self.sidebar.display:  # it may have been opened again
            self.prompt.focus()
