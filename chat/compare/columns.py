"""What is compared: NAME[:int4][+ADAPTER[:WEIGHT]]…[,SETTING=VALUE]…, for example `chatglm3-6b:int4+poet:0.5,temp=0.2`.

An empty NAME means the model of the column before: `smollm2 +poet ,temp=0` are three columns of one model. Columns of
one model share an engine, which answers them together, each with its adapters; whether several engines may answer at
the same time is a question of cores and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from glmchat.chat.adapters_choice import parse_adapter, require_fit, require_known
from glmchat.chat.connect import Connection
from glmchat.chat.launch import LaunchOptions, launch_installed, locate
from glmchat.checkpoints.card_fit import demand
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.machine import physical_cores
from glmchat.core.messages import Sampling, parse_sampling_value, sampling_name
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import adapters, lookup
from glmchat.hub.references import is_there


@dataclass(frozen=True, slots=True)
class Column:
    """One way to answer. name: a reference to a model; sampling: only what the column sets."""

    text: str
    name: str
    adapters: tuple[tuple[str, float], ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict)


def parse_columns(texts: Sequence[str]) -> list[Column]:
    """Raises Usage for a setting that does not exist, an adapter without a name or with a weight that is none, or a
    first column without a name."""
    columns: list[Column] = []
    for text in texts:
        rest, settings = _settings(text)
        parts = [rest] if is_there(rest) else rest.split("+")
        name = parts[0] or (columns[-1].name if columns else "")
        if not name:
            raise Usage(
                tr("{text} does not name a model", text=repr(one_line(text, 60))),
                hint=tr("NAME[:int4][+ADAPTER[:WEIGHT]][,SETTING=VALUE]"),
                code="compare.column",
            )
        Sampling(**settings)  # the ranges, before anything is loaded
        columns.append(Column(text, name, tuple(parse_adapter(part) for part in parts[1:]), settings))
    return columns


def beside(model: str | None, adapters: Sequence[tuple[str, float]], texts: Sequence[str]) -> list[Column]:
    """Columns in a conversation: one alone stands beside the model that answers there; that is also the empty NAME.

    The texts of the result stand for themselves, so that they can be stored. Raises Usage.
    """
    texts = [_text(model, adapters), *texts] if len(texts) == 1 else list(texts)
    if texts and model and texts[0][:1] in ("", "+", ","):
        texts[0] = model + texts[0]
    return parse_columns(texts)


def versions(
    model: str | None, adapters: Sequence[tuple[str, float]], count: int, pairs: Sequence[str], seed: int | None
) -> list[Column]:
    """`count` columns of what answers in a conversation, with settings NAME=VALUE. A seed goes up by one from each to
    the next, as equal ones would give equal answers. Raises Usage."""
    same = ",".join([_text(model, adapters), *pairs])
    seeds = [""] * count if seed is None else [f",seed={(seed + i) % 2**63}" for i in range(count)]
    return parse_columns([same + own for own in seeds])


def _text(model: str | None, adapters: Sequence[tuple[str, float]]) -> str:
    return (model or "") + "".join(f"+{name}:{scale:g}" for name, scale in adapters)


def launches(columns: Sequence[Column], base: LaunchOptions) -> list[LaunchOptions]:
    """What each column loads. base: what all have in common.

    Raises UnknownModel for a model or an adapter, NotInstalled, Usage for an adapter that is not for the model.
    """
    options = []
    for column in columns:
        require_known(column.adapters)
        row, bits = locate(column.name)
        launch = launch_installed(base, row, bits)
        forced = [name for name, _ in column.adapters if adapters.is_forced(name)]  # their answers say so
        require_fit(column.adapters, launch.engine.folder, forced=forced)
        sampling = {**base.sampling, **column.sampling}
        options.append(replace(launch, adapters=column.adapters, sampling=sampling))
    return options


@dataclass(frozen=True, slots=True)
class StoreNames:
    """What a column may name."""

    models: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()


def store_names() -> StoreNames:
    """Looks through the whole store. Raises a GlmchatError for a catalogue that cannot be read."""
    rows = lookup.list_installed()
    names = tuple(row.name for row in rows if row.kind != "adapter")
    return StoreNames(names, tuple(row.name for row in adapters.list_adapters()))


def completions(word: str, names: StoreNames) -> list[str]:
    """What an unfinished column may become: names of models, behind `+` of adapters, behind a comma of settings."""
    rest, comma, setting = word.rpartition(",")
    if comma:
        return [f"{rest},{f.name}=" for f in fields(Sampling) if f.name.startswith(setting)]
    rest, plus, name = word.rpartition("+")
    if plus:
        return [f"{rest}+{adapter}" for adapter in names.adapters if adapter.startswith(name)]
    name, colon, quant = word.partition(":")
    if colon:
        return [f"{name}:{kind}" for kind in ("int4", "int8") if kind.startswith(quant)]
    return [model for model in names.models if model.lower().startswith(word.lower())]


def _settings(text: str) -> tuple[str, dict[str, Any]]:
    """What stands before the settings, and the settings."""
    settings: dict[str, Any] = {}
    while "," in text:
        before, _, last = text.rpartition(",")
        name, equals, value = last.partition("=")
        if not equals:
            break
        field_name = sampling_name(name)
        settings.setdefault(field_name, parse_sampling_value(field_name, value))
        text = before
    return text, settings


@dataclass(frozen=True, slots=True)
class Together:
    """All engines answer at the same time; threads: of each that is started, None if there is only one engine.

    lots: how often one engine is asked for some of its columns, one lot behind the other, at most.
    """

    engines: int
    threads: int | None
    lots: int = 1


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
    """Equal for columns that one engine can answer, each with its own adapters and settings."""
    if launch.engine.copy is not None and launch.engine.quant is not None:
        return Path(launch.engine.copy["out"]), None  # quantised as it was loaded, and kept there
    return launch.engine.folder, launch.engine.quant


def group(launches: Sequence[LaunchOptions], columns: Sequence[int], running: Running | None) -> list[list[int]]:
    """Columns by engine: the one that runs already first, the others in the order of their first column."""
    groups: dict[tuple[Path | None, int | None], list[int]] = {}
    for index in columns:
        groups.setdefault(engine_key(launches[index]), []).append(index)
    return sorted(groups.values(), key=lambda g: running is None or not running.answers(launches[g[0]]))


AT_ONCE = 8  # columns that one engine is asked for together: as many as a server lets wait


def lots(numbers: Sequence[int]) -> list[Sequence[int]]:
    """The columns of one engine as it is asked for them."""
    return [numbers[first : first + AT_ONCE] for first in range(0, len(numbers), AT_ONCE)]


def demand_of(launch: LaunchOptions) -> tuple[str, int | None, int | None]:
    """Where it would be loaded, bytes that this takes there (None where its files say too little), and bytes free."""
    engine = launch.engine
    if engine.folder is None:
        return "cpu", None, None
    return demand(engine.folder, engine.quant, engine.dtype, engine.context, engine.device, engine.cache_type)


def decide(engines: Sequence[LaunchOptions], running: Running | None) -> Together | OneByOne:
    """engines: one launch of each. Together where cores and the memory that is free now allow it."""
    count, cores = len(engines), physical_cores()
    if count < 2:
        return Together(count, None)
    if cores < 2 * count and cores < 4:
        return OneByOne(tr("{cores} cores are too few for {count} engines at once", cores=cores, count=count))
    demands = [demand_of(one) for one in engines if running is None or not running.answers(one)]
    for device in dict.fromkeys(device for device, _, _ in demands):
        sizes = [size for place, size, _ in demands if place == device]
        total = sum(size for size in sizes if size is not None)
        free = next(free for place, _, free in demands if place == device)
        if None in sizes:
            return OneByOne(tr("the memory they need is not known"))
        if free is not None and total > free:
            needed, left = human_bytes(total), human_bytes(free)
            return OneByOne(
                tr("together they need {needed} of memory, but only {free} are free", needed=needed, free=left)
            )
    return Together(count, max(1, cores // count))
