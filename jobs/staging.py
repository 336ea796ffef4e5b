"""Files of a pull that do not go into the cache: they wait in a folder of ours until something is made of them.

`pull --quant` quantises each weight file as it arrives and keeps only the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.settings import load_settings
from glmchat.core.text import one_line
from glmchat.hub import store
from glmchat.hub.download import FetchedFile, FileRequest, Progress, download
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord
from glmchat.hub.plan import PullPlan
from glmchat.hub.pull import file_requests
from glmchat.hub.safe_paths import safe_path
from glmchat.hub.selection import PlannedFile
from glmchat.hub.store import git_blob_of, sha256_of


def staging_folder(out: Path) -> Path:
    """Where the sources of the model that will stand at `out` wait. `prune` knows it by its ending."""
    return out.with_name(out.name + ".arriving.incomplete")


def as_row(plan: PullPlan, root: Path) -> Installed:
    """The model of the plan as if it were installed at `root`."""
    entry = plan.entry
    return Installed(
        name=plan.name,
        kind="model",
        path=root,
        repo=plan.repo,
        revision=plan.revision,
        family=entry.family if entry else None,
        source=plan.source,
        files=tuple(FileRecord(f.path, f.size or 0, f.sha256, f.git_blob) for f in plan.files),
    )


def bring(
    plan: PullPlan,
    paths: Iterable[str],
    folder: Path,
    on_progress: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> list[FetchedFile]:
    """Put these files of the plan into `folder`, each whole and verified; a link to what this machine has already.

    Raises what downloading raises; what arrived stays and is not fetched again.
    """
    wanted = set(paths)
    chosen = [f for f in plan.files if f.path in wanted]
    missing = [f for f in chosen if not _linked(plan, f, folder, cancelled)]
    if not missing:
        return []
    asked = replace(plan, files=tuple(replace(f, state="missing") for f in missing))
    files = [_into(one, folder) for one in file_requests(asked)]
    return download(files, on_progress=on_progress, cancelled=cancelled, concurrency=load_settings().downloads)


def drop(folder: Path, path: str) -> None:
    """Take one file out again; a link goes, not what it leads to."""
    (folder / path).unlink(missing_ok=True)


def have(folder: Path, path: str) -> int:
    """Bytes of the file that are in the folder, whole or half; a link takes none."""
    place, half = folder / path, folder / f"{path}{store.PARTIAL}"
    if place.is_symlink():
        return 0
    return next((p.stat().st_size for p in (place, half) if p.is_file()), 0)


def local_copy(plan: PullPlan, file: PlannedFile) -> Path | None:
    """Where this machine has the file already, if it does."""
    if file.state == "here":
        return plan.root / file.path
    if file.state == "linked":
        return store.blob(plan.repo, file.etag)
    return file.local if file.state == "copy" else None


def _linked(plan: PullPlan, file: PlannedFile, folder: Path, cancelled: Callable[[], bool]) -> bool:
    source, place = local_copy(plan, file), folder / safe_path(file.path, source="the plan")
    if place.is_symlink():
        place.unlink()
    if source is None or not source.is_file():
        return False
    if file.sha256 and sha256_of(source, cancelled=cancelled) != file.sha256:
        right = False
    else:
        right = not file.git_blob or bool(file.sha256) or git_blob_of(source) == file.git_blob
    if not right:
        if file.state == "copy":
            return False
        raise Damaged(
            tr("{path} on this machine is damaged", path=one_line(str(source))),
            hint=tr("glmchat pull --check {name} downloads the damaged files again", name=plan.name),
            code="verify.damaged",
        )
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(source.resolve())
    return True


def _into(one: FileRequest, folder: Path) -> FileRequest:
    place = folder / safe_path(one.path, source="the plan")
    return replace(one, destination=place, partial=place.with_name(place.name + store.PARTIAL))
