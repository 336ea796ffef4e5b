"""Rows of the models screen: what is on this machine, what the catalogue offers besides, and what fits the memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from glmchat.chat import launch
from glmchat.chat.jobs import run_job
from glmchat.checkpoints import fit
from glmchat.checkpoints.card_fit import card_memory, freest_card
from glmchat.checkpoints.recipe import usual_bytes
from glmchat.core.cards import Card
from glmchat.core.language import tr
from glmchat.core.machine import available_memory
from glmchat.core.servers import Server
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import catalogue
from glmchat.hub.catalogue import Entry
from glmchat.hub.installed import Installed
from glmchat.hub.plan import PullPlan
from glmchat.hub.removal import RemovalPlan
from glmchat.tui.theme import Palette

Fits = Literal["yes", "quantised", "no", "unknown"]
_NAME = 30  # cells
_QUANT = 13  # int4-g128+g64
_USUAL_NAME = 24  # chatglm-6b@f83182484538
_SHORT_NAME = 20
_ALL, _MOST = 85, 62  # cells that a row takes with all its columns, and without the quantisation


@dataclass(frozen=True, slots=True)
class Row:
    """installed: None for what can be pulled, and for a server. fits: into the memory that is free now."""

    name: str
    size: int
    quant: str
    languages: tuple[str, ...]
    fits: Fits
    installed: Installed | None = None
    server: Server | None = None

    def drawn(self, p: Palette, width: int, *, current: bool = False) -> Text:
        """In one line of so many cells: at least the name and whether it fits. ● marks the model in use."""
        if self.server is not None:
            return server_row(self.server, p)
        name = _NAME if width >= _ALL else _USUAL_NAME if width >= _MOST + _USUAL_NAME - _SHORT_NAME else _SHORT_NAME
        columns = [(human_bytes(self.size).rjust(9), _MOST), ("/".join(self.languages).ljust(5), _MOST)]
        columns.insert(1, (set_cell_size(self.quant if self.quant != "none" else "", _QUANT), _ALL))
        text = Text.assemble(("● " if current else "  ", p.accented))
        text.append(set_cell_size(_short(one_line(self.name), name), name) + "  ", p.strong if current else p.body)
        text.append("".join(f"{column}  " for column, needs in columns if width >= needs), p.quiet)
        return text.append(fits_words(self.fits), p.quiet if self.fits == "yes" else p.faded)


def server_row(server: Server, p: Palette) -> Text:
    """A server of the config in a list of models."""
    text = Text.assemble(("  ", p.body), (one_line(server.name, _NAME), p.body))
    return text.append(f"  {one_line(server.model or '', _NAME)}  {one_line(server.url)}", p.quiet)


def _short(name: str, cells: int) -> str:
    """The end of a long name, where a folder's path has its own name and its bits."""
    if cell_len(name) <= cells:
        return name
    while cell_len(name) >= cells:
        name = name[1:]
    return f"…{name}"


def fits_words(fits: Fits) -> str:
    match fits:
        case "yes":
            return tr("fits")
        case "quantised":
            return tr("fits with --quant 4")
        case "no":
            return tr("too large for the free memory")
        case _:
            return ""


def all_rows() -> list[Row]:
    """Models here first, then the catalogue's others."""
    free, card = available_memory(), freest_card()
    every = launch.pickable(incomplete=True)
    here = [row for row in every if row.complete]
    entries = catalogue.load()
    named = {entry.reference: entry for entry in entries}
    most = free if card is None or free is None else max(free, card.free)
    rows = []
    for row in here:
        entry = entries.of_repo(row.repo, row.revision) if row.repo and row.revision else named.get(row.name)
        languages = entry.languages if entry else ()
        rows.append(Row(row.name, row.size_bytes, row.quant, languages, _fits_here(row, free, card), row))
    names = {row.name for row in here}
    for row in every:  # a pull goes on with what is half here
        if not row.complete and row.kind == "model" and row.source == "hf" and row.name not in named:
            total = max(row.size_bytes, sum(file.size for file in row.files))
            rows.append(Row(row.name, total, row.quant, (), "unknown"))
    for entry in sorted(entries, key=_size):
        if entry.reference not in names:
            size = _size(entry)
            rows.append(Row(entry.reference, size, entry.quant, entry.languages, fits_before_pull(entry, most)))
    return rows


def _size(entry: Entry) -> int:
    return sum(file.size or 0 for file in entry.files)


def _fits_here(row: Installed, free: int | None, card: Card | None) -> Fits:
    on_card = card_memory(row.path) if card is not None else None
    if card is not None and on_card is not None and on_card.total <= card.free:
        return "yes"
    needed = fit.estimate(row.path)
    if needed is None or free is None:
        return "unknown"
    if needed.total <= free:
        return "yes"
    smaller = fit.estimate(row.path, 4)
    return "quantised" if smaller is not None and smaller.total < needed.total and smaller.total <= free else "no"


def fits_before_pull(entry: Entry, free: int | None) -> Fits:
    """From the size of the files alone: weights as they are, or as they usually are at four bits, and the program."""
    size = _size(entry)
    if not size or free is None:
        return "unknown"
    if size + fit.RUNTIME <= free:
        return "yes"
    if entry.quant == "none" and entry.parameters and usual_bytes(entry.parameters, 4) + fit.RUNTIME <= free:
        return "quantised"
    return "no"


@dataclass(frozen=True, slots=True)
class QuantisedPull:
    """A pull of which a quantised copy is made, as its job planned it. lines: for people."""

    name: str
    bits: int
    lines: tuple[str, ...]
    fits: bool


def plan_quantised(name: str, bits: int, cancelled: Callable[[], bool]) -> QuantisedPull:
    """Raises what the job raises: UnknownModel, NetworkFailed, Usage for a model that is quantised already …"""
    lines, fits = [tr("{name} is already here", name=one_line(name))], True
    for event in _job(name, bits, cancelled, dry_run=True):
        if event["event"] == "plan":
            lines, fits = event["words"], event["fits"]
    return QuantisedPull(name, bits, tuple(lines), fits)


def pull_quantised(
    plan: QuantisedPull, tell: Callable[[str, int, int | None], None], cancelled: Callable[[], bool]
) -> str:
    """Fetch and quantise; returns the name of the copy. tell(what, done, total): of what moves now, in bytes.

    Raises Interrupted where `cancelled`; the next pull goes on.
    """
    name = plan.name
    for event in _job(plan.name, plan.bits, cancelled, dry_run=False):
        if event["event"] == "meter":
            tell(event["label"], event["done"], event["total"])
        elif event["event"] == "result":
            name = event["name"]
    return name


def _job(
    name: str, bits: int, cancelled: Callable[[], bool], *, dry_run: bool
) -> Generator[dict[str, Any], None, None]:
    request = {"name": name, "bits": bits, "options": {}, "dry_run": dry_run}
    return run_job("pull_quantised", request, pulls=True, cancelled=cancelled)


def draw_plan(plan: PullPlan | QuantisedPull | RemovalPlan, p: Palette) -> Text:
    """What Enter would do."""
    match plan:
        case RemovalPlan():
            names, size = ", ".join(plan.names), human_bytes(plan.bytes_freed)
            lines = [tr("delete {names} and free {size}", names=names, size=size)]
            lines += [one_line(sentence, 200) for sentence in plan.keeps]
            fits = True
        case QuantisedPull():
            lines, fits = list(plan.lines), plan.fits
        case PullPlan():
            lines, fits = plan.lines(), plan.fits
    text = Text(lines[0], p.strong)
    for line in lines[1:]:
        text.append(f"\n{line}", p.quiet if fits else p.strong)
    return text
