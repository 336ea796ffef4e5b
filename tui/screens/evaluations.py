"""Evaluations: the list of all, and one of them: the question before it begins, its table, its rows, a row whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import Static
from textual.widgets.option_list import Option

from glmchat.chat import evaluating
from glmchat.chat.evaluating import Asked, Look, Watch
from glmchat.core.errors import GlmchatError
from glmchat.core.eval_folder import Evaluation, evaluations
from glmchat.core.language import tr
from glmchat.core.text import one_line, show_controls
from glmchat.tui.following import FollowingScreen
from glmchat.tui.list_screen import FoldersScreen
from glmchat.tui.steady import error_text
from glmchat.tui.theme import Palette
from glmchat.tui.widgets.actions import FEW_ROWS, first_keys
from glmchat.tui.widgets.rows import Rows
from glmchat.tui.widgets.sidebar import when

View = Literal["question", "table", "rows", "row"]
_POLL_SECONDS = 0.2
_SHOWN = 300  # characters of a question or an answer below the table; opened it is there whole
_MOST_ROWS = 500  # that are listed at each end


class EvaluationScreen(FollowingScreen[None]):
    """One evaluation: a question before it begins, then the table, the list of rows, and one row whole."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "leave", show=False, priority=True),
        Binding("ctrl+c", "stop", show=False, priority=True),
        Binding("enter", "agree", show=False, priority=True),
        Binding("r", "resume", show=False, priority=True),
        Binding("left", "step(-1)", show=False),
        Binding("right", "step(1)", show=False),
    ]

    def __init__(self, shown: Evaluation | Asked, begin: Callable[[Asked], None]) -> None:
        """shown: one on the disk, or one that this window asks for. begin: has one start its work."""
        super().__init__()
        self._begin = begin
        self.asked = shown if isinstance(shown, Asked) else None
        self._evaluation = shown if isinstance(shown, Evaluation) else None
        self._view: View = "question" if self.asked is not None and not self.asked.is_begun else "table"
        self._asks = False  # whether it is to be stopped
        self._watch: Watch | None = None
        self._look: Look | None = None
        self._at = 0  # the row that is open, as they are listed
        self._listed: list[Mapping[str, Any]] = []

    def compose(self) -> ComposeResult:
        yield Static("", id="run")
        with VerticalScroll(id="page"):
            yield Static("", id="words")
        yield Rows(id="answers")
        yield Static("", id="keys")

    def follow(self) -> None:
        if self._view == "question":
            return
        asked, evaluation = self.asked, self._evaluation

        def read() -> None:
            watch: Watch | None = None
            last: tuple[Any, ...] = ()
            while not self.left:
                found = evaluation or (asked.evaluation if asked is not None else None)
                is_over = asked is None or asked.is_over  # asked first: what it wrote before is read below
                if watch is None and found is not None:
                    watch = Watch(found)
                look = watch.look() if watch is not None else None
                now = (look, asked and asked.stage, is_over)
                if now != last:
                    self.told(partial(self._hear, watch, look))
                last = now
                if is_over and (look is None or look.state != "running"):
                    return
                time.sleep(_POLL_SECONDS)

        self.read_along(read)

    def _hear(self, watch: Watch | None, look: Look | None) -> None:
        if watch is not None:
            self._watch, self._look = watch, look
        if not self._is_running:
            self._asks = False

    @property
    def _problem(self) -> GlmchatError | None:
        """What ended it instead of a table."""
        if self._is_running or (self._look is not None and self._look.table is not None):
            return None
        ours = self.asked.problem if self.asked is not None else None
        return ours or (self._look.problem if self._look is not None else None)

    @property
    def _is_running(self) -> bool:
        if self.asked is not None:
            return self.asked.is_begun and not self.asked.is_over
        return self._look is not None and self._look.state == "running"

    # Keys

    def action_leave(self) -> None:
        """One step back: from a row to the list, from there to the table, from there to the chat."""
        if self._asks:
            self._asks = False
        elif self._view == "row":
            self._view = "rows"
        elif self._view == "rows":
            self._view = "table"
        else:
            self.dismiss(None)
            return
        self.draw()

    def action_stop(self) -> None:
        """Asked first, of one that was begun here; what is answered is kept."""
        if not self._is_running or self.asked is None:
            self.dismiss(None)
            return
        if self._asks:
            self.asked.stop()
        self._asks = not self._asks
        self.draw()

    def action_agree(self) -> None:
        if self._asks:
            self.action_stop()
            return
        if self._view == "question":
            assert self.asked is not None
            self._view = "table"
            self._begin(self.asked)
            self.follow()
        elif self._view == "rows":
            self._open_row()
        elif self._view == "table" and self._watch is not None and self._watch.rows:
            self._view = "rows"
            self._list()
        self.draw()

    def on_option_list_option_selected(self) -> None:
        """By the mouse."""
        self._open_row()
        self.draw()

    def _open_row(self) -> None:
        if (at := self.query_one(Rows).highlighted) is not None and at < len(self._listed):
            self._at, self._view = at, "row"
            self.query_one("#page").scroll_home(animate=False)

    def action_step(self, by: int) -> None:
        """To the row before or behind the one that is open."""
        if self._view == "row" and 0 <= self._at + by < len(self._listed):
            self._at += by
            self.query_one(Rows).highlighted = self._at
            self.query_one("#page").scroll_home(animate=False)
            self.draw()

    def action_resume(self) -> None:
        """Go on with one that was interrupted, or whose engine failed."""
        look, watch = self._look, self._watch
        if watch is None or look is None or self._is_running or look.state in ("running", "done"):
            return
        self.asked, self._evaluation, self.news, self._view = Asked(watch.evaluation.request()), None, None, "table"
        self._begin(self.asked)
        self.follow()
        self.draw()

    # Drawing

    def _list(self) -> None:
        """The rows in their order; of many those at both ends."""
        assert self._watch is not None
        rows = evaluating.ordered(self._watch.rows)
        self._listed = rows if len(rows) <= 2 * _MOST_ROWS else [*rows[:_MOST_ROWS], *rows[-_MOST_ROWS:]]
        options, p = self.query_one(Rows), self.palette
        options.clear_options()
        for row in self._listed:
            worth = [evaluating.value_of(row, number) for number in range(len(self._watch.answers))]
            scores = " ".join("" if value is None else f"{value:6.2f}" for value in worth)
            line = Text(f"{row['number']:>5} ", p.faded).append(f"{scores}  " if scores.strip() else "", p.quiet)
            options.add_option(Option(line.append(one_line(str(row.get("asked") or row.get("place")), 200), p.body)))
        options.highlighted = min(self._at, len(self._listed) - 1)

    def draw(self) -> None:
        if not self.is_mounted:
            return
        p, rows, page = self.palette, self.query_one(Rows), self.query_one("#page")
        is_list, is_low = self._view == "rows", self.size.height < FEW_ROWS
        rows.display, page.display = is_list, not is_list
        (rows if is_list else page).focus()
        title = Text(self._heading(), p.strong)
        self.query_one("#run", Static).update(title.append(" · ", p.quiet).append(self._state(), p.accented))
        if not is_list:
            self.query_one("#words", Static).update(self._row_text() if self._view == "row" else self._page())
        keys = first_keys(self._keys(), self.size.width - 4) if is_low else self._keys()
        news = [self.news] if self.news is not None else []
        self.query_one("#keys", Static).update(Text("\n").join([*news, Text(keys, p.quiet)]))

    def _heading(self) -> str:
        if self._watch is not None:
            return one_line(self._watch.evaluation.id, 60)
        if self._evaluation is not None:
            return one_line(self._evaluation.id, 60)
        assert self.asked is not None
        return one_line(Path(self.asked.request["data"][0]).name, 60)

    def _state(self) -> str:
        if self._view == "question":
            return tr("waits for a yes")
        if self._view == "row" and self._watch is not None:
            return f"{self._at + 1}/{len(self._listed)}"
        look = self._look
        if self._is_running:
            done = "" if look is None else f" {sum(look.counts)}/{look.of * len(look.counts)}"
            return evaluating.state_words("running") + done
        return evaluating.state_words("failed" if look is None else look.state)

    def _page(self) -> Text:
        p, look, width = self.palette, self._look, max(20, self.size.width - 6)
        if self._view == "question":
            assert self.asked is not None
            return self._question(self.asked.request)
        if look is not None and look.table is not None:
            return table_text(look.table, width, p)
        lines = []
        if look is not None and self._watch is not None:
            lines.append(Text(one_line(", ".join(self._watch.evaluation.data), 400), p.quiet))
            for number, (name, count) in enumerate(
                zip(self._watch.evaluation.candidates, look.counts, strict=False), 1
            ):
                line = Text(f"{number:>2}  {one_line(name, 120)}  ", p.body)
                lines.append(line.append(f"{count}/{look.of}", p.accented))
        if self._is_running and self.asked is not None:
            lines.append(Text(self.asked.stage, p.quiet))
        if (problem := self._problem) is not None:
            lines += [Text(""), error_text(problem, p)] if lines else [error_text(problem, p)]
        return Text("\n").join(lines)

    def _question(self, request: Mapping[str, Any]) -> Text:
        """What is to be begun."""
        p = self.palette
        lines = [Text(one_line(", ".join(request["data"]), 400), p.quiet)]
        for number, one in enumerate(request["candidates"], 1):
            line = Text(f"{number:>2}  {one_line(one['text'], 120)}", p.body)
            lines.append(line.append(f"  ({evaluating.how(one['sampling'])})", p.quiet))
        lines.append(Text(tr("Each answers all rows. It goes on while you chat, and ends with this window; its answers "
                             "are kept."), p.body))  # fmt: skip
        return Text("\n").join(lines)

    def _row_text(self) -> Text:
        assert self._watch is not None
        row = self._listed[self._at]
        answers = [mine.get(row["number"]) for mine in self._watch.answers]
        return row_text(row, self._watch.evaluation.candidates, answers, self.palette)

    def _keys(self) -> str:
        if self._asks:
            return tr("Enter stops it; its answers are kept · Esc goes on")
        if self._view == "question":
            return tr("Enter starts it · Esc leaves nothing")
        if self._view == "row":
            return tr("← → the row before, the next one · Esc back to the rows")
        if self._view == "rows":
            return tr("Enter opens a row · Esc back to the table")
        keys = [tr("Enter shows the rows")] if self._watch is not None and self._watch.rows else []
        if self._is_running:
            keys.append(tr("Esc leaves it at work"))
            keys += [tr("Ctrl+C stops")] if self.asked is not None else []
        elif self._look is not None and self._look.state != "done":
            keys += [tr("r goes on with it"), tr("Esc closes")]
        else:
            keys.append(tr("Esc closes"))
        return " · ".join(keys)


