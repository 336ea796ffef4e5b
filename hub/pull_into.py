"""`glmchat pull --into PATH`: replace the git-lfs pointers of a folder by the files they stand for, and nothing else.

An object is looked for in this order: git-lfs' own store in the clone, the Hugging Face cache, the repository on a hub
(named by the user, by the catalogue's hashes, or by the clone's remote), the LFS batch API. Whatever answers, only the
bytes with the pointer's sha256 take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.checkpoints.weight_files import Pointer
from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.http import host_of
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.settings import load_settings
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import catalogue, store
from glmchat.hub.candidates import folder_candidate
from glmchat.hub.download import Candidate, FetchedFile, FileRequest, Progress, download
from glmchat.hub.git_lfs import Remote, ask_batch, find_pointers, objects_folder, read_remote
from glmchat.hub.hf_token import refused_words, token
from glmchat.hub.references import Reference
from glmchat.hub.sources import HubEndpoint, endpoints, offline


@dataclass(frozen=True, slots=True)
class PointerFile:
    path: str  # relative to the folder
    pointer: Pointer
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class IntoPlan:
    """Everything `execute_into` will do."""

    folder: Path
    files: tuple[PointerFile, ...]
    disk_free: int
    problems: tuple[str, ...] = ()  # sources that could not be asked

    @property
    def bytes_total(self) -> int:
        return sum(file.pointer.size for file in self.files)

    def lines(self) -> list[str]:
        """The plan for people: what, and which sources could not be asked."""
        where = one_line(str(self.folder))
        if not self.files:
            return [tr("there are no git-lfs pointers in {path}", path=where), *self.problems]
        line = tr(
            "{count} git-lfs pointers in {path} stand for {size}",
            count=len(self.files),
            path=where,
            size=human_bytes(self.bytes_total),
        )
        return [line, *self.problems]

    def to_json(self) -> dict[str, Any]:
        return {
            "into": str(self.folder),
            "bytes_total": self.bytes_total,
            "disk_needed": self.bytes_total,
            "disk_free": self.disk_free,
            "files": [
                {"path": f.path, "size": f.pointer.size, "sha256": f.pointer.oid, "sources": len(f.candidates)}
                for f in self.files
            ],
            "problems": list(self.problems),
        }


@dataclass(frozen=True, slots=True)
class _Home:
    """A repository that may hold the objects, at a revision."""

    repo: str
    revision: str
    places: tuple[HubEndpoint, ...]


def plan_into(folder: Path, reference: Reference | None = None, explicit: Sequence[str] = ()) -> IntoPlan:
    """Find the pointers under `folder` and where their objects can come from. No file is changed.

    reference: the repository, where neither the catalogue nor a git remote tells. explicit: --endpoint, in order.
    Raises Usage if `folder` is none, or if there are pointers and no place is known to have their objects.
    """
    folder = user_path(folder)
    if not folder.is_dir():
        raise Usage(
            tr("{path} is not a folder", path=one_line(str(folder))),
            hint=tr("--into names the folder of a model that was cloned without git-lfs"),
            code="lfs.no_folder",
        )
    pointers = list(find_pointers(folder))
    plan = IntoPlan(folder, (), store.free_bytes(folder))
    if not pointers:
        return plan
    remote = read_remote(folder)
    candidates = {path: _local(folder, pointer) for path, pointer in pointers}
    problems: list[str] = []
    left = [(path, pointer) for path, pointer in pointers if not candidates[path]]
    homes = _homes(reference, [pointer for _, pointer in left], remote, explicit) if left else []
    key = token() if left and any(p.sends_token for home in homes for p in home.places) else None
    for home in homes:
        for path, pointer in left:
            candidates[path] += _served(home, path, pointer, key)
    if left and not offline():
        for url, send in _batches(homes, remote):
            headers = {"Authorization": f"Bearer {key}"} if send and key else {}
            served, problem = ask_batch(url, [pointer for _, pointer in left], headers)
            if problem and headers:  # an expired token is refused for what is public too
                served, without = ask_batch(url, [pointer for _, pointer in left], {})
                problem = without and f"{refused_words(host_of(url))}; {without}"
            problems += [problem] if problem and problem not in problems else []
            for path, pointer in left:
                candidates[path] += [served[pointer.oid]] if pointer.oid in served else []
    if lost := [path for path, _ in pointers if not candidates[path]]:
        raise Usage(
            tr("no source is known for {path}", path=one_line(lost[0]))
            + ("; " + "; ".join(problems[:2]) if problems else ""),
            hint=tr("name the model: glmchat pull NAME --into {path}", path=one_line(str(folder))),
            code="lfs.no_source",
        )
    files = tuple(PointerFile(path, pointer, tuple(candidates[path])) for path, pointer in pointers)
    return replace(plan, files=files, problems=tuple(problems))


def execute_into(
    plan: IntoPlan, on_progress: Callable[[Progress], None], cancelled: Callable[[], bool]
) -> list[FetchedFile]:
    """Fetch the objects and put each in its pointer's place, whole and verified, one by one.

    A folder left half done by Ctrl-C or a crash has real files and pointers, each of them sound; the same call goes on.
    Raises DoesNotFit before the first byte, and what `download` raises.
    """
    store.require_space(plan.bytes_total, plan.folder)
    requests = []
    for file in plan.files:
        place = plan.folder / file.path
        requests.append(
            FileRequest(
                path=file.path,
                destination=place,
                partial=place.with_name(f"{place.name[:80]}.{file.pointer.oid[:12]}{store.PARTIAL}"),
                candidates=file.candidates,
                size=file.pointer.size,
                sha256=file.pointer.oid,
            )
        )
    return download(requests, on_progress=on_progress, cancelled=cancelled, concurrency=load_settings().downloads)


def _local(folder: Path, pointer: Pointer) -> list[Candidate]:
    """Copies on this machine, by name and size; the downloader proves them."""
    places = []
    objects = objects_folder(folder)
    if objects is not None:
        places.append(objects / pointer.oid[:2] / pointer.oid[2:4] / pointer.oid)
    places += sorted(locations.hf_cache().glob(f"models--*/blobs/{pointer.oid}"))
    here = [place for place in places if place.is_file() and place.stat().st_size == pointer.size]
    return [Candidate(place.absolute().as_uri(), label=tr("this machine")) for place in here]


def _homes(
    reference: Reference | None, pointers: Sequence[Pointer], remote: Remote | None, explicit: Sequence[str]
) -> list[_Home]:
    """Repositories to ask, most certain first."""
    places = tuple(p for p in endpoints(explicit, load_settings().endpoints) if p.kind != "modelscope")
    homes: list[_Home] = []
    entries = catalogue.load()
    if reference is not None and reference.path is None:
        entry = entries.find(reference)
        repo = reference.repo or (entry.repo if entry else None)
        if repo is None:
            raise Usage(
                tr("{name} has no repository to pull from", name=str(reference)),
                hint=tr("give owner/repo, or a source in your models.toml"),
                code="pull.no_source",
            )
        revision = entry.revision if entry and entry.repo == repo else reference.revision
        homes.append(_Home(repo, revision or (remote.commit if remote else None) or "main", places))
    for pointer in pointers:
        for entry, _ in entries.owners_of(pointer.oid):
            if entry.repo and entry.revision:
                homes.append(_Home(entry.repo, entry.revision, places))
    if remote is not None and (remote.is_hub or explicit):
        homes.append(_Home(remote.repo, remote.commit or "main", places))
    return list(dict.fromkeys(homes))


def _served(home: _Home, path: str, pointer: Pointer, key: str | None) -> list[Candidate]:
    """The object under its name in the repository; a catalogue entry may know it under another path."""
    by_hash = {
        (entry.repo, entry.revision): file.path for entry, file in catalogue.load().owners_of(pointer.oid) if entry.repo
    }
    name = by_hash.get((home.repo, home.revision), path)
    candidates = []
    for place in home.places:
        if place.kind == "folder":
            candidates.append(folder_candidate(place, home.repo, home.revision, name))
        else:
            headers = {"Authorization": f"Bearer {key}"} if place.sends_token and key else {}
            candidates.append(Candidate(place.url(home.repo, home.revision, name), headers, label=place.label))
    return candidates


def _batches(homes: Sequence[_Home], remote: Remote | None) -> list[tuple[str, bool]]:
    """(address of a batch API, may it have the token): of each repository on each hub, and of the clone's remote."""
    addresses: dict[str, bool] = {}
    for home in homes:
        for place in home.places:
            if place.kind == "hf":
                addresses[f"{place.address}/{home.repo}.git/info/lfs/objects/batch"] = place.sends_token
    if remote is not None:
        addresses.setdefault(remote.batch_url, remote.is_hub and remote.url.startswith("https://"))
    return list(addresses.items())
