"""What the models screen asks before it acts, in the plans' own words; and the pull that a job carries out."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from glmchat.chat.jobs import run_job
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub.plan import PullPlan
from glmchat.hub.removal import RemovalPlan
from glmchat.tui.theme import Palette


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
            lines += [one_line(kept, 200) for kept in plan.keeps]
            fits = True
        case QuantisedPull():
            lines, fits = list(plan.lines), plan.fits
        case PullPlan():
            lines, fits = plan.lines(), plan.fits
    text = Text(lines[0], p.strong)
    for line in lines[1:]:
        text.append(f"\n{line}", p.quiet if fits else p.strong)
    return text