class EvaluationsScreen(FoldersScreen[Evaluation]):
    def head(self) -> str:
        return tr("Evaluations")

    def none(self) -> str:
        return tr("there are no evaluations yet; /eval FILE begins one")

    def question(self, folder: Evaluation) -> str:
        return tr("delete the table of {name}? Its answers are kept for others.", name=folder.id)

    def rows(self) -> list[tuple[Evaluation, Text]]:
        rows, p = [], self.palette
        for one in evaluations():
            look = Watch(one).look()
            text = Text(set_cell_size(one_line(one.id, 24), 24) + " ", p.body)
            words = set_cell_size(evaluating.state_words(look.state), 12)
            text.append(words, p.accented if look.state == "running" else p.quiet)
            facts = [f"{sum(look.counts)}/{look.of * len(look.counts)}"] if look.state != "done" else []
            facts += [one_line(" ".join(one.candidates), 60), when(one.created, time.time())]
            rows.append((one, text.append(" · ".join(facts), p.quiet)))
        return rows


def table_text(table: Mapping[str, Any], width: int, p: Palette) -> Text:
    """Candidates, their values, each one's differences to the first, and the rows at both ends. width: in cells."""
    candidates = table["candidates"]
    lines = []
    for number in range(len(candidates)):
        name, how = evaluating.named(table, number)
        lines.append(Text(f"{number + 1:>2}  {name}", p.body).append(how, p.quiet))
    lines += [
        Text(""),
        Text(tr("{rows:,} rows of {data}", rows=table["rows"], data=_file_name(table["data"])), p.quiet),
    ]
    heads = [str(number) for number in range(1, len(candidates) + 1)]
    lines += _columns((tr("measure"), *heads), evaluating.value_cells(table), width, p)
    for number in range(1, len(candidates)):
        head = (f"{number + 1} − 1", tr("difference"), tr("95 % interval"), "")
        lines += [Text(""), *_columns(head, evaluating.difference_cells(table, number), width, p)]
        if note := evaluating.difference_note(table, number):
            lines.append(Text(note, p.quiet))
    for side, title in evaluating.sides(len(candidates)).items():
        for row in table["shown"][side]:
            lines += [Text(""), Text(f"{title}: ", p.strong).append(_file_name(row["place"]), p.quiet)]
            lines += _said(row["asked"], row["answers"], _SHOWN, p)
    return Text("\n").join(lines)


