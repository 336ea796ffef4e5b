"""One question to several models, adapters or settings: a column each, and the answer to go on with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Static

from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.messages import Piece
from glmchat.core.text import one_line
from glmchat.tui.answering import Ear
from glmchat.tui.steady import SteadyScreen
from glmchat.tui.widgets.comparison_column import ComparisonColumn
from glmchat.tui.widgets.prompt import Prompt
from glmchat.tui.widgets.status import stage_words

if TYPE_CHECKING:
    from glmchat.chat.compare.compare import Comparison, ComparisonEvent
    from glmchat.chat.history.rows import StoredMessage

NARROWEST = 34  # cells of a column; where there is less room one is shown at a time


class ComparisonScreen(SteadyScreen, Screen[int | None]):
    """Returns the column whose answer the conversation goes on with, or None. What was said is in the history anyway.

    The comparison is iterated in a worker thread; it speaks through an `Ear`, and only handlers touch widgets.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,ctrl+c", "leave", show=False, priority=True),
        Binding("left,shift+tab", "step(-1)", show=False, priority=True),
        Binding("right,tab", "step(1)", show=False, priority=True),
        Binding("enter", "pick", show=False, priority=True),
        Binding("r", "go_on", show=False, priority=True),
        *(Binding(str(n + 1), f"look({n})", show=False, priority=True) for n in range(9)),
    ]

    class _Heard(Message):
        """Something waits in the ear."""

    class _Over(Message):
        """The thread is over. error: why the comparison failed as a whole."""

        def __init__(self, error: GlmchatError | None = None) -> None:
            super().__init__()
            self.error = error

    def __init__(self, comparison: Comparison, earlier: StoredMessage | None = None, text: str = "") -> None:
        """earlier: the last question of the conversation, which may be asked again. text: asked at once."""
        super().__init__()
        self.comparison = comparison
        self._earlier = earlier
        self._text = text
        self._ear: Ear[ComparisonEvent] = Ear()
        self._at_work = False
        self._stopping = False
        self._current = 0
        self._news = ""  # how the columns take turns, or what went wrong

    def compose(self) -> ComposeResult:
        yield Static("", id="question")
        yield Static("", id="tabs")
        with Horizontal(id="columns"):
            for number, column in enumerate(self.comparison.columns):
                yield ComparisonColumn(number, column, self.comparison.launches[number], self.palette)
        with Vertical(id="prompt-box"):
            yield Prompt(id="prompt")
        yield Static("", id="keys")

    @property
    def columns(self) -> list[ComparisonColumn]:
        return list(self.query(ComparisonColumn))

    @property
    def asking(self) -> bool:
        """Nothing was asked yet: the prompt is there, and the keys are its own."""
        return self.comparison.question is None and not self._at_work

    def on_mount(self) -> None:
        prompt = self.query_one(Prompt)
        prompt.placeholder = tr("Ask all of them · ↑ for the last question") if self._earlier else tr("Ask them all")
        if self._earlier is not None:
            prompt.remember(self._earlier.text)
        if self._text:
            self._ask(self._text)
        elif self.comparison.question is not None:
            for number, answer in self.comparison.answers().items():
                self.columns[number].end(answer)
        self._show()

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < NARROWEST * len(self.comparison.columns), "one")
        self._show()

    def on_unmount(self) -> None:
        self.comparison.stop()

    # Asking

    def on_prompt_sent(self, event: Prompt.Sent) -> None:
        self._ask(event.text)

    def on_prompt_leave(self) -> None:
        self.dismiss(None)

    def on_prompt_edge(self, event: Prompt.Edge) -> None:
        self.query_one(Prompt).recall(event.step)

    def _ask(self, text: str) -> None:
        again = self._earlier is not None and self._earlier.text == text
        self._begin(self.comparison.ask_again(self._earlier) if again and self._earlier else self.comparison.ask(text))
        self._text = text

    def action_go_on(self) -> None:
        """Bring what a stop or a kill left missing."""
        if not self._at_work and self.comparison.missing():
            self._begin(self.comparison.go_on(), self.comparison.missing())

    def _begin(self, events: Iterable[ComparisonEvent], numbers: Iterable[int] | None = None) -> None:
        self._at_work, self._stopping, self._news = True, False, ""
        for column in self.columns:
            if numbers is None or column.number in numbers:
                column.wait()
        self._show()

        def run() -> None:
            try:
                for event in events:
                    if self._ear.put(event):
                        self.post_message(self._Heard())
            except GlmchatError as error:
                self.post_message(self._Over(error))
            else:
                self.post_message(self._Over())

        self.run_worker(run, thread=True, group="comparison")

    # Hearing

    def on_comparison_screen__heard(self) -> None:
        self._listen()

    def _listen(self) -> None:
        from glmchat.chat.compare.columns import AT_ONCE, OneByOne, Together
        from glmchat.chat.compare.compare import ColumnFailed, Loading, Said

        columns, has_news = self.columns, False
        for event in self._ear.take():
            has_news = has_news or not (isinstance(event, Said) and isinstance(event.event, Piece))
            match event:
                case OneByOne(reason):
                    self._news = tr("one after another: {why}", why=reason)
                case Together(1, _, 1):
                    self._news = tr("one engine answers them together")
                case Together(1):
                    self._news = tr("one engine answers them, {n} at a time", n=AT_ONCE)
                case Together(engines, threads):
                    self._news = tr("{n} engines answer at once, {threads} threads each", n=engines, threads=threads)
                case Loading(number, stage, done):
                    columns[number].load(stage_words(stage), done)
                case ColumnFailed(number, error):
                    columns[number].fail(error)
                case Said(number, said):
                    columns[number].hear(said)
        if has_news:  # pieces are drawn by their column
            self._show()

    def on_comparison_screen__over(self, over: _Over) -> None:
        self._listen()
        self._at_work = False
        for column in self.columns:
            if column.state == "":
                column.note(tr("stopped before its turn") if self._stopping else tr("no answer"))
        self._show()
        if over.error is not None:
            raise over.error

    def show_error(self, error: GlmchatError) -> None:
        self._news = f"{error.message} · {error.hint}"
        self._show()

    # Keys and mouse

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While a question is written, the keys are the prompt's."""
        if action in ("step", "pick", "go_on", "look"):
            return not self.asking
        return super().check_action(action, parameters)

    def action_leave(self) -> None:
        """Stop what runs; else leave."""
        if self._at_work:
            self._stopping = True
            self._news = tr("stopping")
            self._show()
            self.run_worker(self.comparison.stop, thread=True, group="stop")
        else:
            self.dismiss(None)

    def action_step(self, step: int) -> None:
        self.action_look((self._current + step) % len(self.columns))

    def action_look(self, number: int) -> None:
        if number < len(self.columns):
            self._current = number
            self._show()

    def action_pick(self) -> None:
        self._pick(self._current)

    def on_comparison_column_chosen(self, event: ComparisonColumn.Chosen) -> None:
        if not self.asking:
            self.action_look(event.number)
            if event.picked:
                self._pick(event.number)

    def on_click(self, event: events.Click) -> None:
        """Where one column is shown at a time, the row above names them all."""
        if event.widget is self.query_one("#tabs"):
            at = 0
            for column, text in zip(self.columns, self._tabs(), strict=True):
                if at <= event.x - 2 < at + text.cell_len:
                    self.action_look(column.number)
                at += text.cell_len

    def _pick(self, number: int) -> None:
        if self._at_work:
            self._news = tr("Esc stops the answers; then one can be picked")
        elif number not in self.comparison.answers():
            self._news = tr("this column has no answer")
        else:
            self.dismiss(number)
            return
        self._show()

    # Drawing

    def _show(self) -> None:
        p, columns = self.palette, self.columns
        for column in columns:
            column.set_class(column.number == self._current and not self.asking, "current")
            column.display = not self.has_class("one") or column.number == self._current
        question = self.comparison.question
        text = one_line(question.text if question else self._text, 400)
        self.query_one("#question", Static).update(Text(text or tr("comparison"), p.strong))
        self.query_one("#tabs", Static).update(Text("").join(self._tabs()))
        self.query_one("#prompt-box").display = self.asking
        if self.asking:
            self.query_one(Prompt).focus()
        elif columns[self._current].is_mounted:
            columns[self._current].transcript.focus()
        line = Text.assemble((f"{self._news} · " if self._news else "", p.accented))
        self.query_one("#keys", Static).update(line.append(self._keys(), p.quiet))

    def _keys(self) -> str:
        if self.asking:
            return tr("Enter asks them · Esc closes")
        if self._at_work:
            return tr("Esc stops · ← → between the answers")
        missing = tr("r asks the missing · ") if self.comparison.missing() else ""
        return missing + tr("← → choose · Enter continues with it · Esc closes, all are kept")

    def _tabs(self) -> list[Text]:
        p = self.palette
        marks = {"done": "✓", "answering": "…", "failed": "✗"}
        return [
            Text(
                f"{one_line(c.title, 24)} {marks.get(c.state, '·')}   ",
                p.accented if c.number == self._current else p.quiet,
            )
            for c in self.columns
        ]
