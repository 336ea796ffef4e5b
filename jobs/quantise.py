"""Writes the quantised copy of a checkpoint, for `glmchat quantize`.

request: source, out; recipe: fields of engine.quantize.replace.Recipe; stored: the source's quantisation; manifest:
what the store wants to know of the copy; dry_run: the plan is all. A stopped run is gone on with by the next one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from glmchat.checkpoints.recipe import Recipe
from glmchat.core import locations
from glmchat.core.errors import Interrupted
from glmchat.core.language import tr
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute
from glmchat.jobs.lines import Percent, Request, Tell, run


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: where the copy is, and its quantisation."""
    plan = plan_quantise(Path(request["source"]), Path(request["out"]), Recipe(**request["recipe"]))
    tell({"event": "plan", **plan.to_json(), "words": plan.lines(request["stored"])})
    if request.get("dry_run"):
        return {"path": str(plan.out), "quant": plan.label, "made": False}
    if plan.out.parent == locations.models_dir():
        locations.private_dir(locations.data_dir())
        locations.private_dir(locations.models_dir())
    folder = execute(plan, manifest=request["manifest"], on_progress=Percent(tell, tr("quantising")))
    return {"path": str(folder), "quant": plan.label, "made": True}


def _stopped() -> Interrupted:
    return Interrupted(tr("stopped"), hint=tr("run the same command again to resume"), code="quant.stopped")


if __name__ == "__main__":
    sys.exit(run(work, _stopped))
