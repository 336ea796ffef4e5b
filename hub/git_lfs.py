"""git-lfs pointer files: the 130 bytes that stand where a weight should, after a clone without git-lfs.

Format: github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from glmchat.checkpoints.weight_files import Pointer, parse_pointer, pointer_text
from glmchat.core.errors import GlmchatError
from glmchat.core.files import read_text
from glmchat.core.http import host_of, make_client, network_error
from glmchat.core.http_bounds import Bounds
from glmchat.hub.file_request import Candidate
from glmchat.hub.references import is_commit
from glmchat.hub.store import git_blob_of_bytes


def pointer_blob(oid: str, size: int) -> str:
    """The git blob id that a hub lists as `oid` of an LFS file: that of its pointer."""
    return git_blob_of_bytes(pointer_text(Pointer(oid, size)))


def find_pointers(folder: Path) -> Iterator[tuple[str, Pointer]]:
    """(relative path, pointer) of every pointer file under `folder`, in order, without `.git`."""
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if ".git" not in relative.parts and path.is_file() and (pointer := parse_pointer(path)):
            yield relative.as_posix(), pointer


_JSON = "application/vnd.git-lfs+json"
_MAX_CONFIG = 1_000_000  # bytes
_HUBS = ("huggingface.co", "hf.co")


@dataclass(frozen=True, slots=True)
class Remote:
    """The origin of a clone as https address without user and password."""

    url: str  # https://host/owner/name, no .git
    commit: str | None  # what is checked out

    @property
    def repo(self) -> str:
        """owner/name: the path of the address, for hubs that have no more than that."""
        return "/".join(urlsplit(self.url).path.strip("/").split("/")[-2:])

    @property
    def is_hub(self) -> bool:
        host = (urlsplit(self.url).hostname or "").lower()
        return host in _HUBS or host.endswith(tuple("." + one for one in _HUBS))

    @property
    def batch_url(self) -> str:
        return f"{self.url}.git/info/lfs/objects/batch"


def read_remote(folder: Path) -> Remote | None:
    """The remote `origin` (or the only one) of the clone at `folder`; None if it is no clone or has no web address."""
    git = _git_folder(folder)
    if git is None:
        return None
    config = _text(_common_folder(git) / "config")
    remotes: dict[str, str] = {}
    section = ""
    for line in config.splitlines():
        if match := re.fullmatch(r'\s*\[\s*remote\s+"([^"]*)"\s*\]\s*', line):
            section = match.group(1)
        elif re.match(r"\s*\[", line):
            section = ""
        elif section and (match := re.fullmatch(r"\s*url\s*=\s*(\S+)\s*", line)):
            remotes.setdefault(section, match.group(1))
    address = remotes.get("origin") or next(iter(remotes.values()), "")
    url = web_address(address)
    return Remote(url, _head(git)) if url else None


def objects_folder(folder: Path) -> Path | None:
    """Where git-lfs keeps what it fetched but did not check out: .git/lfs/objects/aa/bb/<oid>."""
    git = _git_folder(folder)
    return _common_folder(git) / "lfs" / "objects" if git is not None else None


def web_address(remote: str) -> str | None:
    """`git@host:owner/name.git`, `ssh://…` and `https://user:token@host/…` as a plain https (or http) address."""
    ssh = r"ssh://(?:[\w.-]+@)?([\w.-]+)(?::\d+)?/([\w./-]+)|[\w.-]+@([\w.-]+):([\w./-]+)"
    if match := re.fullmatch(ssh, remote):
        host, path = match.group(1) or match.group(3), match.group(2) or match.group(4)
        return f"https://{host}/{path.strip('/').removesuffix('.git')}"
    try:
        parts = urlsplit(remote)
    except ValueError:  # http://[/
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    return f"{parts.scheme}://{host_of(remote)}{parts.path.rstrip('/').removesuffix('.git')}"


def ask_batch(
    url: str, pointers: Sequence[Pointer], headers: Mapping[str, str]
) -> tuple[dict[str, Candidate], str | None]:
    """(oid -> where it is served, what went wrong): one request for all objects. Never raises for the network."""
    import httpx2

    distinct = list({one.oid: one for one in pointers}.values())
    body = {
        "operation": "download",
        "transfers": ["basic"],
        "hash_algo": "sha256",
        "objects": [{"oid": one.oid, "size": one.size} for one in distinct],
    }
    try:
        with make_client(timeout=15.0, follow_redirects=True, bounds=Bounds()) as client:
            answer = client.post(url, json=body, headers={"Accept": _JSON, "Content-Type": _JSON, **headers})
        if answer.status_code != 200:
            return {}, f"{host_of(url)} answered {answer.status_code}"
        objects = answer.json()["objects"]
        candidates = {one.oid: candidate for one in distinct if (candidate := _download(one, objects)) is not None}
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        return {}, network_error(error, url).message
    except GlmchatError as error:
        return {}, error.message
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}, f"{host_of(url)} does not speak the LFS batch API"
    return candidates, None


def _download(pointer: Pointer, objects: Any) -> Candidate | None:
    for item in objects:
        if item.get("oid") == pointer.oid and (action := item.get("actions", {}).get("download")):
            headers = {str(name): str(value) for name, value in action.get("header", {}).items()}
            if urlsplit(str(action["href"])).scheme in ("http", "https"):
                return Candidate(str(action["href"]), headers)
    return None


def _git_folder(folder: Path) -> Path | None:
    """`.git` itself, or where a worktree's or submodule's `.git` file points."""
    git = folder / ".git"
    if git.is_dir():
        return git
    if match := re.fullmatch(r"gitdir: (.+)\n?", _text(git)):
        target = (folder / match.group(1)).resolve()
        return target if target.is_dir() else None
    return None


def _common_folder(git: Path) -> Path:
    """Worktrees share config and objects with the clone they belong to."""
    common = _text(git / "commondir").strip()
    return (git / common).resolve() if common else git


def _head(git: Path) -> str | None:
    head = _text(git / "HEAD").strip()
    if is_commit(head):
        return head
    if not head.startswith("ref: refs/") or ".." in head:
        return None
    name = head.removeprefix("ref: ")
    common = _common_folder(git)
    loose = _text(common / name).strip()
    if is_commit(loose):
        return loose
    for line in _text(common / "packed-refs").splitlines():
        commit, _, packed = line.partition(" ")
        if packed == name and is_commit(commit):
            return commit
    return None


def _text(path: Path) -> str:
    try:
        if path.is_file() and path.stat().st_size <= _MAX_CONFIG:
            return read_text(path, _MAX_CONFIG, errors="replace")
    except OSError:
        return ""
    return ""
