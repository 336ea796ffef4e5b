"""`glmchat pull NAME --quant 4`: each weight file is quantised as it arrives and taken away again.

So a model of 13 GB needs the disk of its copy and of its largest file. A run that was killed goes on: finished parts of
the copy are kept, and of the original only the file that is being worked on.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmchat.cli import output
from glmchat.core import locations
from glmchat.core.errors import Damaged, Failed, Usage
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.engine.quantize.plan import QuantizePlan
    from glmchat.engine.quantize.quantiser import QuantizeProgress
    from glmchat.engine.quantize.streaming import Announced
    from glmchat.hub.download import Progress
    from glmchat.hub.plan import PullPlan


# Of the original's 16 bits, where the tensors are not known yet: codes, scales, and ends that stay at 8 or 16 bits.
_SHARE = {4: 0.32, 8: 0.54}
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

    @property
    def fits(self) -> bool:
        from glmchat.hub.store import SPARE

        return self.disk_needed == 0 or self.disk_needed + SPARE <= self.disk_free

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "out": str(self.out), "fits": self.fits}


def pull_quantised(
    plan: PullPlan, bits: int, *, keep: bool, check: bool, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """Fetch and quantise what the plan names. Raises what pulling and quantising raise."""
    from glmchat.cli.pull import say_waiting
    from glmchat.hub import staging, store
    from glmchat.hub.quantised_copies import copy_folder

    out = copy_folder(staging.as_row(plan, plan.root), bits)
    if out.exists():
        _ready(plan, out, as_json=as_json, made=False)
        return
    if keep or plan.done or plan.source == "pypi":
        _with_original(plan, out, bits, check=check, dry_run=dry_run, as_json=as_json, quiet=quiet)
        return
    if dry_run:
        with tempfile.TemporaryDirectory(prefix="glmchat-") as passing:
            _show(_arrival(plan, Path(passing), out, bits)[0], as_json)
        return
    locations.private_dir(locations.data_dir())
    locations.private_dir(locations.models_dir())
    folder = staging.staging_folder(out)
    folder.mkdir(mode=0o700, exist_ok=True)
    with store.alone(folder, lambda: False, waiting=say_waiting):
        if not out.exists():  # another process may have made it while this one waited
            _arrive(plan, folder, out, bits, as_json=as_json, quiet=quiet)
        shutil.rmtree(folder, ignore_errors=True)
    _ready(plan, out, as_json=as_json, made=True)


def _announce(plan: PullPlan, folder: Path, out: Path, bits: int) -> tuple[Announced, QuantizePlan] | None:
    """Fetch what is small, and plan. None: the weights are one file, which must be here before it can be looked at."""
    from glmchat.engine.families import identify
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.replace import Recipe
    from glmchat.engine.quantize.streaming import Announced, index_of
    from glmchat.hub import staging

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
    return announced, plan_quantise(folder, out, Recipe(bits), announced)


def _arrival(plan: PullPlan, folder: Path, out: Path, bits: int) -> tuple[ArrivalPlan, Announced | None]:
    from glmchat.engine.quantize.plan import files_needed, incomplete
    from glmchat.hub import staging, store

    weights = _weights(plan)
    planned = _announce(plan, folder, out, bits)
    if planned is None:
        files, bytes_out, quant, written = list(weights), int(sum(weights.values()) * _SHARE[bits]), f"int{bits}", 0
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
    )
    return arrival, planned[0] if planned else None


def _arrive(plan: PullPlan, folder: Path, out: Path, bits: int, *, as_json: bool, quiet: bool) -> None:
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.quantiser import execute
    from glmchat.engine.quantize.replace import Recipe
    from glmchat.engine.quantize.streaming import Arriving
    from glmchat.hub import installed, staging, store
    from glmchat.hub.quantised_copies import copy_manifest

    arrival, announced = _arrival(plan, folder, out, bits)
    store.require_space(arrival.disk_needed, out)
    for line in _described(arrival):
        output.say(line)
    if plan.entry and plan.entry.licence:
        output.say(f"{tr('licence')}: {plan.entry.licence.line()}")
    if as_json:
        output.json_line({"event": "plan", **arrival.to_json()})
    for path in _weights(plan):  # of parts that an earlier run finished
        if path not in arrival.files:
            staging.drop(folder, path)
    row = staging.as_row(plan, folder)
    manifest = {**copy_manifest(row, bits), "asked": plan.reference}
    with nullcontext() if quiet or as_json else output.progress() as meter:
        report = _Reporter(meter, as_json, sum(_weights(plan).values()))

        def bring(*paths: str) -> None:
            for got in staging.bring(plan, paths, folder, report.fetching, lambda: False):
                report.fetched(got.path, got.sha256, got.host)

        def bring_one(file: str) -> Path:
            bring(file)
            return folder / file

        if announced is None:
            bring(*arrival.files)
            source = installed.engine_path(folder, arrival.files)
            execute(plan_quantise(source, out, Recipe(bits)), manifest=manifest, on_progress=report.quantising)
        else:
            execute(
                plan_quantise(folder, out, Recipe(bits), announced),
                weights=Arriving(announced, bring_one, lambda file: staging.drop(folder, file)),
                manifest=manifest,
                on_progress=report.quantising,
            )


def _weights(plan: PullPlan) -> dict[str, int]:
    """Path -> bytes of the weight files. Raises Usage for files that are quantised as they come."""
    from glmchat.hub import selection

    found = {f.path: f.size or 0 for f in plan.files if selection.is_weights(f.path)}
    packed = next((p for p in found if p.endswith(".gguf") and not _DENSE_GGUF.search(p)), None)
    if packed is not None:
        raise Usage(
            tr("{path} is quantised as it comes", path=one_line(packed)),
            hint=tr("pull it without --quant"),
            code="quant.already",
        )
    return found


def _with_original(
    plan: PullPlan, out: Path, bits: int, *, check: bool, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    """The original comes whole and stays (or is here already); then it is quantised."""
    from glmchat.cli.pull import _fetch, _show
    from glmchat.hub import staging, store

    weights = _weights(plan)
    result = int(sum(weights.values()) * _SHARE[bits])
    output.say(
        tr(
            "the original stays: {fetch} to fetch and about {result} for the copy are needed",
            fetch=human_bytes(plan.disk_needed),
            result=human_bytes(result),
        )
    )
    if dry_run:
        _show(plan, as_json)
        return
    store.require_space(plan.disk_needed + result, out)
    if not plan.done or check:
        _fetch(plan, as_json=as_json, quiet=quiet, check=check)
    from glmchat.cli.quantize import _execute
    from glmchat.engine.quantize.plan import plan_quantise
    from glmchat.engine.quantize.replace import Recipe
    from glmchat.hub.installed import engine_path

    row = staging.as_row(plan, engine_path(plan.root, weights))
    _execute(plan_quantise(row.path, out, Recipe(bits)), row, as_json=as_json, quiet=quiet)


def _ready(plan: PullPlan, out: Path, *, as_json: bool, made: bool) -> None:
    from glmchat.hub import installed

    row = next((r for r in installed.list_installed() if r.path == out), None)
    if row is None:
        raise Failed(
            tr("{name} vanished while it was pulled", name=plan.name), hint=tr("pull again"), code="pull.vanished"
        )
    installed.remember(row)
    if as_json:
        output.json_line({"event": "done", "made": made, **row.to_json()})
    else:
        output.say(tr("{name} is ready: {path}", name=row.name, path=row.path))


def _described(arrival: ArrivalPlan) -> list[str]:
    return [
        tr(
            "{name} to {quant}: {fetch} to fetch in {count} files, one after the other; {result} stay",
            name=one_line(arrival.name),
            quant=arrival.quant,
            fetch=human_bytes(arrival.bytes_to_fetch),
            count=len(arrival.files),
            result=human_bytes(arrival.bytes_out),
        ),
        tr(
            "at most {needed} of disk are needed at {path}, {free} are free",
            needed=human_bytes(arrival.disk_needed),
            path=one_line(str(arrival.out.parent)),
            free=human_bytes(arrival.disk_free),
        ),
    ]


def _show(arrival: ArrivalPlan, as_json: bool) -> None:
    if as_json:
        output.json_line(arrival.to_json())
    for line in _described(arrival):
        output.say(line)
    if not arrival.fits:
        output.say(tr("it does not fit"))


class _Reporter:
    """What arrives and what is quantised, as bars or as JSON lines. Quantising is shown in bytes of the original."""

    def __init__(self, meter: output.Meter | None, as_json: bool, total: int) -> None:
        self._meter, self._as_json, self._total = meter, as_json, total
        self._percent, self._told = -1, {""}

    def fetching(self, progress: Progress) -> None:
        if progress.note not in self._told:
            self._told.add(progress.note)
            output.say(progress.note)
        for file in progress.files:
            if self._meter is not None and file.state != "waiting":
                self._meter.update(file.path, file.done, file.total)

    def fetched(self, path: str, sha256: str, host: str) -> None:
        if self._as_json:
            output.json_line({"event": "file", "path": path, "sha256": sha256, "host": host})

    def quantising(self, progress: QuantizeProgress) -> None:
        percent = 100 * progress.done // max(progress.total, 1)
        if self._meter is not None:
            done = self._total * progress.done // max(progress.total, 1)
            self._meter.update(tr("quantising"), done, self._total)
        elif self._as_json and percent != self._percent:
            output.json_line({"event": "progress", "done": progress.done, "total": progress.total})
        self._percent = percent
