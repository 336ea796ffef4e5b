"""The chat screen's prompt: what it sends, suggests, recalls, keeps as a draft and lends to an editor."""

from __future__ import annotations

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.app import SuspendNotSupported
from textual.timer import Timer
from textual.widgets import Static, TextArea

from glmchat.chat.commands import table as commands
from glmchat.chat.launch import LaunchOptions
from glmchat.core.language import tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.tui import terminal
from glmchat.tui.comparing import Comparing
from glmchat.tui.completing import suggestions as suggestions_for
from glmchat.tui.link import EngineLink
from glmchat.tui.screens.prompt_search import PromptSearch
from glmchat.tui.theme import Palette
from glmchat.tui.widgets.prompt import MAX_LINES, Prompt
from glmchat.tui.widgets.suggestions import Suggestions

_DRAFT_AFTER = 1.0
_MEASURE_AFTER = 0.4


class Prompting(Comparing):
    """No layout: it asks the screen for its widgets."""

    def __init__(self, launch: LaunchOptions, settings: Settings, link: EngineLink) -> None:
        super().__init__(launch, settings, link)
        self._measure_timer: Timer | None = None
        self._draft_timer: Timer | None = None

    @property
    def palette(self) -> Palette:
        palette: Palette = self.app.palette  # type: ignore[attr-defined]
        return palette

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

    def show_prompt_state(self) -> None:
        box = self.query_one("#prompt-box")
        editing = self._editing is not None
        box.set_class(editing, "editing")
        box.border_title = tr("editing a question · Esc leaves it") if editing else ""

    def on_prompt_sent(self, event: Prompt.Sent) -> None:
        self._save_draft()  # what was sent must not come back as a draft
        kind, word, argument = commands.parse(event.text)
        if kind == "unknown":
            self.complain(commands.unknown(word, argument))
            if not self.prompt.text:
                self.prompt.set_text(event.text)  # to be mended
            return
        if kind == "command":
            self.run_command(word, argument)
            return
        if self._editing is not None:
            self.guarded(lambda: self._send_edited(word, event.text))
            return
        self.transcript.make_current(None)
        self.ask(word)
        if note := commands.bare_word_note(word):
            self.tell(note)

    def _send_edited(self, text: str, typed: str) -> None:
        """Without an engine it stays in the prompt, as it was typed: the queue is for new questions only."""
        if not self.ready and not self.prompt.text:
            self.prompt.set_text(typed)
        self._must_be_ready()
        self.ask_edited(text)

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

    def edit_in_editor(self) -> None:
        """Ctrl+G: the prompt in $VISUAL or $EDITOR; the window waits meanwhile."""
        try:
            with self.app.suspend():
                text = terminal.edit(self.prompt.text)
        except SuspendNotSupported:
            self.tell(tr("this terminal cannot be lent to an editor"), role="warning")
            return
        if text is not None:
            self.prompt.set_text(text)
