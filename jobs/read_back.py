"""What was learned, in a process that has just begun: logits of the base and of what it became, and what was read as a
few numbers (tuning/effects.py), for `glmchat tune`.

request: base; adapter, or model: paths; ids; quant, dtype, device, threads: as the engine takes them.
"""

from __future__ import annotations

import sys
from typing import Any

from glmchat.engine import Engine
from glmchat.engine.adapters.prefix_tuning import read_prefix
from glmchat.jobs.lines import Request, Tell, run
from glmchat.tuning.effects import Effects, effects_in, effects_of_model, effects_of_rows

_NAME = "trained"


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the last rows of logits of the base, and of the base with the adapter or of the model; effects."""
    engine = _load(request["base"], request)
    base = engine.logits(request["ids"])[-1]
    if "model" in request:
        del engine  # two of them may not fit
        engine = _load(request["model"], request)
        effects = effects_of_model(engine.model)
    else:
        effects = use(engine, request["adapter"])
    learned = engine.logits(request["ids"])[-1]
    return {"base": base.tolist(), "learned": learned.tolist(), "effects": effects}


def use(engine: Engine, path: str) -> Effects:
    """Have the engine answer with the adapter at `path`: what was read, as the method that learned it tells it."""
    adapter = engine.attach(path, _NAME)
    engine.activate({_NAME: 1.0})
    if adapter.kind == "lora":
        return effects_in(engine.model)
    return effects_of_rows(read_prefix(adapter, engine.model.spec, "cpu"))


def _load(path: str, request: Request) -> Engine:
    return Engine.load(
        path,
        quant=request["quant"],
        dtype=request["dtype"],
        device=request["device"],
        threads=request["threads"],
    )


if __name__ == "__main__":
    sys.exit(run(work))
