"""What an adapter makes of a model in a process that has just begun: logits without it and with it, for `glmchat tune`.

request: base, adapter: paths; ids; quant, dtype, device, threads: as the engine takes them.
"""

from __future__ import annotations

import sys
from typing import Any

from glmchat.engine import Engine
from glmchat.jobs.lines import Request, Tell, run

_NAME = "trained"


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the last row of logits of the base alone, and of the base with the adapter."""
    engine = Engine.load(
        request["base"],
        quant=request["quant"],
        dtype=request["dtype"],
        device=request["device"],
        threads=request["threads"],
    )
    base = engine.logits(request["ids"])[-1]
    engine.attach(request["adapter"], _NAME)
    engine.activate({_NAME: 1.0})
    adapted = engine.logits(request["ids"])[-1]
    return {"base": base.tolist(), "adapted": adapted.tolist()}


if __name__ == "__main__":
    sys.exit(run(work))
