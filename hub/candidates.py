"""Which addresses serve a file of a repository; and the small files that are read while a pull is planned.

What an index names decides which files a pull fetches, so the index is read before the plan stands: from this machine
if it is here, else from a hub, verified, and kept nowhere.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from glmchat.checkpoints.weight_files import shards_of
from glmchat.core.json_files import small_json
from glmchat.hub import store
from glmchat.hub.catalogue import KnownFile
from glmchat.hub.download import Candidate, FileRequest, Progress, download
from glmchat.hub.hf_token import token
from glmchat.hub.mirror_folder import MirrorFolder
from glmchat.hub.sources import HubEndpoint, Wait, offline, sleep_silently

_LARGEST = 64 * 2**20  # bytes of a file that is read while planning


def folder_candidate(place: HubEndpoint, repo: str, commit: str, path: str, *, trusted: bool = False) -> Candidate:
    """The file on a folder endpoint. Where the mirror has not got that commit, opening it says so."""
    mirror = MirrorFolder(Path(place.address))
    return replace(mirror.candidate(mirror.find(repo) or repo, commit, path), trusted=trusted)


def token_headers(places: Sequence[HubEndpoint]) -> Mapping[str, str]:
    """The user's token, looked up only if one of the places may have it."""
    key = token() if not offline() and any(p.sends_token for p in places) else None
    return {"Authorization": f"Bearer {key}"} if key else {}


def candidates(
    places: Sequence[HubEndpoint],
    repo: str,
    revision: str,
    path: str,
    headers: Mapping[str, str],
    *,
    trusted: bool = False,
    on_modelscope: tuple[str, str] | None = None,
) -> list[Candidate]:
    """Every place that may serve a file, in order. on_modelscope: (repository, revision) there; None: it has none."""
    found = []
    for place in places:
        if place.kind == "folder":
            found.append(folder_candidate(place, repo, revision, path, trusted=trusted))
            continue
        where = on_modelscope if place.kind == "modelscope" else (repo, revision)
        if offline() or where is None:
            continue
        sent = headers if place.sends_token else {}
        found.append(Candidate(place.url(*where, path), headers=sent, label=place.label, trusted=trusted))
    return found


@dataclass(frozen=True, slots=True)
class SmallFiles:
    """Files of one revision that are read before it is pulled."""

    repo: str
    revision: str
    files: Mapping[str, KnownFile]
    places: Sequence[HubEndpoint]
    on_modelscope: tuple[str, str] | None = None
    trusted: bool = False
    wait: Wait = sleep_silently

    def index(self, path: str) -> list[str] | None:
        """The files that an index names; None where its content cannot be had. Raises Damaged or Hostile for a bad one,
        and what a download raises."""
        with tempfile.TemporaryDirectory(prefix="glmchat-") as passing:
            file = self._bring(path, Path(passing))
            return shards_of(file) if file is not None else None

    def config(self) -> dict[str, Any]:
        """config.json; {} where there is none or it cannot be had."""
        with tempfile.TemporaryDirectory(prefix="glmchat-") as passing:
            file = self._bring("config.json", Path(passing))
            return small_json(file) if file is not None else {}

    def _bring(self, path: str, folder: Path) -> Path | None:
        known = self.files.get(path)
        if known is None or (known.size or 0) > _LARGEST:
            return None
        for here in (store.snapshot(self.repo, self.revision) / path, store.blob(self.repo, known.etag or "-")):
            if here.is_file() and here.stat().st_size == known.size:
                return here
        if not (known.sha256 or known.git_blob or self.trusted):
            return None
        serving = candidates(
            self.places,
            self.repo,
            self.revision,
            path,
            token_headers(self.places),
            trusted=self.trusted,
            on_modelscope=self.on_modelscope,
        )
        if not serving:
            return None
        place = folder / Path(path).name
        request = FileRequest(
            path, place, place.with_name(place.name + store.PARTIAL), serving, known.size, known.sha256, known.git_blob
        )
        notes: list[str] = []

        def tell(progress: Progress) -> None:
            if progress.note and progress.note not in notes:  # the hub asks to be left alone: the download waits itself
                notes.append(progress.note)
                self.wait(progress.note, 0)

        download([request], on_progress=tell, cancelled=lambda: False)
        return place
