"""Says an answer again, pass by pass, and tells where it parts from what it was.

`python -P -m glmchat.jobs.replay` reads one JSON object from stdin and writes JSON lines for
chat/replay/replay.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.fingerprints import look_again, of_adapter
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.text import one_line
from glmchat.engine.engine import Engine
from glmchat.engine.generate import Pass
from glmchat.engine.identity import settings_of, versions, weight_files, weights_json


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


def load(request: Mapping[str, Any]) -> Engine:
    """The engine as it was: same precision, threads and context, adapters attached."""
    engine = Engine.load(
        request["folder"],
        quant=request.get("quant"),
        dtype=request.get("asked_dtype"),
        device=request.get("device") or "cpu",
        threads=request.get("threads"),
        context=request.get("context"),
    )
    wanted = request.get("dtype")
    if isinstance(wanted, str) and wanted != str(engine.dtype).removeprefix("torch."):
        # What was measured to be faster then need not be so today.
        engine.use_dtype(getattr(torch, wanted))
    for adapter in request.get("adapters", ()):
        engine.attach(adapter["folder"], adapter["name"])
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


def facts_now(engine: Engine, request: Mapping[str, Any]) -> dict[str, Any]:
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
        "adapter_hashes": {a["name"]: of_adapter(Path(a["folder"])) for a in request.get("adapters", ())},
    }


def weights_now(path: Path, recorded: Mapping[str, str]) -> dict[str, Any]:
    """Like `weights_json`, of the bytes as they are. recorded: file name -> digest, of the answer to compare with."""
    prints = [look_again(file, recorded.get(file.name, "sha256:")) for file in weight_files(path)]
    return weights_json(tuple(prints))


def main() -> int:
    """The child process of a replay. Errors are one JSON line and their exit code."""
    argparse.ArgumentParser(prog="glmchat.jobs.replay").parse_args()
    try:
        request = json.load(sys.stdin)
        with closing(load(request)) as engine:
            _line({"event": "facts", **facts_now(engine, request)})
            for number, stretch in enumerate(request["stretches"]):
                _line({"event": "stretch", "number": number, "tokens": len(stretch["said"])})
                engine.activate({a["name"]: a["scale"] for a in stretch.get("adapters", ())})
                sampling = Sampling(**{**stretch["sampling"], "stop": tuple(stretch["sampling"].get("stop", ()))})
                parting = replay(
                    engine, stretch["prompt"], stretch["passes"], stretch["said"], sampling, stretch["seed"]
                )
                if parting is not None:
                    told = {name: getattr(parting, name) for name in Parting.__slots__}
                    words = {"then_text": _text(engine, parting.then), "now_text": _text(engine, parting.now)}
                    _line({"event": "parting", "number": number, **told, **words})
                    return 0
            _line({"event": "identical"})
    except GlmchatError as problem:
        return _failed(problem)
    except (KeyError, TypeError, ValueError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        return _failed(
            Usage(
                tr("the record cannot be read: {reason}", reason=reason), hint=tr("it is damaged"), code="replay.record"
            )
        )
    return 0


def _failed(problem: GlmchatError) -> int:
    _line({"event": "error", **problem.to_json()})
    return problem.exit


def _text(engine: Engine, token: int) -> str | None:
    return engine.tokenizer.decode([token]) if engine.speaks and 0 <= token < engine.spec.vocab_size else None


def _line(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
