"""Runs of tuning: the list of all, and one of them while it learns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from glmchat.chat import tuning, tuning_words
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, runs
from glmchat.core.run_log import Points, Progress, draw
from glmchat.core.text import one_line, short_name
from glmchat.tui.following import FollowingScreen
from glmchat.tui.list_screen import FoldersScreen
from glmchat.tui.steady import Steady, error_text
from glmchat.tui.theme import PALETTES, Palette
from glmchat.tui.widgets.actions import FEW_ROWS, first_keys
from glmchat.tui.widgets.sidebar import when

_GAP = "   "  # between two figures
_SCALE = 7  # cells of the numbers at the left of a curve


class Curve(Steady, Widget):
    """Draws what `show` was given last into the room it has; where that is small the numbers at its sides go."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.palette: Palette = PALETTES["dark"]
        self._lines: list[tuple[str, Points]] = []
        self._evaluations: Points = []

    def show(self, lines: Sequence[tuple[str, Points]], evaluations: Points, palette: Palette) -> None:
        """lines: one or two, with what they are called."""
        self.palette = palette
        self._lines, self._evaluations = [(name, list(points)) for name, points in lines], list(evaluations)
        self.refresh()

    def render(self) -> Text:
        p, width, height = self.palette, self.size.width, self.size.height
        if not any(points for _, points in self._lines) and not self._evaluations:
            return Text(tr("nothing was trained yet"), p.quiet)
        scale = _SCALE if width > 5 * _SCALE else 0
        has_foot = height > 4
        rows = max(1, height - has_foot)
        low, high, cells = draw([points for _, points in self._lines], self._evaluations, max(1, width - scale), rows)
        lines = []
        for number, row in enumerate(cells):
            label = f"{high:.3f}" if number == 0 else f"{low:.3f}" if number == rows - 1 and rows > 1 else ""
            line = Text(f"{label:>{scale - 1}} " if scale else "", p.faded)
            for sign, whose in row:
                line.append(sign, p.style(p.user) if whose else p.style(p.accent))
            lines.append(line)
        if has_foot:
            lines.append(self._foot(scale, width))
        return Text("\n").join(lines)

    def _foot(self, scale: int, width: int) -> Text:
        """What the colours mean, and how far the steps go."""
        p = self.palette
        line = Text(" " * scale)
        for number, (name, _) in enumerate(self._lines):
            line.append("  " * bool(number)).append("⠤ ", p.style(p.user if number else p.accent)).append(name, p.quiet)
        if self._evaluations:
            line.append("  ● ", p.style(p.user)).append(tr("held-out loss"), p.quiet)
        last = (
            f"{tr('step')} {max(x for points in (*(p for _, p in self._lines), self._evaluations) for x, _ in points)}"
        )
        space = width - line.cell_len - cell_len(last) - 1
        return line.append(" " * space).append(last, p.faded) if space > 1 else line


