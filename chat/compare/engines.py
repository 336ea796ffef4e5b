"""Which engines a comparison needs, and whether they may answer at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmchat.chat.connect import Connection
from glmchat.chat.launch import LaunchOptions
from glmchat.checkpoints.fit import estimate
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, physical_cores
from glmchat.core.text import human_bytes


@dataclass(frozen=True, slots=True)
class Together:
    """All engines answer at the same time; threads: of each that is started, None if there is only one engine."""

    engines: int
    threads: int | None


@dataclass(frozen=True, slots=True)
class OneByOne:
    """The engines take turns, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Running:
    """An engine that is there already. release: ends it, so that its memory is free; called once, from any thread."""

    launch: LaunchOptions
    connection: Connection
    release: Callable[[], None]

    def answers(self, launch: LaunchOptions) -> bool:
        return engine_key(launch) == engine_key(self.launch)


def engine_key(launch: LaunchOptions) -> tuple[Path | None, int | None]:
    """Equal for columns that one engine can answer: adapters and settings are changed between two answers."""
    if launch.engine.copy is not None and launch.engine.quant is not None:
        return Path(launch.engine.copy["out"]), None  # quantised as it was loaded, and kept there
    return launch.engine.folder, launch.engine.quant


def group(launches: Sequence[LaunchOptions], columns: Sequence[int], running: Running | None) -> list[list[int]]:
    """Columns by engine: the one that runs already first, the others in the order of their first column."""
    groups: dict[tuple[Path | None, int | None], list[int]] = {}
    for index in columns:
        groups.setdefault(engine_key(launches[index]), []).append(index)
    return sorted(groups.values(), key=lambda g: running is None or not running.answers(launches[g[0]]))


def needed(launch: LaunchOptions) -> int | None:
    """Bytes that loading it takes; None where its files say too little."""
    engine = launch.engine
    size = None if engine.folder is None else estimate(engine.folder, engine.quant, engine.dtype, engine.context)
    return size.total if size is not None else None


def decide(engines: Sequence[LaunchOptions], running: Running | None) -> Together | OneByOne:
    """engines: one launch of each. Together where cores and the memory that is free now allow it."""
    count, cores = len(engines), physical_cores()
    if count < 2:
        return Together(count, None)
    if cores < 2 * count and cores < 4:
        return OneByOne(tr("{cores} cores are too few for {count} engines at once", cores=cores, count=count))
    sizes = [needed(one) for one in engines if running is None or not running.answers(one)]
    bytes_needed = [size for size in sizes if size is not None]
    if len(bytes_needed) < len(sizes):
        return OneByOne(tr("the memory they need is not known"))
    free = available_memory()
    if free is not None and sum(bytes_needed) > free:
        total = human_bytes(sum(bytes_needed))
        return OneByOne(
            tr("together they need {needed} of memory, but only {free} are free", needed=total, free=human_bytes(free))
        )
    return Together(count, max(1, cores // count))