def row_text(
    row: Mapping[str, Any], candidates: Sequence[str], answers: Sequence[Mapping[str, Any] | None], p: Palette
) -> Text:
    """A row whole: its place, the question, what is expected, and what each candidate wrote."""
    lines = [Text(one_line(str(row.get("place")), 400), p.quiet)]
    if row.get("asked"):
        lines += [Text(tr("question"), p.strong), Text(show_controls(str(row["asked"])), p.body)]
    first = next((answer for answer in answers if answer is not None), None)
    for sign, words in evaluating.wanted(first) if first is not None else ():
        head = tr("expected") if sign == "=" else tr("the worse answer")
        lines += [Text(head, p.strong), Text(show_controls(words), p.body)]
    for number, (name, answer) in enumerate(zip(candidates, answers, strict=True)):
        title = Text(f"{number + 1}  {one_line(name, 120)}", p.style(p.user))
        if (value := evaluating.value_of(row, number)) is not None and answer and answer.get("predict") is not None:
            title.append(f"  ROUGE-L {value:.2f}", p.quiet)
        lines += [
            title,
            Text(tr("(no answer yet)") if answer is None else show_controls(evaluating.said(answer)), p.body),
        ]
    return Text("\n").join(lines)


def _file_name(place: str) -> str:
    """Without its folders, which the row whole shows."""
    return one_line(Path(place).name, 120)


