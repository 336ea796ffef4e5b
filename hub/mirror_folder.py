"""A mirror in a folder: on a disk, a NAS or a USB stick. Its layout, and how it is read.

    DIR/glmchat-mirror.json              says what this is
    DIR/README.txt                       the same for people
    DIR/owner--name/refs.json            {"branches": {"main": COMMIT}, "tags": {}}
    DIR/owner--name/COMMIT.json          path, size, sha256, git blob of each file; written last
    DIR/owner--name/COMMIT.sha256        the same for `sha256sum -c`
    DIR/owner--name/COMMIT/...           the files themselves, plain, ready to be copied or loaded from
    DIR/owner--name/.partial/            what an unfinished `glmchat mirror` left

Plain files and no links, because exFAT and SMB know none; JSON, because it outlives programs. All of it is read as
something a stranger wrote: names are checked, links that leave the folder are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged, Failed, GlmchatError, Hostile, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub.file_request import Candidate
from glmchat.hub.references import checked_repo, is_commit
from glmchat.hub.safe_paths import check_listing, inside

MARKER = "glmchat-mirror.json"
FORMAT = 1
_MAX_JSON = 64_000_000  # bytes; a listing of 100,000 files is a third of this


@dataclass(frozen=True, slots=True)
class MirrorFile:
    path: str
    size: int
    sha256: str
    git_blob: str  # of the file; of its pointer if `lfs`
    lfs: bool

    @property
    def etag(self) -> str:
        """What a hub sends as ETag, and the name of the blob in a Hugging Face cache."""
        return self.sha256 if self.lfs else self.git_blob


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One repository at one commit, complete."""

    repo: str
    commit: str
    files: tuple[MirrorFile, ...]
    date: str = ""  # when it was mirrored, ISO 8601
    source: str = ""  # where the listing came from

    def to_json(self) -> dict[str, Any]:
        files = [
            {"path": f.path, "size": f.size, "sha256": f.sha256, "git_blob": f.git_blob, "lfs": f.lfs}
            for f in self.files
        ]
        return {
            "format": FORMAT, "repo": self.repo, "commit": self.commit, "date": self.date, "source": self.source,
            "files": files,
        }  # fmt: skip


