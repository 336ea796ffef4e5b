"""Says an answer again, pass by pass, and tells where it parts from what it was.

`python -P -m glmchat.jobs.replay --folder=…` takes the options of an engine; chat/replay/replay.py reads what it tells.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Interrupted, Usage
from glmchat.core.fingerprints import look_again, of_adapter
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.text import one_line
from glmchat.engine.decoding.passes import Pass
from glmchat.engine.engine import Engine
from glmchat.engine.identity import settings_of, versions, weight_files, weights_json
from glmchat.jobs.lines import Request, Tell, run


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a replay says something else. position: in the ids of the stretch, from 0.

    margin: by how much the likeliest id led the next one; distance: by how much the id chosen now leads the one chosen
    then (negative where chance preferred a less likely one). Both are differences of logits.
    """

    position: int
    then: int
    now: int
    margin: float
    distance: float


def replay(
    engine: Engine, ids: Sequence[int], passes: Sequence[Any], said: Sequence[int], sampling: Sampling, seed: int
) -> Parting | None:
    """Read `ids` in the passes that were recorded, choose again what was `said`; None if every id is the same.

    Raises Usage for a record that does not fit the prompt.
    """
    logits = engine.rebuild(ids, parse_passes(passes, len(ids)))
    choose = engine.sampler(sampling, seed, ids)
    for position, then in enumerate(said):
        now = choose(logits)
        if now != then:
            best = logits.float().topk(2).values
            there = float(logits[then]) if 0 <= then < len(logits) else float("-inf")
            return Parting(position, then, now, float(best[0] - best[1]), float(logits[now]) - there)
        if position + 1 < len(said):
            logits = engine.advance(then)
    return None


def load(options: EngineOptions, request: Request) -> Engine:
    """The engine as it was: same precision, threads and context, adapters attached."""
    engine = Engine.load(options.require_folder(), **options.for_load())
    dtype = request.get("dtype")
    if isinstance(dtype, str) and dtype != str(engine.dtype).removeprefix("torch."):
        # What was measured to be faster then need not be so today.
        engine.use_dtype(getattr(torch, dtype))
    for name, folder in options.adapters:
        engine.attach(folder, name)
    return engine


def parse_passes(data: Iterable[Any], length: int) -> list[Pass]:
    """Passes from JSON. Raises Usage if they do not make up exactly `length` positions."""
    found: list[Pass] = []
    at = 0
    try:
        for start, end, kind, *rest in data:
            dropped = tuple(int(i) for i in rest[0]) if rest else ()
            if start != at or not start < end <= length or kind not in ("prefill", "decode"):
                raise ValueError
            found.append(Pass(start, end, kind, dropped))
            at = end
    except (TypeError, ValueError):
        at = -1
    if at != length or not found or found[-1].dropped:
        raise Usage(tr("the record of this answer is damaged"), hint=tr("it cannot be replayed"), code="replay.record")
    return found


def facts_now(engine: Engine, request: Request, adapters: Sequence[tuple[str, Path]]) -> dict[str, Any]:
    """The facts of this engine, its files read anew."""
    recorded = {str(name): str(digest) for name, digest in request.get("weight_files", {}).items()}
    path = engine.checkpoint.path
    return {
        **engine.facts(),
        "versions": versions(),
        "template": engine.template,
        "asked_dtype": engine.asked_dtype,
        "weights": weights_now(path, recorded),
        "settings": settings_of(path),
        "adapter_hashes": {name: of_adapter(folder) for name, folder in adapters},
    }


def weights_now(path: Path, recorded: Mapping[str, str]) -> dict[str, Any]:
    """Like `weights_json`, of the bytes as they are. recorded: file name -> digest, of the answer to compare with."""
    prints = [look_again(file, recorded.get(file.name, "sha256:")) for file in weight_files(path)]
    return weights_json(tuple(prints))


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: {"identical": True}, or the parting with the number of its stretch."""
    options = EngineOptions.from_arguments(sys.argv[1:])
    try:
        tell({"event": "plan", "folder": str(options.folder), "stretches": len(request["stretches"])})
        with closing(load(options, request)) as engine:
            tell({"event": "facts", **facts_now(engine, request, options.adapters)})
            for number, stretch in enumerate(request["stretches"]):
                tell({"event": "stretch", "number": number, "tokens": len(stretch["said"])})
                engine.activate({a["name"]: a["scale"] for a in stretch.get("adapters", ())})
                sampling = Sampling(**{**stretch["sampling"], "stop": tuple(stretch["sampling"].get("stop", ()))})
                parting = replay(
                    engine, stretch["prompt"], stretch["passes"], stretch["said"], sampling, stretch["seed"]
                )
                if parting is not None:
                    words = {"then_text": _text(engine, parting.then), "now_text": _text(engine, parting.now)}
                    return {"identical": False, "number": number, **asdict(parting), **words}
    except (KeyError, TypeError, ValueError) as error:
        raise Usage(
            tr("the record cannot be read: {reason}", reason=one_line(f"{type(error).__name__}: {error}", 200)),
            hint=tr("it is damaged"),
            code="replay.record",
        ) from None
    return {"identical": True}


def _text(engine: Engine, token: int) -> str | None:
    return engine.tokenizer.decode([token]) if engine.speaks and 0 <= token < engine.spec.vocab_size else None


def _stopped() -> Interrupted:
    return Interrupted(tr("the replay was stopped"), hint=tr("run it again"), code="replay.stopped")


if __name__ == "__main__":
    sys.exit(run(work, _stopped))
