"""Replays of stored answers: what a record says goes to a fresh engine, and what comes out is compared."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree
from glmchat.chat.jobs import run_job
from glmchat.chat.launch import locate
from glmchat.chat.replay import record
from glmchat.chat.replay.record import Difference, differences
from glmchat.core.engine_options import CACHE_TYPES, PRODUCTS, EngineOptions
from glmchat.core.errors import GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, sampling_name
from glmchat.core.text import one_line
from glmchat.hub import adapters
from glmchat.hub.references import is_there


@dataclass(frozen=True, slots=True)
class Stretch:
    """One request of an answer. start: ids of the answer that stood before it; said: those that it brought."""

    start: int
    prompt: tuple[int, ...]
    token_ids: tuple[int, ...]
    passes: tuple[Any, ...]
    facts: Mapping[str, Any]
    sampling: Mapping[str, Any]
    seed: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`: which spans of the prompt were read, spoken earlier, or kept from an earlier turn."""
        cached = int(self.facts.get("cached_n") or 0)
        spans = [
            {"from": start, "to": end, "computed": kind, "reused": end <= cached}
            for start, end, kind, *_ in self.passes
            if isinstance(start, int) and isinstance(end, int)
        ]
        return {
            "start": self.start,
            "prompt_tokens": len(self.prompt),
            "tokens": len(self.token_ids),
            "cached_tokens": cached,
            "spans": spans,
            "seed": self.seed,
            "sampling": dict(self.sampling),
        }


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """What will be said again. changed: what the caller wants otherwise than it was recorded."""

    message: int
    conversation: int
    model: str | None
    stretches: tuple[Stretch, ...]
    changed: tuple[Difference, ...] = ()
    threads: int | None = None

    @property
    def tokens(self) -> int:
        return sum(len(s.token_ids) for s in self.stretches)


def find_answer(history: History, target: str) -> tuple[Tree, StoredMessage]:
    """ "12": the last answer of conversation 12, or answer 12 if there is no such conversation; "m12": answer 12.

    Raises Usage.
    """
    match = re.fullmatch(r"(m?)(\d{1,18})", target.strip())
    if match is None:
        raise Usage(
            tr("{id} is not the number of an answer or a conversation", id=repr(one_line(target, 40))),
            hint=tr("12 is a conversation from `glmchat history list`, m34 an answer in it"),
            code="replay.target",
        )
    number = int(match[2])
    if not match[1] and history.find(number) is not None:
        tree = history.load(number)
        last = next((m for m in reversed(tree.path()) if m.role == "assistant"), None)
    else:
        home = history.conversation_of(number)
        if home is None:
            raise Usage(
                tr("there is no answer or conversation {id}", id=number),
                hint=tr("`glmchat history list` shows them"),
                code="history.unknown",
            )
        tree = history.load(home)
        last = tree.messages.get(number)
    if last is None or last.role != "assistant":
        raise Usage(tr("there is no answer to replay"), hint=tr("name another"), code="replay.no_answer")
    return tree, last


def plan_replay(
    history: History, target: str, *, changes: Mapping[str, Any] | None = None, threads: int | None = None
) -> ReplayPlan:
    """changes: sampling fields to try instead of the recorded ones; threads likewise. Each is named in the outcome.

    Raises Usage for an answer without a record, NotInstalled if its model is gone.
    """
    tree, answer = find_answer(history, target)
    stretches = _stretches(answer)
    changed: dict[str, Difference] = {}
    overrides = {sampling_name(name): value for name, value in (changes or {}).items()}
    done = []  # what was drawn stands in `seed`, not in the settings
    for one in stretches:
        sampling = {k: v for k, v in {**one.sampling, **overrides}.items() if k != "seed"}
        seed = one.seed if overrides.get("seed") is None else int(overrides["seed"])
        Sampling(**{**sampling, "stop": tuple(sampling.get("stop") or ())})
        for name, now in (*sampling.items(), ("seed", seed)):
            then = one.seed if name == "seed" else one.sampling.get(name)
            if then != now and name not in changed:
                changed[name] = Difference(f"setting {name}", then, now)
        done.append(replace(one, sampling=sampling, seed=seed))
    model = answer.details.get("model")
    return ReplayPlan(
        answer.id,
        tree.conversation.id,
        model if isinstance(model, str) else None,
        tuple(done),
        tuple(changed.values()),
        threads,
    )


def _stretches(answer: StoredMessage) -> list[Stretch]:
    records = answer.details.get("stretches")
    if not isinstance(records, list) or not records or not answer.token_ids:
        raise Usage(
            tr("this answer has no record that could be replayed"),
            hint=tr("answers from other servers and from older versions have none"),
            code="replay.no_record",
        )
    stretches = []
    try:
        starts = [int(r["start"]) for r in records]
        if starts[0] != 0 or starts != sorted(starts):
            raise ValueError
        for one, start, end in zip(records, starts, [*starts[1:], len(answer.token_ids)], strict=True):
            stretches.append(
                Stretch(
                    start=start,
                    prompt=tuple(record.unpack(one["prompt"])),
                    token_ids=answer.token_ids[start:end],
                    passes=tuple(one["passes"]),
                    facts=dict(one),
                    sampling=dict(one["sampling"]),
                    seed=int(one["seed"]),
                    folder=_folder(one),
                )
            )
    except (KeyError, TypeError, ValueError):
        raise Usage(
            tr("the record of this answer is damaged"), hint=tr("it cannot be replayed"), code="replay.record"
        ) from None
    return stretches


def _folder(one: Mapping[str, Any]) -> str:
    """Where the weights lie: where they lay, else where the model of that name is now. Raises NotInstalled."""
    launch = one.get("launch")
    folder = launch.get("folder") if isinstance(launch, Mapping) else None
    if isinstance(folder, str) and is_there(folder):
        return folder
    name = str(one.get("model") or "")
    try:
        return str(locate(name, revision=None)[0].path)
    except GlmchatError:
        raise NotInstalled(
            tr("the model of this answer is no longer on this machine: {name}", name=one_line(name)),
            hint=tr("pull it again: `glmchat pull NAME@REVISION`"),
            code="replay.model_gone",
        ) from None


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


_SAME_ENGINE = (
    "asked_dtype", "dtype", "products", "cache_type", "device", "threads", "context", "weights", "template", "settings",
    "versions",
)  # fmt: skip


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
        products=next((name for name in PRODUCTS if name == facts.get("products")), None),
        cache_type=next((name for name in CACHE_TYPES if name == facts.get("cache_type")), None),
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
