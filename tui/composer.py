"""The prompt with all that belongs to it: suggestions, what waits to be sent, drafts, earlier prompts, an editor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual import events
from textual.app import ComposeResult, SuspendNotSupported
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.timer import Timer
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.tui import terminal
from glmchat.tui.messages import Names
from glmchat.tui.steady import SteadyScreen
from glmchat.tui.talk import Talk
from glmchat.tui.theme import Palette
from glmchat.tui.unsent import Unsent
from glmchat.tui.view import View
from glmchat.tui.widgets.prompt import MAX_LINES
from glmchat.tui.widgets.rows import Rows
from glmchat.tui.widgets.suggestions import Suggestions, suggestions_for, wants_names

if TYPE_CHECKING:
    from glmchat.chat.compare.columns import StoreNames

_DRAFT_AFTER = 1.0  # seconds
_MEASURE_AFTER = 0.4
_LOW = 10  # rows; below, nothing is suggested


class Composer:
    """queue: where the waiting questions are listed. box: the frame around the prompt."""

    def __init__(
        self, view: View, talk: Talk, unsent: Unsent, suggestions: Suggestions, queue: Static, box: Vertical
    ) -> None:
        self.suggestions = suggestions
        self._view = view
        self._talk = talk
        self._unsent = unsent
        self._queue = queue
        self._box = box
        self._measure_timer: Timer | None = None
        self._draft_timer: Timer | None = None
        self._names: StoreNames | None = None  # of the store, as last read
        self._names_asked = False  # since the prompt began to want them
        self._is_hidden = False

    def text_changed(self) -> None:
        prompt = self._view.prompt
        self.grow()
        self._is_hidden = False
        self._suggest()
        if not wants_names(prompt.text):
            self._names_asked = False
        elif not self._names_asked:
            self._names_asked = True
            self._view.start_thread(self._read_names, "names", exclusive=True)
        if self._measure_timer is not None:
            self._measure_timer.stop()
        if self._draft_timer is not None:
            self._draft_timer.stop()
        self._draft_timer = prompt.set_timer(_DRAFT_AFTER, self.save_unsent)
        if not prompt.text.startswith("/"):
            self._measure_timer = prompt.set_timer(_MEASURE_AFTER, self._talk.measure)

    def grow(self) -> None:
        """As high as its text, up to ten lines and two fifths of the screen."""
        prompt = self._view.prompt
        lines = prompt.wrapped_document.height if prompt.size.width else prompt.document.line_count
        prompt.styles.height = max(1, min(lines, MAX_LINES, max(1, prompt.screen.size.height * 2 // 5)))

    def fill(self, text: str) -> None:
        """Put a text into the prompt, in place of what stands there."""
        self._view.prompt.set_text(text)
        self._view.prompt.focus()

    # Suggestions

    def _suggest(self) -> None:
        prompt = self._view.prompt
        offered = suggestions_for(prompt.text, self._names) if prompt.screen.size.height >= _LOW else []
        exact = len(offered) == 1 and prompt.text == offered[0].shown
        self.suggestions.suggest(offered)
        prompt.suggesting = bool(offered) and not exact

    def _read_names(self) -> None:
        """In a thread."""
        from glmchat.chat.compare.columns import store_names

        try:
            names = store_names()
        except GlmchatError:  # a catalogue that cannot be read: the command itself says so
            names = None
        self._view.post_message(Names(names))

    def names_read(self, news: Names) -> None:
        if news.names is not None and news.names != self._names:
            self._names = news.names
            if wants_names(self._view.prompt.text) and not self._is_hidden:
                self._suggest()

    def take_suggestion(self) -> None:
        if (chosen := self.suggestions.chosen) is not None:
            self._view.prompt.set_text(chosen.text)

    def hide_suggestions(self) -> bool:
        """False if there are none."""
        shown = bool(self.suggestions.offered)
        self._is_hidden = True
        self.suggestions.suggest([])
        self._view.prompt.suggesting = False
        return shown

    # What waits, and what was sent before

    def show_queue(self, palette: Palette, ready: bool, has_model: bool) -> None:
        """ready: the model can be asked. has_model: one was chosen, so it will be."""
        queue = self._talk.queue
        facts = self._view.status.facts
        self._view.status.show(queued=len(queue))
        self._queue.display = bool(queue)
        text = Text()
        for waiting in queue:
            line = one_line(waiting, 400)
            text.append("◦ ", palette.style(palette.user))
            width = max(8, self._view.app.size.width - 12)
            text.append(set_cell_size(line, min(cell_len(line), width)))
            text.append("\n", palette.quiet)
        when = tr("will be sent when the answer is finished") if ready else tr("will be sent when the model is ready")
        if self._talk.elsewhere:
            when = tr("will be sent when the answer in another window is finished")
            if self._talk.writer:
                machine = one_line(self._talk.writer, 40)
                when = tr("will be sent when the answer being written on {machine} is finished", machine=machine)
        if not has_model:
            when = tr("will be sent when a model is loaded; F4 chooses one")
        elif facts.lost:
            when = tr("press F5 to start the engine and send it")
        text.append(f"{when} · {tr('↑ to edit it')}", palette.faded)
        self._queue.update(text)

    def show_editing(self, is_editing: bool) -> None:
        self._box.set_class(is_editing, "editing")
        self._box.border_title = tr("editing a question · Esc cancels") if is_editing else ""

    def leave_edge(self, step: int) -> None:
        """Up on the first line or Down on the last: a waiting question comes back, or an earlier prompt."""
        prompt = self._view.prompt
        if step < 0 and self._talk.queue and not prompt.text:
            prompt.set_text(self._talk.queue.pop())  # of the draft it stays a part
            self._view.show_queue()
        elif not prompt.recall(step) and step < 0 and not prompt.text and not prompt.entered:
            # Of other conversations, then of this one: they are earlier prompts too.
            for question in [*reversed(self._questions_elsewhere()), *self._questions()]:
                prompt.remember(question)
            prompt.recall(-1)

    def search_prompts(self) -> None:
        here = list(reversed([*self._questions(), *self._view.prompt.entered]))
        earlier = list(dict.fromkeys([*here, *self._questions_elsewhere()]))

        def take(text: str | None) -> None:
            if text is not None:
                self._view.prompt.set_text(text)

        self._view.app.push_screen(PromptSearch(earlier), take)

    def _questions(self) -> list[str]:
        session = self._talk.session
        return [m.text for m in session.tree.path() if m.role == "user"] if session is not None else []

    def _questions_elsewhere(self) -> list[str]:
        session = self._talk.session
        return session.history.recent_questions() if session is not None else []

    # Drafts

    def save_unsent(self) -> None:
        """In a thread."""
        self._unsent.save(self._talk.session)

    def keep_unsent(self) -> None:
        """At the end, at once: what stands in the prompt or waits becomes the draft."""
        for timer in (self._draft_timer, self._measure_timer):
            if timer is not None:
                timer.stop()
        self._unsent.keep(self._talk.session)

    def restore_draft(self) -> None:
        """What stood unsent in the prompt of this conversation, unless something else stands there."""
        if not self._view.prompt.text:
            self._view.prompt.set_text(self._talk.chat.tree.conversation.draft)

    def edit_in_editor(self) -> None:
        """The prompt in $VISUAL or $EDITOR; the window waits meanwhile."""
        try:
            with self._view.app.suspend():
                text = terminal.edit(self._view.prompt.text)
        except SuspendNotSupported:
            self._view.tell(tr("an editor cannot be opened in this terminal"), role="warning")
            return
        if text is not None:
            self._view.prompt.set_text(text)


class PromptSearch(SteadyScreen, ModalScreen[str | None]):
    """prompts: newest first. Returns the chosen one, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,ctrl+q", "leave", show=False)]

    def __init__(self, prompts: Sequence[str]) -> None:
        super().__init__()
        self._prompts = prompts
        self._hits: list[str] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="panel"):
            yield Input(placeholder=tr("part of an earlier prompt"), compact=True)
            yield Rows()

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        panel.border_title = tr("Earlier prompts")
        panel.border_subtitle = tr("Enter takes one · Esc closes")
        self.query_one(Input).focus()
        self._narrow("")

    def _narrow(self, query: str) -> None:
        word = query.casefold()
        self._hits = [prompt for prompt in self._prompts if word in prompt.casefold()][:100]
        listing = self.query_one(OptionList)
        listing.clear_options()
        listing.add_options(
            [Option(Text(one_line(prompt, 200), no_wrap=True, overflow="ellipsis")) for prompt in self._hits]
        )
        if self._hits:
            listing.highlighted = 0

    def on_input_changed(self, event: Input.Changed) -> None:
        self._narrow(event.value)

    def on_input_submitted(self) -> None:
        at = self.query_one(OptionList).highlighted
        self.dismiss(self._hits[at] if at is not None and at < len(self._hits) else None)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._hits[event.option_index])

    def on_key(self, event: events.Key) -> None:
        listing = self.query_one(OptionList)
        if event.key in ("ctrl+r", "down", "up") and self.focused is not listing:
            listing.action_cursor_up() if event.key == "up" else listing.action_cursor_down()
            event.stop()

    def action_leave(self) -> None:
        self.dismiss(None)
