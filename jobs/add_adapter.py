"""Brings an adapter into the store: read, checked, copied and hashed. What a stopped run has copied is taken away.

request: path; name: None takes one from the path or the repository; alpha; force; origin: of hub.adapters.Origin;
base: {path, note} of a model that it must fit, tensor by tensor; a note of it is kept. reuse: an adapter of the store
with the same weights does too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from glmchat.checkpoints.adapter_files import CONFIG, weight_files
from glmchat.checkpoints.adapter_fit import Base, misfit
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.engine.adapters.attach import check_against, check_numbers
from glmchat.engine.adapters.files import Adapter, read_adapter
from glmchat.engine.adapters.merge import write_prefix
from glmchat.hub import adapters
from glmchat.hub.adapters import Origin
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord
from glmchat.jobs.lines import Request, Tell, run


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: its name in the store, and whether it was made now. The plan says what it is."""
    path = Path(request["path"])
    adapter = read_adapter(path, alpha=request.get("alpha"), force=request.get("force", False))
    facts = adapter.to_json()
    tell({"event": "plan", "path": str(path), "adapter": facts})
    if (base := request.get("base")) is not None:
        _require_fit(adapter, facts, base)
    digest = adapters.digest_of(path)
    if request.get("reuse"):
        same = (row.name for row in adapters.list_adapters() if adapters.facts_of(row).get("digest") == digest)
        if (name := next(same, None)) is not None:
            return {"name": name, "made": False}
    served = {file["path"]: FileRecord(**file) for file in request["origin"]["served"]}
    origin = Origin(**{**request["origin"], "served": served})
    name = request.get("name") or adapters.suggested_name(path, origin.repo)
    if request.get("reuse"):
        name = adapters.unused_name(name)
    row = _keep(name, path, adapter, {**facts, "digest": digest}, origin)
    return {"name": row.name, "made": True}


def _require_fit(adapter: Adapter, facts: dict[str, Any], base: Any) -> None:
    """Raise what attaching would raise: at once what names and measures tell, then tensor by tensor."""
    model = Path(base["path"])
    if (difference := misfit(facts, adapter.base, Base.of(model))) is not None:
        raise difference.error(adapter.path.name)
    check_against(adapter, model)
    if base["note"] is not None:
        facts["checked_against"] = base["note"]


def _keep(name: str, path: Path, adapter: Adapter, facts: dict[str, Any], origin: Origin) -> Installed:
    """Put it into the store, whichever way it came. Raises Damaged for numbers that are not finite."""
    check_numbers(adapter)
    small = [p for p in adapters.companions(path) if path.is_dir() or p.name == CONFIG]
    names = adapter.tensors.shapes()
    whole_checkpoint = adapter.form == "thudm" and any(not n.startswith(PREFIX_ENCODER) for n in names)
    if whole_checkpoint:  # the older form
        facts["extracted"] = True  # what is kept is no file of the origin

        def write(folder: Path) -> None:
            write_prefix(adapter, folder / "adapter_model.safetensors")

        return adapters.keep(name, small, facts, origin, base=adapter.base, write=write)
    files = dict.fromkeys([*small, *weight_files(path)])
    return adapters.keep(name, list(files), facts, origin, base=adapter.base)


if __name__ == "__main__":
    sys.exit(run(work))
