"""Replays of stored answers: what was recorded goes to a fresh engine, and what comes out is compared.

The same ids are promised on the same kernels and threads only; everything that is not as it was is named.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.chat.jobs import run_job
from glmchat.chat.replay.plan import ReplayPlan, Stretch
from glmchat.chat.replay.record import Difference, differences
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import NotInstalled
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import adapters


@dataclass(frozen=True, slots=True)
class Replaying:
    """A stretch begins. tokens: how many ids it has."""

    number: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Identical, or where it parts. token counts from 0 through the whole answer; margin and distance are logits."""

    identical: bool
    tokens: int
    differences: tuple[Difference, ...] = ()
    token: int | None = None
    stretch: int | None = None
    then: int | None = None
    now: int | None = None
    then_text: str | None = None
    now_text: str | None = None
    margin: float | None = None
    distance: float | None = None

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in Outcome.__slots__ if name != "differences"}
        return {**values, "differences": [d.to_json() for d in self.differences]}


@dataclass(slots=True)
class _Engine:
    """Stretches that one engine can say, one behind the other."""

    stretches: list[tuple[int, Stretch]] = field(default_factory=list)


def run_replay(
    plan: ReplayPlan, cancelled: Callable[[], bool] | None = None
) -> Generator[Replaying | Outcome, None, None]:
    """Say the answer again in fresh engine processes; the last event is the Outcome.

    Close it to stop. Raises what loading raised (Damaged, DoesNotFit …), EngineDied, Interrupted where it was
    `cancelled`, NotInstalled for a lost adapter.
    """
    otherwise: list[Difference] = list(plan.changed)
    for engine in _engines(plan.stretches):
        stretches = [stretch for _, stretch in engine.stretches]
        arguments = _options(plan, stretches).to_arguments()
        for event in run_job("replay", _request(stretches), arguments=arguments, cancelled=cancelled):
            if event["event"] == "facts":
                for difference in differences(engine.stretches[0][1].facts, event):
                    if difference not in otherwise:
                        otherwise.append(difference)
            elif event["event"] == "stretch":
                number, stretch = engine.stretches[int(event["number"])]
                yield Replaying(number, len(stretch.token_ids))
            elif event["event"] == "result" and not event["identical"]:
                number, stretch = engine.stretches[int(event["number"])]
                yield Outcome(
                    identical=False,
                    tokens=plan.tokens,
                    differences=tuple(otherwise),
                    token=stretch.start + int(event["position"]),
                    stretch=number,
                    **{k: event[k] for k in ("then", "now", "then_text", "now_text", "margin", "distance")},
                )
                return
    yield Outcome(identical=True, tokens=plan.tokens, differences=tuple(otherwise))


_SAME_ENGINE = ("asked_dtype", "dtype", "device", "threads", "context", "weights", "template", "settings", "versions")


def _engines(stretches: Sequence[Stretch]) -> list[_Engine]:
    """One engine for as many stretches as it can say; an answer continued by another model needs two."""
    engines: list[_Engine] = []
    before: Any = None
    for number, one in enumerate(stretches):
        key = (one.folder, _quant(one), [one.facts.get(name) for name in _SAME_ENGINE])
        if key != before:
            engines.append(_Engine())
            before = key
        engines[-1].stretches.append((number, one))
    return engines


def _quant(one: Stretch) -> int | None:
    launch = one.facts.get("launch")
    quant = launch.get("quant") if isinstance(launch, Mapping) else None
    return quant if isinstance(quant, int) else None


def _options(plan: ReplayPlan, stretches: Sequence[Stretch]) -> EngineOptions:
    facts = stretches[0].facts
    names = dict.fromkeys(a["name"] for s in stretches for a in s.facts.get("adapters") or ())
    return EngineOptions(
        folder=Path(stretches[0].folder),
        quant=_quant(stretches[0]),
        dtype=facts.get("asked_dtype"),
        device=facts.get("device") or "cpu",
        threads=plan.threads or facts.get("threads"),
        context=facts.get("context"),
        adapters=tuple((name, _adapter_folder(name)) for name in names),
    )


def _request(stretches: Sequence[Stretch]) -> dict[str, Any]:
    facts = stretches[0].facts
    weights = facts.get("weights") or {}
    return {
        "dtype": facts.get("dtype"),
        "weight_files": {name: digest for name, _, _, digest in weights.get("files") or ()},
        "stretches": [
            {
                "prompt": s.prompt,
                "passes": s.passes,
                "said": s.token_ids,
                "sampling": dict(s.sampling),
                "seed": s.seed,
                "adapters": list(s.facts.get("adapters") or ()),
            }
            for s in stretches
        ],
    }


def _adapter_folder(name: str) -> Path:
    row = adapters.by_name(name)
    if row is None:
        raise NotInstalled(
            tr("the adapter {name} of this answer is no longer on this machine", name=one_line(name)),
            hint=tr("`glmchat adapters list` shows the ones on this machine"),
            code="replay.adapter_gone",
        )
    return row.path
