"""What was learned, in a process that has just begun: logits of the base and of what it became, and what an adapter
adds to each layer, for `glmchat tune`.

request: base; adapter, or model: paths; ids; quant, dtype, device, threads: as the engine takes them.
"""

from __future__ import annotations

import sys
from typing import Any

from glmchat.engine import Engine
from glmchat.jobs.lines import Request, Tell, run
from glmchat.tuning.effects import effects_in

_NAME = "trained"


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the last rows of logits of the base, and of the base with the adapter or of the model; effects."""
    engine = _load(request["base"], request)
    base = engine.logits(request["ids"])[-1]
    if "model" in request:
        del engine  # two of them may not fit
        engine = _load(request["model"], request)
    else:
        engine.attach(request["adapter"], _NAME)
        engine.activate({_NAME: 1.0})
    learned = engine.logits(request["ids"])[-1]
    return {"base": base.tolist(), "learned": learned.tolist(), "effects": effects_in(engine.model)}


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
