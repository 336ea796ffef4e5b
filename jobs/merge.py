"""Writes a base and an adapter as one model, for `glmchat adapters merge`. What a stopped run wrote is taken away.

request: base, adapter, out; quant, dtype, alpha: None or as the flags say; force.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from glmchat.core.language import tr
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.adapters.merge import merge
from glmchat.hub.file_request import Meter
from glmchat.jobs.lines import Request, Tell, run


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the folder of the merged model."""
    out = Path(request["out"])
    adapter = read_adapter(Path(request["adapter"]), alpha=request["alpha"], force=request["force"])
    tell({"event": "plan", "base": request["base"], "adapter": str(adapter.path), "out": str(out)})
    meter = Meter(tell)
    place = merge(
        adapter,
        Path(request["base"]),
        out,
        quant=request["quant"],
        dtype=request["dtype"],
        on_progress=lambda done, total: meter(tr("merging"), done, total),
    )
    return {"path": str(place)}


if __name__ == "__main__":
    sys.exit(run(work))