def _said(asked: str, answers: Sequence[Mapping[str, Any]], most: int, p: Palette) -> list[Text]:
    """A question and its answers, a line each."""
    lines = [Text("  ?   ", p.quiet).append(one_line(asked, most), p.body)]
    for sign, text in evaluating.wanted(answers[0]):
        lines.append(Text(f"  {sign}   ", p.quiet).append(one_line(text, most), p.body))
    for number, answer in enumerate(answers, 1):
        lines.append(Text(f"  {number}   ", p.quiet).append(one_line(evaluating.said(answer), most), p.body))
    return lines


def _columns(heads: Sequence[str], rows: Sequence[Sequence[str]], width: int, p: Palette) -> list[Text]:
    """A table; where it is wider than there is room, a line for the name of each row and one for its cells."""
    every = [heads, *rows]
    widths = [max(cell_len(line[at]) for line in every) for at in range(len(heads))]
    is_narrow = sum(widths) + 2 * (len(widths) - 1) > width
    lines = []
    for number, line in enumerate(every):
        style = p.quiet if number == 0 else p.body
        cells = [" " * (widths[at] - cell_len(cell)) + cell for at, cell in enumerate(line)]
        name = line[0] + " " * (widths[0] - cell_len(line[0]))
        last = line[-1] if len(heads) == 4 and heads[-1] == "" else cells[-1]  # a note stands at the left
        if is_narrow:
            lines.append(Text(line[0], p.quiet))
            lines.append(Text("  " + "  ".join([cell for cell in line[1:] if cell]), style))
        else:
            lines.append(Text("  ".join([name, *cells[1:-1], last]).rstrip(), style))
    return lines
