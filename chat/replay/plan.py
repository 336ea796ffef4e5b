"""What a replay of a stored answer would say: its stretches, from the record, and what is to be otherwise this time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree
from glmchat.chat.model_choice import locate
from glmchat.chat.replay import record
from glmchat.chat.replay.record import Difference
from glmchat.core.errors import GlmchatError, NotInstalled, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, sampling_name
from glmchat.core.text import one_line


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
    if isinstance(folder, str) and Path(folder).exists():
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
