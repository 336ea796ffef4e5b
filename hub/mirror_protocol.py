"""The hub's own protocol over a mirror folder: what each request is answered with, without a socket.

Model info, tree, paths-info, refs, and resolve with HEAD, GET, Range, ETag and the X- headers, as huggingface_hub and
transformers ask for them. Read-only: there is nothing here that writes.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from glmchat import __version__
from glmchat.checkpoints.weight_files import Pointer, pointer_text
from glmchat.core.errors import GlmchatError, Hostile, Usage
from glmchat.core.language import tr
from glmchat.hub.mirror_folder import MirrorFile, MirrorFolder, Snapshot
from glmchat.hub.safe_paths import safe_path

_REPO_PARTS = (2, 1)  # owner/name, or a bare name such as gpt2


@dataclass(frozen=True, slots=True)
class FilePart:
    """`count` bytes of a file from `start` on, to be sent as they are."""

    path: Path
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | FilePart = b""
    length: int | None = None  # Content-Length where it is not the body's (HEAD)


class MirrorProtocol:
    """Answers requests about one mirror. Thread-safe; sees what `glmchat mirror` adds while it runs."""

    def __init__(self, mirror: MirrorFolder) -> None:
        self._mirror = mirror
        self._snapshots: dict[tuple[str, str], tuple[Snapshot, dict[str, MirrorFile]]] = {}
        self._lock = threading.Lock()

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes = b"") -> HttpAnswer:
        """headers: names in lower case. Never raises for what a client sent; a damaged mirror answers 500."""
        try:
            url = urlsplit(target)
        except ValueError:  # http://[/
            return _fail(400, "", "the request names no page")
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            if method == "POST" and "paths-info" not in parts:
                return _fail(405, "", "this mirror is read-only", {"Allow": "GET, HEAD"})
            if parts == [""]:
                return self._welcome()
            if parts[:2] == ["api", "models"]:
                return self._api(parts[2:], query, headers, body)
            return self._file(method, parts, headers)
        except Hostile as problem:
            return _fail(403, "", problem.message)
        except Usage as problem:  # a name that cannot be a repository
            return _fail(404, "RepoNotFound", problem.message)
        except GlmchatError as problem:
            return _fail(500, "", problem.message)

    # -- listings ----------------------------------------------------------------------------------------------------

    def _welcome(self) -> HttpAnswer:
        names = "\n".join(self._mirror.repos())
        text = f"A mirror of models, served by glmchat {__version__}. Use this address as HF_ENDPOINT.\n\n{names}\n"
        return HttpAnswer(200, {"Content-Type": "text/plain; charset=utf-8"}, text.encode())

    def _api(self, parts: list[str], query: Mapping[str, str], headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        if not parts or parts == [""]:
            search = query.get("search", "").lower()
            return _json([_brief(name) for name in self._mirror.repos() if search in name.lower()])
        for count in _REPO_PARTS:
            what = parts[count] if len(parts) > count else ""
            if what in ("", "revision", "tree", "paths-info", "refs") and len(parts) >= count:
                return self._about("/".join(parts[:count]), what, parts[count + 1 :], query, headers, body)
        return _fail(404, "RepoNotFound", "no such repository")

    def _about(
        self, repo: str, what: str, rest: list[str], query: Mapping[str, str], headers: Mapping[str, str], body: bytes
    ) -> HttpAnswer:
        name = self._mirror.find(repo)
        if name is None:
            return _no_repo(repo)
        if what == "refs":
            branches, tags = self._mirror.refs(name)
            return _json({"branches": _refs(branches, "heads"), "tags": _refs(tags, "tags"), "converts": []})
        contents = self._snapshot(name, rest[0] if rest else "main")
        if contents is None:
            return _no_revision(name, rest[0] if rest else "main")
        snapshot, files = contents
        if what == "tree":
            return _tree(snapshot, "/".join(rest[1:]).strip("/"), _is_true(query.get("recursive")))
        if what == "paths-info":
            return _json(_paths_info(_asked_paths(headers, body), files))
        return _json(_info(snapshot, blobs=_is_true(query.get("blobs"))))

    def _snapshot(self, name: str, revision: str) -> tuple[Snapshot, dict[str, MirrorFile]] | None:
        commit = self._mirror.resolve(name, revision)
        if commit is None:
            return None
        with self._lock:  # a commit never changes, so its listing is read once
            if (name, commit) not in self._snapshots:
                snapshot = self._mirror.snapshot(name, commit)
                self._snapshots[name, commit] = snapshot, {file.path: file for file in snapshot.files}
            return self._snapshots[name, commit]

    # -- files -------------------------------------------------------------------------------------------------------

    def _file(self, method: str, parts: list[str], headers: Mapping[str, str]) -> HttpAnswer:
        for count in _REPO_PARTS:
            if len(parts) > count + 2 and parts[count] in ("resolve", "raw"):
                repo, how, revision, path = "/".join(parts[:count]), parts[count], parts[count + 1], parts[count + 2 :]
                break
        else:
            return _fail(404, "", "no such page")
        name = self._mirror.find(repo)
        if name is None:
            return _no_repo(repo)
        contents = self._snapshot(name, revision)
        if contents is None:
            return _no_revision(name, revision)
        snapshot, files = contents
        file = files.get(safe_path("/".join(path), source="the request"))
        commit = {"X-Repo-Commit": snapshot.commit}
        if file is None:
            return _fail(404, "EntryNotFound", f"{'/'.join(path)} is not in {name}", commit)
        if how == "raw" and file.lfs:
            text = pointer_text(Pointer(file.sha256, file.size))
            return HttpAnswer(200, {**commit, "Content-Type": "text/plain; charset=utf-8"}, text)
        place = self._mirror.path(name, snapshot.commit, file.path)
        try:
            size = place.stat().st_size
        except OSError:
            size = -1
        if size != file.size:
            return _fail(500, "", f"the mirror's copy of {file.path} is damaged", commit)
        return _slice(method, place, file, commit, headers)


def _slice(
    method: str, place: Path, file: MirrorFile, commit: dict[str, str], headers: Mapping[str, str]
) -> HttpAnswer:
    tag = f'"{file.etag}"'
    sent = {
        **commit,
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "X-Content-Type-Options": "nosniff",
        "Content-Disposition": "attachment",
    }
    if file.lfs:
        sent |= {"X-Linked-Etag": tag, "X-Linked-Size": str(file.size)}
    if tag in [one.strip() for one in headers.get("if-none-match", "").split(",")]:
        return HttpAnswer(304, sent)
    start, end, status = 0, file.size, 200
    asked = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", headers.get("range", "").replace(" ", ""))
    if asked and any(asked.groups()) and headers.get("if-range", tag) == tag:
        first, last = asked.groups()
        if first:
            start, end = int(first), min(file.size, int(last) + 1) if last else file.size
        else:
            start = max(0, file.size - int(last))
        if start >= end:
            return _fail(416, "", "no such bytes", {**commit, "Content-Range": f"bytes */{file.size}"})
        status = 206
        sent["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
    count = end - start
    return HttpAnswer(status, sent, b"" if method == "HEAD" else FilePart(place, start, count), count)


def _tree(snapshot: Snapshot, folder: str, recursive: bool) -> HttpAnswer:
    prefix = f"{folder}/" if folder else ""
    under = [file for file in snapshot.files if file.path.startswith(prefix)]
    if folder and not under:
        return _fail(404, "EntryNotFound", "no such folder", {"X-Repo-Commit": snapshot.commit})
    items: dict[str, dict[str, Any]] = {}
    for file in under:
        steps = file.path.removeprefix(prefix).split("/")
        for depth in range(1, len(steps) if recursive else min(2, len(steps))):
            path = prefix + "/".join(steps[:depth])
            items.setdefault(path, _directory(path))
        if recursive or len(steps) == 1:
            items[file.path] = _entry(file)
    return _json(list(items.values()))


def _paths_info(paths: list[str], files: Mapping[str, MirrorFile]) -> list[dict[str, Any]]:
    entries = []
    for path in paths:
        if path in files:
            entries.append(_entry(files[path]))
        elif any(name.startswith(f"{path.strip('/')}/") for name in files):
            entries.append(_directory(path.strip("/")))
    return entries


def _asked_paths(headers: Mapping[str, str], body: bytes) -> list[str]:
    try:
        if "json" in headers.get("content-type", ""):
            paths = json.loads(body).get("paths", [])
        else:
            paths = parse_qs(body.decode()).get("paths", [])
    except (ValueError, AttributeError, RecursionError):
        raise Usage(
            tr("the request does not name any paths"), hint=tr("send paths=..."), code="mirror.request"
        ) from None
    listed = [paths] if isinstance(paths, str) else paths if isinstance(paths, list) else []
    return [path for path in listed if isinstance(path, str)]


def _entry(file: MirrorFile) -> dict[str, Any]:
    data: dict[str, Any] = {"type": "file", "oid": file.git_blob, "size": file.size, "path": file.path}
    if file.lfs:
        data["lfs"] = _lfs(file)
    return data


def _lfs(file: MirrorFile) -> dict[str, Any]:
    pointer = len(pointer_text(Pointer(file.sha256, file.size)))
    return {"oid": file.sha256, "sha256": file.sha256, "size": file.size, "pointerSize": pointer}


def _directory(path: str) -> dict[str, Any]:
    # A tree's id would need git's own tree objects; the path's hash is as unique and is never compared by clients.
    from glmchat.hub.store import git_blob_of_bytes

    return {"type": "directory", "oid": git_blob_of_bytes(path.encode()), "size": 0, "path": path}


def _info(snapshot: Snapshot, *, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = []
    for file in snapshot.files:
        item: dict[str, Any] = {"rfilename": file.path}
        if blobs:
            item |= {"size": file.size, "blobId": file.git_blob} | ({"lfs": _lfs(file)} if file.lfs else {})
        siblings.append(item)
    date = f"{snapshot.date[:19] or '1970-01-01T00:00:00'}.000Z"
    return {
        **_brief(snapshot.repo), "sha": snapshot.commit, "lastModified": date, "createdAt": date, "siblings": siblings,
    }  # fmt: skip


def _brief(name: str) -> dict[str, Any]:
    owner = name.partition("/")[0] if "/" in name else None
    return {
        "id": name, "modelId": name, "author": owner, "private": False, "gated": False, "disabled": False,
        "downloads": 0, "likes": 0, "tags": [],
    }  # fmt: skip


def _refs(refs: Mapping[str, str], kind: str) -> list[dict[str, str]]:
    return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": commit} for name, commit in refs.items()]


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1")


def _json(data: Any) -> HttpAnswer:
    return HttpAnswer(200, {"Content-Type": "application/json; charset=utf-8"}, json.dumps(data).encode())


def _no_repo(repo: str) -> HttpAnswer:
    return _fail(404, "RepoNotFound", f"{repo} is not in this mirror")


def _no_revision(repo: str, revision: str) -> HttpAnswer:
    return _fail(404, "RevisionNotFound", f"{revision} of {repo} is not in this mirror")


def _fail(status: int, code: str, words: str, extra: Mapping[str, str] | None = None) -> HttpAnswer:
    """An error as the hub words it. The message goes into a header, so nothing but printable ASCII is left in it."""
    header = "".join(c if " " <= c <= "~" else "?" for c in words)[:200]
    headers = {"Content-Type": "application/json", "X-Error-Message": header, **(extra or {})}
    if code:
        headers["X-Error-Code"] = code
    return HttpAnswer(status, headers, json.dumps({"error": words}).encode())
