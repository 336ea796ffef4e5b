"""Replays of stored answers: what was recorded goes to a fresh engine, and what comes out is compared.

The same ids are promised on the same kernels and threads only; everything that is not as it was is named.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from glmchat.chat import record
from glmchat.chat.engine_process import engine_environment
from glmchat.chat.history import History
from glmchat.chat.model_choice import locate
from glmchat.chat.records import StoredMessage, Tree
from glmchat.chat.replay_facts import Difference, differences
from glmchat.core.errors import EngineDied, GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, sampling_name
from glmchat.core.text import one_line
from glmchat.hub import installed

_COMMAND = (sys.executable, "-P", "-m", "glmchat.engine.replay")


@dataclass(frozen=True, slots=True)
class Stretch:
    """One request of an answer. start: ids of the answer that stood before it; said: those that it brought."""

    start: int
    prompt: tuple[int, ...]
    said: tuple[int, ...]
    passes: tuple[Any, ...]
    facts: Mapping[str, Any]
    sampling: Mapping[str, Any]
    seed: int
    folder: str

    def to_json(self) -> dict[str, Any]:
        """For `--json`: which spans of the prompt were read, spoken earlier, or kept from an earlier turn."""
        kept = int(self.facts.get("cached_n") or 0)
        spans = [
            {"from": start, "to": end, "computed": kind, "reused": end <= kept}
            for start, end, kind, *_ in self.passes
            if isinstance(start, int) and isinstance(end, int)
        ]
        return {
            "start": self.start,
            "prompt_tokens": len(self.prompt),
            "tokens": len(self.said),
            "cached_tokens": kept,
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
        return sum(len(s.said) for s in self.stretches)


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
        told = {name: getattr(self, name) for name in Outcome.__slots__ if name != "differences"}
        return {**told, "differences": [d.to_json() for d in self.differences]}


@dataclass(slots=True)
class _Engine:
    """Stretches that one engine can say, one behind the other."""

    stretches: list[tuple[int, Stretch]] = field(default_factory=list)


def find_answer(history: History, target: str) -> tuple[Tree, StoredMessage]:
    """ "12": the last answer of conversation 12, or answer 12 if there is no such conversation; "m12": answer 12.

    Raises Usage.
    """
    found = re.fullmatch(r"(m?)(\d{1,18})", target.strip())
    if found is None:
        raise Usage(
            tr("{id} is no number of an answer or a conversation", id=repr(one_line(target, 40))),
            hint=tr("12 is a conversation from `glmchat history list`, m34 an answer in it"),
            code="replay.target",
        )
    number = int(found[2])
    if not found[1] and history.find(number) is not None:
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
    wanted = {sampling_name(name): value for name, value in (changes or {}).items()}
    done = []
    for one in stretches:
        sampling = {**one.sampling, **{k: v for k, v in wanted.items() if k != "seed"}}
        seed = int(wanted.get("seed") or one.seed)
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
            hint=tr("answers of foreign servers and of older versions have none"),
            code="replay.no_record",
        )
    found = []
    try:
        starts = [int(r["start"]) for r in records]
        if starts[0] != 0 or starts != sorted(starts):
            raise ValueError
        for one, start, end in zip(records, starts, [*starts[1:], len(answer.token_ids)], strict=True):
            found.append(
                Stretch(
                    start=start,
                    prompt=tuple(record.unpack(one["prompt"])),
                    said=answer.token_ids[start:end],
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
    return found


def _folder(one: Mapping[str, Any]) -> str:
    """Where the weights lie: where they lay, else where the model of that name is now. Raises NotInstalled."""
    launch = one.get("launch")
    known = launch.get("folder") if isinstance(launch, Mapping) else None
    if isinstance(known, str) and Path(known).exists():
        return known
    name = str(one.get("model") or "")
    try:
        return str(locate(name, revision=None)[0].path)
    except GlmchatError:
        raise NotInstalled(
            tr("the model of this answer is not here any more: {name}", name=one_line(name)),
            hint=tr("pull it again: `glmchat pull NAME@REVISION`"),
            code="replay.model_gone",
        ) from None


def run_replay(plan: ReplayPlan, *, command: Sequence[str] = _COMMAND) -> Generator[Replaying | Outcome, None, None]:
    """Say the answer again in fresh engine processes; the last event is the Outcome.

    Close it to stop. Raises what loading raised (Damaged, DoesNotFit …), EngineDied, NotInstalled for a lost adapter.
    """
    found: list[Difference] = list(plan.changed)
    for engine in _engines(plan.stretches):
        for event in _child(_request(plan, [s for _, s in engine.stretches]), command):
            match event.get("event"):
                case "facts":
                    for difference in differences(engine.stretches[0][1].facts, event):
                        if difference not in found:
                            found.append(difference)
                case "stretch":
                    number, stretch = engine.stretches[int(event["number"])]
                    yield Replaying(number, len(stretch.said))
                case "parting":
                    number, stretch = engine.stretches[int(event["number"])]
                    yield Outcome(
                        identical=False,
                        tokens=plan.tokens,
                        differences=tuple(found),
                        token=stretch.start + int(event["position"]),
                        stretch=number,
                        **{k: event[k] for k in ("then", "now", "then_text", "now_text", "margin", "distance")},
                    )
                    return
    yield Outcome(identical=True, tokens=plan.tokens, differences=tuple(found))


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


def _request(plan: ReplayPlan, stretches: Sequence[Stretch]) -> dict[str, Any]:
    facts = stretches[0].facts
    weights = facts.get("weights") or {}
    named = {a["name"]: a for s in stretches for a in s.facts.get("adapters") or ()}
    return {
        "folder": stretches[0].folder,
        "quant": _quant(stretches[0]),
        "asked_dtype": facts.get("asked_dtype"),
        "dtype": facts.get("dtype"),
        "device": facts.get("device"),
        "threads": plan.threads or facts.get("threads"),
        "context": facts.get("context"),
        "weight_files": {name: digest for name, _, _, digest in weights.get("files") or ()},
        "adapters": [{"name": name, "folder": str(_adapter_folder(name))} for name in named],
        "stretches": [
            {
                "prompt": s.prompt,
                "passes": s.passes,
                "said": s.said,
                "sampling": dict(s.sampling),
                "seed": s.seed,
                "adapters": list(s.facts.get("adapters") or ()),
            }
            for s in stretches
        ],
    }


def _adapter_folder(name: str) -> Path:
    row = next((r for r in installed.list_installed() if r.kind == "adapter" and r.name == name), None)
    if row is None:
        raise NotInstalled(
            tr("the adapter {name} of this answer is not here any more", name=one_line(name)),
            hint=tr("`glmchat adapters list` shows those that are"),
            code="replay.adapter_gone",
        )
    return row.path


def _child(request: Mapping[str, Any], command: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    """The events of a fresh engine. Raises its error, or EngineDied."""
    with subprocess.Popen(
        list(command), cwd="/", env=engine_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            try:
                json.dump(request, child.stdin)
                child.stdin.close()
            except BrokenPipeError:  # it died before it had read all; what it said tells why
                child.stdin = None
            for line in child.stdout:
                event = json.loads(line)
                if event.get("event") == "error":
                    raise GlmchatError.from_json(event)
                yield event
        finally:
            if child.poll() is None:
                child.terminate()
    if child.returncode:
        raise EngineDied(
            tr("the replaying process ended with code {code}", code=child.returncode),
            hint=tr("its last words are above; `glmchat doctor` looks at memory and kernels"),
        )
