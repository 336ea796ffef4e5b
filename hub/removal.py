"""Take models away: a frozen plan first, then the deletion. Other revisions are never broken.

What lies in the Hugging Face cache goes through the hub's own `delete_revisions`, which knows which blobs another
revision or the cache-wide blob store still needs. The manifest goes last: one without its blobs describes nothing.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmchat.core import eval_folder, kv_files, locations, run_folder
from glmchat.core.errors import Failed
from glmchat.core.eval_folder import size_below
from glmchat.core.language import tr
from glmchat.hub import lookup, manifests, store
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import Manifest

if TYPE_CHECKING:
    from huggingface_hub import DeleteCacheStrategy

_FOREIGN_AGE = 3600.0  # seconds; a younger partial of another tool may still be growing


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that goes away."""

    what: str  # "revision" | "folder" | "file" | "manifest" | "registration"
    path: Path
    size_bytes: int = 0
    repo: str | None = None
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    names: tuple[str, ...]
    steps: tuple[Step, ...]
    bytes_freed: int
    keeps: tuple[str, ...] = ()  # what one might expect to go, and does not

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "bytes_freed": self.bytes_freed,
            "keeps": list(self.keeps),
            "steps": [
                {"what": s.what, "path": str(s.path), "size_bytes": s.size_bytes, "revision": s.revision}
                for s in self.steps
            ],
        }


def plan_removal(rows: Sequence[Installed]) -> RemovalPlan:
    """What removing these would delete and free. Raises Failed if one of them is being pulled right now."""
    steps: list[Step] = []
    keeps: list[str] = []
    for row in rows:
        steps += _steps(row)
        if row.source == "path":
            keeps.append(tr("the folder {path} stays on disk; only its entry is removed", path=row.path))
        copies = (copy for copy in lookup.made_from(row.name, row.repo) if copy not in rows)
        keeps += [tr("{name}, which was made from it, stays", name=copy.name) for copy in copies]
    return RemovalPlan(tuple(r.name for r in rows), tuple(steps), sum(s.size_bytes for s in steps), tuple(keeps))


def plan_prune(*, evaluations: bool = False, runs: bool = False) -> RemovalPlan:
    """What nothing refers to: half downloads that nobody continues, blobs without a link, manifests without a model;
    and the caches of conversations, which cost a prompt read again. evaluations, runs: also those that are over.
    """
    keeps: list[str] = []
    steps = [*_half_downloads(), *_loose_blobs(), *_left_behind(), *_kv_caches()]
    rows = {r.manifest.file for r in lookup.list_installed() if r.manifest}
    gone = {s.path for s in steps}
    for manifest in manifests.read_all():
        gone_too = not manifest.complete and manifest.source == "hf" and _nothing_stays(manifest, gone)
        if (manifest.file not in rows or gone_too) and not _being_pulled(manifest):
            steps.append(Step("manifest", manifest.file))
    steps += [Step("manifest", path) for path in manifests.broken()]
    if evaluations:
        steps += _evaluations(keeps)
    if runs:
        steps += _runs(keeps)
    return RemovalPlan((), tuple(steps), sum(s.size_bytes for s in steps), tuple(keeps))


def _nothing_stays(manifest: Manifest, gone: Collection[Path]) -> bool:
    """True if no file of the manifest is in its place and none is left, whole or half, among the blobs."""
    if any((manifest.root / f.path).exists() for f in manifest.files):
        return False
    repo, etags = manifest.repo or "", [f.git_blob or f.sha256 or "-" for f in manifest.files]
    places = (place for e in etags for place in (store.partial(repo, e), store.blob(repo, e)))
    return not any(place.exists() and place not in gone for place in places)


def _being_pulled(manifest: Manifest) -> bool:
    repo = manifest.repo
    return repo is not None and any(store.in_use(repo, f.git_blob or f.sha256 or "-") for f in manifest.files)


