"""The adapters: what is in the store, what fits the loaded model, which are in use and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from rich.cells import set_cell_size
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from glmchat.chat import adapters_choice, tuning
from glmchat.chat.adapters_choice import unfit
from glmchat.checkpoints.adapter_fit import Base, Misfit
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.run_folder import Run, runs
from glmchat.core.text import human_bytes, one_line, short_name
from glmchat.hub.adapters import facts_of, kind_words, list_adapters
from glmchat.tui.list_screen import ListScreen
from glmchat.tui.steady import Steady, error_text
from glmchat.tui.theme import Palette
from glmchat.tui.widgets.actions import KeyLine
from glmchat.tui.widgets.rows import Rows

if TYPE_CHECKING:
    from glmchat.chat.client.words import ModelRow
    from glmchat.chat.launch import LaunchOptions
    from glmchat.chat.session import ChatSession

STEP = 0.1  # of a weight
_NAME = 24  # cells


@dataclass(frozen=True, slots=True)
class Row:
    """One adapter, or one that is being learned. misfit: why it cannot be used with the loaded model."""

    name: str
    what: str = ""
    size: int | None = None
    base: str = ""
    misfit: Misfit | None = None
    forced: bool = False
    run: Run | None = None  # that still learns it: its last checkpoint can be used

    def drawn(self, p: Palette, weight: float | None) -> Text:
        """● marks one in use, with its weight unless that is 1."""
        ink = p.faded if self.misfit else p.strong if weight is not None else p.body
        text = Text.assemble(("● " if weight is not None else "  ", p.accented))
        text.append(set_cell_size(one_line(self.name, _NAME), _NAME) + " ", ink)
        text.append(f"{'' if weight in (None, 1) else f'×{weight:g}':<6}", p.style(p.user))
        if self.misfit:
            return text.append(self.misfit.reason, p.faded)
        if self.run is not None:
            return text.append(self.what, p.style(p.warning))
        size = human_bytes(self.size) if self.size is not None else ""
        text.append(f"{set_cell_size(self.what, 22)} {size:>9}  ", p.quiet)
        return text.append(tr("forced") if self.forced and weight is not None else one_line(self.base, 60), p.quiet)


class WeightLine(Steady, Static):
    """The weight of the highlighted adapter; a click on an arrow changes it."""

    def show(self, weight: float | None, p: Palette) -> None:
        text = Text()
        if weight is not None:
            text = Text.assemble((" ‹ ", p.style(p.user)), (f"{weight:^6g}", p.strong), (" › ", p.style(p.user)))
            text.append("  " + tr("weight, change with ← and →"), p.quiet)
        self.update(text)

    def on_click(self, event: events.Click) -> None:
        if isinstance(self.screen, AdapterScreen) and event.x < 12:
            self.screen.action_weigh(-1 if event.x < 3 else 1 if event.x >= 9 else 0)


class AdapterScreen(ListScreen[None]):
    """Changes hold from the next answer on, like those of the sampling panel; an answer that is written goes on.

    On a server the adapters are those it lists, and the server checks them.
    """

    LEAVING = ListScreen.LEAVING | {"f7"}

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f7,ctrl+q", "leave", show=False),
        Binding("space", "add", show=False, priority=True),
        Binding("left,minus", "weigh(-1)", show=False, priority=True),
        Binding("right,plus", "weigh(1)", show=False, priority=True),
        Binding("o", "off", show=False),
        Binding("f", "force", show=False),
    ]

    def __init__(
        self, session: ChatSession, launch: LaunchOptions, served: Callable[[], list[ModelRow]] | None = None
    ) -> None:
        """served: asks the server for its models and adapters; None for an engine of our own, which uses the store."""
        super().__init__()
        self._session = session
        self._launch = launch
        self._served = served
        self._rows: list[Row] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="wide"):
            yield Rows(id="adapters")
            yield WeightLine(id="weight")
            yield Static("", id="work")
            yield KeyLine()

    def on_mount(self) -> None:
        panel = self.query_one("#panel")
        model = short_name(self._session.identity.model or self._launch.engine.model or "")
        panel.border_title = tr("Adapters for {model}, starting with the next answer", model=model)
        self.query_one(OptionList).focus()
        self._draw()
        self._read()

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def _read(self) -> None:
        if self._served is None:
            self.read_list(lambda: store_rows(self._launch), self._list)
            line = tr("reading which adapters are here")
        else:
            served = self._served
            self.read_list(lambda: server_rows(served()), self._list)
            line = tr("asking the server")
        self._explain()
        self._say(line)

    def _list(self, rows: Sequence[Row]) -> None:
        used = dict(self._session.adapters)  # one that was forced is so for this conversation only
        rows = [replace(row, misfit=None) if row.forced and row.name in used else row for row in rows]
        names = {row.name for row in rows}
        lost = Misfit(tr("no longer in the store"), tr("press Space to remove it, or the next answer will be refused"))
        gone = [Row(name, misfit=lost) for name, _ in self._session.adapters if name not in names]
        self._rows = [*gone, *sorted(rows, key=lambda row: row.misfit is not None)]
        self._draw()
        options = self.query_one(OptionList)
        first = next((n for n, row in enumerate(self._rows) if row.name in used), None)
        options.highlighted = 0 if first is None else first + 1
        self._say("" if self._rows else tr("there are no adapters yet; `glmchat adapters add PATH` adds one"))

    def _draw(self) -> None:
        """The base model alone first, then every adapter; the highlight stays where it was."""
        options = self.query_one(OptionList)
        before, used, p = options.highlighted, dict(self._session.adapters), self.palette
        options.clear_options()
        alone = Text.assemble(("  " if used else "● ", p.accented), (tr("none: just the model"), p.body))
        options.add_option(Option(alone))
        options.add_options([Option(row.drawn(p, used.get(row.name))) for row in self._rows])
        if before is not None:
            options.highlighted = min(before, len(self._rows))
        self._explain()

    def _chosen(self) -> Row | None:
        """The highlighted adapter; None on the line for the model alone."""
        at = self.query_one(OptionList).highlighted
        return self._rows[at - 1] if at and at <= len(self._rows) else None

    def _say(self, text: str, hint: str = "") -> None:
        p = self.palette
        self.query_one("#work", Static).update(Text.assemble((text, p.body), ("\n" + hint if hint else "", p.quiet)))

    def show_error(self, error: GlmchatError) -> None:
        self.query_one("#work", Static).update(error_text(error, self.palette))

    def _explain(self) -> None:
        """What stands below the list, and what the keys do, for the highlighted line."""
        row = self._chosen()
        weight = dict(self._session.adapters).get(row.name) if row else None
        self.query_one(WeightLine).show(weight, self.palette)
        if row is not None and row.misfit is not None:
            self._say(f"{row.name}: {row.misfit.reason}", row.misfit.hint)
        else:
            self._say("")
        if row is not None and row.run is not None:
            self._say(tr("{name} is being trained; its last checkpoint can be used meanwhile", name=row.name))
        words = tr("Enter uses only this · Space adds or removes it · o none · Esc closes")
        if self.reading:
            words = tr("Esc closes")
        elif row is not None and row.run is not None:
            words = tr("Enter uses its last checkpoint · Esc closes")
        elif row is not None and row.misfit is not None:
            words = tr("f attaches it anyway · Esc closes") if row.misfit.forceable else tr("Esc closes")
        self.query_one(KeyLine).say(words)

    def on_option_list_option_highlighted(self) -> None:
        self._explain()

    def on_option_list_option_selected(self) -> None:
        """Enter or a click: only this one."""
        row = self._chosen()
        if row is None:
            self._use({})
        elif row.run is not None:
            self._take(row.run)
        elif row.misfit is None:
            self._use({row.name: dict(self._session.adapters).get(row.name, 1.0)})

    def action_add(self) -> None:
        """Beside the others, or away from them."""
        row, used = self._chosen(), dict(self._session.adapters)
        if row is None:
            self._use({})
        elif row.name in used:
            self._use({name: weight for name, weight in used.items() if name != row.name})
        elif row.run is not None:
            self._take(row.run)
        elif row.misfit is None:
            self._use({**used, row.name: 1.0})

    def action_weigh(self, step: int) -> None:
        row, used = self._chosen(), dict(self._session.adapters)
        if row is not None and row.name in used and step:
            self._use({**used, row.name: round(used[row.name] + step * STEP, 6)})

    def action_off(self) -> None:
        self._use({})

    def action_force(self) -> None:
        row = self._chosen()
        if row is None or row.misfit is None or not row.misfit.forceable:
            return
        self._use({row.name: 1.0}, force=True)
        self._read()

    def _use(self, chosen: dict[str, float], *, force: bool = False) -> None:
        adapters_choice.use(self._session, tuple(chosen.items()), self._launch, force=force)
        self._draw()

    def _take(self, run: Run) -> None:
        """The last checkpoint of a run becomes an adapter of the store, and that is used."""
        folder = self._launch.engine.folder

        def take() -> tuple[str, list[Row]]:
            return tuning.take_checkpoint(run, folder), store_rows(self._launch)

        def show(taken: tuple[str, list[Row]]) -> None:
            self._use({taken[0]: 1.0})
            self._list(taken[1])

        self.read_list(take, show)
        self._explain()
        self._say(tr("bringing the last checkpoint of {name} into the store", name=run.id))

    def action_leave(self) -> None:
        self.dismiss()


def store_rows(launch: LaunchOptions) -> list[Row]:
    """The store's adapters, each with why it does not fit the model of these options."""
    base = Base.of(launch.engine.folder) if launch.engine.folder is not None else None
    rows = []
    for adapter in list_adapters():
        facts = facts_of(adapter)
        why, is_forced = unfit(adapter, base), facts.get("forced") is True
        rows.append(Row(adapter.name, kind_words(facts), adapter.size_bytes, adapter.base or "", why, is_forced))
    return [*rows, *(_learning(run, launch.engine.folder) for run in runs() if run.at_work)]


def _learning(run: Run, folder: Path | None) -> Row:
    """A run at work, as a row among the adapters. What it learns for another model is none of this one's."""
    now, recipe = tuning.progress_of(run).now, run.recipe()
    what = tr("training: step {step} of {steps}", step=now.get("step", 0), steps=now.get("steps", "?"))
    other = None
    if folder is not None and folder != Path(str(recipe.get("folder", ""))):
        other = Misfit(tr("is being trained for {base}", base=short_name(str(recipe.get("base", "?")))), "")
    elif tuning.last_checkpoint(run) is None:
        other = Misfit(what, tr("wait for its first checkpoint"))
    return Row(str(recipe.get("name", run.id)), what, misfit=other, run=None if other else run)


def server_rows(models: Sequence[ModelRow]) -> list[Row]:
    """The adapters among what a server lists."""
    return [Row(one_line(row.name, 80)) for row in models if row.parent]