class MirrorFolder:
    """Reads a mirror. Raises Usage if `root` is none; every method raises Damaged or Hostile for what is not right."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        marker = _read_json(self.root / MARKER)
        if marker is None:
            raise Usage(
                tr("{path} is not a mirror folder: it has no {marker}", path=one_line(str(root)), marker=MARKER),
                hint=tr("`glmchat mirror NAME DIR` creates one"),
                code="mirror.none",
            )
        if marker.get("format") != FORMAT:
            raise Usage(
                tr(
                    "{path} is a mirror in format {format}",
                    path=one_line(str(root)),
                    format=one_line(str(marker.get("format")), 20),
                ),
                hint=tr("this version of glmchat reads format {format}; update glmchat", format=FORMAT),
                code="mirror.format",
            )

    def repos(self) -> list[str]:
        """Names of all repositories with at least one complete commit."""
        names = []
        for folder in sorted(self.root.iterdir()):
            name = folder.name.replace("--", "/", 1)
            if folder.is_dir() and _is_repo(name) and self.commits(name):
                names.append(name)
        return names

    def find(self, repo: str) -> str | None:
        """The name under which `repo` is here, upper and lower case aside."""
        if _is_repo(repo) and self.folder(repo).is_dir():
            return repo
        return next((name for name in self.repos() if name.lower() == repo.lower()), None)

    def folder(self, repo: str) -> Path:
        return self.root / checked(repo).replace("/", "--")

    def commits(self, repo: str) -> list[str]:
        return sorted(path.stem for path in self.folder(repo).glob("*.json") if is_commit(path.stem))

    def refs(self, repo: str) -> tuple[dict[str, str], dict[str, str]]:
        """(branches, tags): name -> commit. Those that point nowhere are left out."""
        data = _read_json(self.folder(repo) / "refs.json") or {}
        here = set(self.commits(repo))

        def part(key: str) -> dict[str, str]:
            value = data.get(key)
            items = value.items() if isinstance(value, dict) else ()
            return {str(name): commit for name, commit in items if isinstance(commit, str) and commit in here}

        return part("branches"), part("tags")

    def resolve(self, repo: str, revision: str | None = None) -> str | None:
        """The commit of a branch, tag, commit or seven digits of one (None: the main branch), or None if unknown."""
        branches, tags = self.refs(repo)
        commits = self.commits(repo)
        if revision is None:
            return branches.get("main") or branches.get("master") or (commits[0] if len(commits) == 1 else None)
        name = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if tip := branches.get(name) or tags.get(name):
            return tip
        started = [commit for commit in commits if len(revision) >= 7 and commit.startswith(revision)]
        return started[0] if len(started) == 1 else None

    def snapshot(self, repo: str, commit: str) -> Snapshot:
        """The listing of one complete commit. Raises Failed if it is not here, Damaged or Hostile if it is wrong."""
        path = self.folder(repo) / f"{commit}.json"
        data = _read_json(path) if is_commit(commit) else None
        if data is None:
            raise Failed(
                tr(
                    "the mirror {path} has no {what}",
                    path=one_line(str(self.root)),
                    what=f"{repo}@{one_line(commit, 40)}",
                ),
                hint=tr("`glmchat mirror NAME@REV DIR` adds it"),
                code="mirror.missing",
            )
        try:
            files = tuple(_file(item) for item in data["files"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            raise _unreadable(path) from None
        check_listing((file.path for file in files), source=f"the mirror folder {one_line(str(self.root))}")
        return Snapshot(repo, commit, files, str(data.get("date", "")), str(data.get("source", "")))

    def path(self, repo: str, commit: str, path: str) -> Path:
        """Where a file lies. Raises Hostile if a link takes it out of the mirror."""
        relative = f"{checked(repo).replace('/', '--')}/{commit}/{path}"
        return inside(self.root, relative, source=f"the mirror folder {one_line(str(self.root))}")

    def candidate(self, repo: str, commit: str, path: str) -> Candidate:
        """The file for the downloader, which checks the link again when it opens it."""
        place = self.folder(repo) / commit / path
        return Candidate(place.as_uri(), label=str(self.root), folder=self.root)


def checked(repo: str) -> str:
    """A repository name that is safe as a folder name. Takes `gpt2` as well as `owner/name`. Raises Usage."""
    return repo if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._]*(-[A-Za-z0-9._]+)*", repo) else checked_repo(repo)


def _is_repo(name: str) -> bool:
    try:
        checked(name)
    except GlmchatError:
        return False
    return True


def _file(item: Mapping[str, Any]) -> MirrorFile:
    file = MirrorFile(
        str(item["path"]), int(item["size"]), str(item["sha256"]), str(item["git_blob"]), bool(item["lfs"])
    )
    if file.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", file.sha256) or not is_commit(file.git_blob):
        raise ValueError(file.path)
    return file


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file of the mirror; None if there is no such file. A link is refused: it may lead anywhere."""
    if path.is_symlink():
        raise Hostile(
            tr("{path} is a link", path=one_line(str(path))),
            hint=tr("a mirror may contain only plain files"),
            code="mirror.link",
        )
    if not path.exists():
        return None
    try:
        return read_json(path, _MAX_JSON)
    except Damaged:
        raise _unreadable(path) from None


def _unreadable(path: Path) -> Damaged:
    return Damaged(
        tr("{path} cannot be read as part of a mirror", path=one_line(str(path))),
        hint=tr("run `glmchat mirror NAME DIR` again: it checks and completes what is there"),
        code="mirror.damaged",
    )