def execute(plan: RemovalPlan) -> None:
    """Delete what the plan says, in an order in which a crash leaves nothing half visible."""
    order = {"revision": 0, "folder": 1, "file": 2, "registration": 3, "manifest": 4}
    for step in sorted(plan.steps, key=lambda s: order[s.what]):
        try:
            if step.what == "revision":
                _delete_revision(step)
            elif step.what == "folder":
                _delete_folder(step.path)
            else:
                step.path.unlink(missing_ok=True)
        except OSError as error:
            raise Failed(
                f"{step.path}: {error.strerror or error}",
                hint=tr("check that the folder is writable, then try again"),
                code="rm.failed",
            ) from None


def _steps(row: Installed) -> list[Step]:
    manifest = row.manifest
    steps: list[Step] = []
    if row.source == "path" and manifest is not None:
        return [Step("registration", manifest.file)]
    if row.source == "hf" and row.repo and row.revision:
        if manifest is not None and _being_pulled(manifest):
            raise Failed(
                tr("{name} is being pulled right now", name=row.name), hint=tr("stop the pull first"), code="rm.in_use"
            )
        snapshot = _snapshot_of(row, row.repo, row.revision)
        if snapshot.is_dir():
            steps.append(Step("revision", snapshot, _freed(snapshot, row.repo, row.revision), row.repo, row.revision))
        if snapshot == store.snapshot(row.repo, row.revision):
            steps += _partials_of(row)
    else:
        folder = row.path if row.path.is_dir() else row.path.parent
        if folder.resolve().is_relative_to(locations.data_dir().resolve()):
            steps.append(Step("folder", folder, row.size_bytes))
    if manifest is not None and row.source != "made":
        steps.append(Step("manifest", manifest.file))
    return steps


def _snapshot_of(row: Installed, repo: str, revision: str) -> Path:
    """The folder of this very row, which may lie in another cache than the one that is used now."""
    root = row.manifest.root if row.manifest is not None else row.path
    inside = (place for place in (root, *root.parents) if place.parent.name == "snapshots" and place.name == revision)
    return next(inside, store.snapshot(repo, revision))


def _partials_of(row: Installed) -> list[Step]:
    """What a broken-off pull left of this model, half files and whole ones without a link, that no other one wants."""
    if row.manifest is None or row.repo is None:
        return []
    mine = {f.git_blob or f.sha256 for f in row.manifest.files}
    for other in manifests.read_all():
        if other.repo == row.repo and other.revision != row.revision and not other.complete:
            mine -= {f.git_blob or f.sha256 for f in other.files}
    etags = sorted(e for e in mine if e)
    used = store.linked_blobs(store.repo_folder(row.repo))
    paths = [store.partial(row.repo, e) for e in etags] + [store.blob(row.repo, e) for e in etags if e not in used]
    return [Step("file", p, p.stat().st_size) for p in paths if p.is_file() and not p.is_symlink()]


def _strategy(snapshot: Path, repo: str, revision: str) -> DeleteCacheStrategy | None:
    """The hub's own plan for one revision of one repository (the same commit of a renamed copy is not touched)."""
    from huggingface_hub import scan_cache_dir

    scan = scan_cache_dir(snapshot.parents[2])
    mine = [r for r in scan.repos if r.repo_id == repo and r.repo_type == "model"]
    if not mine or revision not in {r.commit_hash for r in mine[0].revisions}:
        return None
    return replace(scan, repos=frozenset(mine)).delete_revisions(revision)


def _freed(snapshot: Path, repo: str, revision: str) -> int:
    strategy = _strategy(snapshot, repo, revision)
    return strategy.expected_freed_size if strategy else 0