def _in_lines(parts: Sequence[Text], cells: int) -> Text:
    """Side by side, and none broken: Textual breaks lines at no-break spaces too."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + len(_GAP) + part.cell_len <= cells:
            lines[-1].append(_GAP).append_text(part)
        else:
            lines.append(part.copy())
    return Text("\n").join(lines)


class RunScreen(FollowingScreen[str | None]):
    """One run. Returns the adapter that it became where a person wants to use it; else None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,t,q", "leave", show=False, priority=True),
        Binding("ctrl+c", "stop", show=False, priority=True),
        Binding("enter", "agree", show=False, priority=True),
        Binding("r", "resume", show=False, priority=True),
        Binding("p", "page", show=False, priority=True),
    ]

    def __init__(self, run: Run, begun: tuning.Begun | None = None) -> None:
        """begun: it is still a plan, which Enter agrees to and Esc takes back."""
        super().__init__()
        self.run_shown = run
        self._base = short_name(str(run.recipe().get("base", "")))  # of a plan that failed the folder goes
        self._begun = begun
        self.progress = Progress()
        self._asks = False  # whether it is to be stopped
        self._stops = 0  # how often that was said
        self._shows_page = begun is not None

    def compose(self) -> ComposeResult:
        yield Static("", id="run")
        yield Curve(id="curve")
        yield Curve(id="rewards")
        with VerticalScroll(id="page"):
            yield Static("", id="plan")
        yield Static("", id="sums")
        yield Static("", id="figures")
        yield Static("", id="said")
        yield Static("", id="keys")

    def follow(self) -> None:
        run, begun = self.run_shown, self._begun

        def hear(record: tuning_words.Record) -> None:
            self.told(partial(self._hear, [dict(record)]))

        def read() -> None:
            try:
                if begun is not None:
                    begun.page(lambda: self.left, hear)
            except GlmchatError as error:
                end = {"kind": "end", "state": "failed", **error.to_json()}
                self.told(partial(self._hear, [end]))
                return
            for records in tuning.follow(run, leave=lambda: self.left):
                if records:
                    self.told(partial(self._hear, records))

        self.read_along(read)

    def _hear(self, records: list[dict[str, Any]]) -> None:
        self.progress.add(records)
        if self.progress.end is not None:
            self._asks = False

    # Keys

    def action_leave(self) -> None:
        """Esc takes the question back, or the page away; else the run is left to itself."""
        if self._begun is not None:
            self.left = True
            if self.progress.page and self.progress.end is None:
                self.run_worker(self._begun.give_up, thread=True, group="stop", exit_on_error=False)
            self._leave(None)
        elif self._asks or self._shows_page:
            self._asks = self._shows_page = False
            self.draw()
        else:
            self._leave(None)

    def _leave(self, adapter: str | None) -> None:
        if len(self.app.screen_stack) > 1:
            self.dismiss(adapter)
        else:
            self.app.exit(0)

    def action_stop(self) -> None:
        """Asked first; then it saves and stops; the third time it stops at once."""
        if self._begun is not None:
            self.action_leave()
            return
        if self.progress.end is not None:
            self._leave(None)
        elif self._asks or self._stops:
            self._asks = False
            self._stops += 1
            tuning.stop(self.run_shown)
        else:
            self._asks = True
        self.draw()

    def action_agree(self) -> None:
        if self._begun is not None and self.progress.page and self.progress.end is None:
            self._begun.go()
            self._begun, self._shows_page = None, False
            self.draw()
        elif self._asks:
            self.action_stop()
        elif self.progress.end is not None:
            self._leave(self.progress.end.get("adapter"))

    def action_resume(self) -> None:
        if self._begun is None and self.progress.end is not None and self.progress.end.get("state") != "done":
            tuning.resume(self.run_shown)
            self.progress.end, self._stops, self.news = None, 0, None
            self.progress = Progress()
            self.follow()
            self.draw()

    def action_page(self) -> None:
        """The plan that was shown before it began."""
        self._shows_page = self._begun is not None or not self._shows_page
        self.draw()

    # Drawing

    def draw(self) -> None:
        if not self.is_mounted:
            return
        p, end, is_low = self.palette, self.progress.end, self.size.height < FEW_ROWS
        title = Text(one_line(self.run_shown.id, 60), p.strong)
        title.append(f" · {self._base} · ", p.quiet)
        title.append(self._state(), p.accented)
        self.query_one("#run", Static).update(title)
        self._show_curves(is_low)
        said = self.query_one("#said", Static)
        said.display = not self._shows_page
        said.update(self._said(1 if is_low else 3))
        self._show_page(is_low)
        known = tuning_words.figures(self.progress.now)
        figures = [Text.assemble((f"{n} ", p.quiet), (value, p.body)) for n, value in known]
        shown = self.query_one("#figures", Static)
        shown.display = bool(figures)
        shown.update(_in_lines(figures, self.size.width - 4))
        keys = self._keys()
        line = first_keys(keys, self.size.width - 4) if is_low else keys
        news = self.news if self.news is not None else self._end_line(end)
        self.query_one("#keys", Static).update(Text("\n").join([*([news] if news else []), Text(line, p.quiet)]))

    def _show_page(self, is_low: bool) -> None:
        """The plan, to be read with arrows and PgDn; its sums stay below it where there is room."""
        page, sums = self.query_one("#page", VerticalScroll), self.query_one("#sums", Static)
        page.display = sums.display = self._shows_page
        if not self._shows_page:
            return
        page.focus()
        lines = [one_line(str(line), 400) for line in self.progress.page.get("words", ())]
        count = 0 if is_low else int(self.progress.page.get("sums", 0))
        above = lines[: len(lines) - count]
        none = "" if self.progress.end is not None else self.progress.stage or tr("it has no plan yet")
        self.query_one("#plan", Static).update(Text("\n".join(above).rstrip() or none, self.palette.body))
        sums.update(Text("\n".join(lines[len(above) :]), self.palette.strong))

    def _show_curves(self, is_low: bool) -> None:
        """The loss, and of pairs of answers the rewards of both below it, where there is room for two."""
        known = self.progress
        curve, rewards = self.query_one("#curve", Curve), self.query_one("#rewards", Curve)
        curve.display = not self._shows_page
        rewards.display = not self._shows_page and bool(known.better) and not is_low
        curve.show([(tr("loss"), known.losses)], known.evaluations, self.palette)
        rewards.show(
            [(tr("reward of the better answer"), known.better), (tr("of the worse"), known.worse)], [], self.palette
        )

    def _state(self) -> str:
        if (end := self.progress.end) is not None:
            return tuning_words.state_words(end.get("state", "dead"))
        if self._stops:
            return tuning_words.state_words("stopping")
        return tuning_words.state_words("running" if self.progress.now else self.run_shown.state())

    def _said(self, most: int) -> Text:
        """The last answers to the questions of --sample."""
        p, text = self.palette, Text()
        for sample in self.progress.samples[-most:]:
            text.append("\n" if text else "")
            text.append(f"{one_line(str(sample.get('question')), 60)} ", p.style(p.user))
            text.append(one_line(str(sample.get("answer")), 400), p.body)
            if not sample.get("stopped", True):
                text.append(f" ({tr('did not stop by itself')})", p.quiet)
        return text

    def _end_line(self, end: Any) -> Text | None:
        if end is None:
            return (
                Text(self.progress.stage, self.palette.accented) if self.progress.stage and self.progress.now else None
            )
        if end.get("message"):
            return error_text(tuning.error_of(end), self.palette)
        lines = tuning_words.end_lines(end)
        return Text(lines[0], self.palette.accented) if "adapter" in end or "model" in end else None

    def _keys(self) -> str:
        if self._begun is not None:
            asks = self.progress.page and self.progress.end is None
            begins = tr("Enter starts training · Esc leaves nothing · PgDn shows more of the plan")
            return begins if asks else tr("Esc closes")
        if self._asks:
            return tr("Enter saves and stops · Esc goes on")
        if self._shows_page:
            return tr("p shows the curve · Esc closes")
        if (end := self.progress.end) is None:
            again = tr("Ctrl+C stops at once") if self._stops else tr("Ctrl+C stops")
            return f"{tr('Esc leaves it running')} · {tr('p shows the plan')} · {again}"
        if end.get("state") == "done":
            uses = tr("Enter uses the adapter · ") if len(self.app.screen_stack) > 1 and "adapter" in end else ""
            return uses + tr("p shows the plan") + " · " + tr("Esc closes")
        return f"{tr('r goes on from the last checkpoint')} · {tr('p shows the plan')} · {tr('Esc closes')}"


class RunsScreen(FoldersScreen[Run]):
    def head(self) -> str:
        return tr("Runs of tuning")

    def none(self) -> str:
        return tr("there are no runs yet; `glmchat tune BASE DATA` starts one")

    def question(self, folder: Run) -> str:
        return tr("delete {name} with its checkpoints? The adapter in the store stays.", name=folder.id)

    def rows(self) -> list[tuple[Run, Text]]:
        rows, p = [], self.palette
        for run in runs():
            progress = tuning.progress_of(run)
            step, steps = progress.now.get("step"), progress.now.get("steps")
            text = Text(set_cell_size(one_line(run.id, 24), 24) + " ", p.body)
            text.append(set_cell_size(tuning_words.run_words(run), 12), p.accented if run.at_work else p.quiet)
            facts = [short_name(str(run.recipe().get("base", ""))), when(run.created, time.time())]
            facts += [f"{step}/{steps}"] if step else []
            facts += [f"{tr('loss')} {progress.losses[-1][1]:.3f}"] if progress.losses else []
            rows.append((run, text.append(" · ".join(facts), p.quiet)))
        return rows
