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
from glmchat.engine.quantize.plan import QuantizePlan, plan_quantise
from glmchat.engine.quantize.quantiser import QuantizeProgress, execute
from glmchat.hub.file_request import Meter
from glmchat.jobs.lines import Request, Tell, run


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: where the copy is, and its quantisation."""
    plan = plan_quantise(Path(request["source"]), Path(request["out"]), Recipe(**request["recipe"]))
    tell({"event": "plan", **plan.to_json(), "words": plan.lines(request["stored"])})
    if request.get("dry_run"):
        return {"path": str(plan.out), "quant": plan.label, "made": False}
    return write(plan, request["manifest"], tell)


def write(plan: QuantizePlan, manifest: Request, tell: Tell) -> dict[str, Any]:
    """Carry out a plan whose weights are all here."""
    if plan.out.parent == locations.models_dir():
        locations.private_dir(locations.data_dir())
        locations.private_dir(locations.models_dir())
    folder = execute(plan, manifest=manifest, on_progress=Quantising(tell))
    return {"path": str(folder), "quant": plan.label, "made": True}


class Quantising:
    """Tells how far the quantiser is: a line for programs at each percent, a bar for people.

    shown: what the whole is in the bar's unit: 100 percent, or bytes of the original.
    """

    def __init__(self, tell: Tell, shown: int = 100) -> None:
        self._tell, self._meter, self._shown = tell, Meter(tell), shown
        self._percent = -1

    def __call__(self, progress: QuantizeProgress) -> None:
        total = max(progress.total, 1)
        self._meter(tr("quantising"), self._shown * progress.done // total, self._shown)
        percent = 100 * progress.done // total
        if percent != self._percent:
            self._percent = percent
            self._tell({"event": "progress", "done": progress.done, "total": progress.total})


def _stopped() -> Interrupted:
    return Interrupted(tr("stopped"), hint=tr("run the same command again to resume"), code="quant.stopped")


if __name__ == "__main__":
    sys.exit(run(work, _stopped))