def _delete_revision(step: Step) -> None:
    # The hub's own deletion only logs what it may not delete, so that is asked before the first file goes.
    inside = [step.path, *(p for p in step.path.rglob("*") if p.is_dir())]
    for folder in (step.path.parent, step.path.parent.parent / "blobs", *inside):
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))
    # A link without its blob makes the hub's scan skip the whole repository, so dead links go first.
    for place in step.path.rglob("*"):
        if place.is_symlink() and not place.exists():
            place.unlink()
    strategy = _strategy(step.path, step.repo or "", step.revision or "")
    if strategy is not None:
        strategy.execute()
    elif step.path.is_dir():
        raise Failed(
            tr("huggingface_hub does not recognise the cache folder of {repo}", repo=step.repo),
            hint=tr("hf cache ls says what is wrong with it"),
            code="rm.cache",
        )


def _delete_folder(folder: Path) -> None:
    """Renamed first: at no moment does half a model stand under its name."""
    aside = folder.with_name(f".gone-{folder.name}-{os.getpid()}")
    folder.rename(aside)
    shutil.rmtree(aside)


def _half_downloads() -> Iterable[Step]:
    for path in sorted(locations.hf_cache().glob("*/blobs/*.incomplete")):
        repo = path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
        if not os.access(path.parent, os.W_OK) or not _is_mine(path):
            continue
        if path.name.endswith(store.PARTIAL):
            if store.in_use(repo, path.name.removesuffix(store.PARTIAL)):
                continue
        elif time.time() - path.stat().st_mtime < _FOREIGN_AGE:
            continue
        yield Step("file", path, path.stat().st_size)


def _is_mine(path: Path) -> bool:
    """False for what another user began, in a cache that several share: only they know whether they will go on."""
    return path.lstat().st_uid == os.getuid()


def _loose_blobs() -> Iterable[Step]:
    """Blobs that no snapshot links to: left by a kill between the last byte and the link."""
    for folder in sorted(locations.hf_cache().glob("models--*")):
        if not os.access(folder / "blobs", os.R_OK | os.W_OK | os.X_OK):
            continue
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        used = store.linked_blobs(folder)
        for blob in sorted((folder / "blobs").iterdir()):
            # A link leads into the cache-wide blob store, which keeps its own books.
            fresh = time.time() - blob.lstat().st_mtime < _FOREIGN_AGE
            if blob.name in used or blob.is_symlink() or blob.name.endswith(".incomplete") or fresh:
                continue
            if _is_mine(blob) and not store.in_use(repo, blob.name):
                yield Step("file", blob, blob.stat().st_size)


def _kv_caches() -> Iterable[Step]:
    for path in kv_files.everything():
        with suppress(FileNotFoundError):  # an engine takes its half files away
            yield Step("file", path, path.lstat().st_size)


def _left_behind() -> Iterable[Step]:
    """Working folders of pulls, quantisations and removals that were killed."""
    folder = locations.models_dir()
    paths = [*folder.glob("*/.pull-*"), *folder.glob("*.incomplete"), *folder.glob(".gone-*")]
    for path in paths if folder.is_dir() else []:
        if time.time() - path.stat().st_mtime > _FOREIGN_AGE or path.name.startswith(".gone-"):
            yield Step("folder", path, sum(p.stat().st_size for p in path.rglob("*") if p.is_file()))


def _evaluations(keeps: list[str]) -> Iterable[Step]:
    """Tables, and answers that nobody writes."""
    for one in eval_folder.evaluations():
        if one.at_work:
            keeps.append(tr("the evaluation {name} is at work and stays", name=one.id))
        else:
            yield Step("folder", one.folder, one.size())
    for folder, size in eval_folder.unused_answers():
        yield Step("folder", folder, size)


def _runs(keeps: list[str]) -> Iterable[Step]:
    """Those that are done, and plans that never began: what others have learned is in their folders alone."""
    for run in run_folder.runs():
        if run.state() == "done" or run.never_began:
            yield Step("folder", run.folder, size_below(run.folder))
        else:
            keeps.append(tr("the run {name} is not done and stays; glmchat tune --rm {name} removes it", name=run.id))
