"""A hub on real sockets, with faults: what the tests of pulls and mirrors talk to.

    with LoopbackHub() as hub:
        commit = hub.add("tiny/model", {"config.json": b"{}", "model.bin": Synthetic(5_000_000)})
        hub.fault("model.bin", cut_after=100_000)            # once; times=None: always
        ... hub.url ...
        hub.requests_for("model.bin")[0].range

It is written from the hub's public behaviour and shares no code with glmchat, so the two cannot agree on a mistake.
`python loopback_hub.py --size 200000000 --files 1 --rate 25000000` serves synthetic files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MIB = 1 << 20


class Synthetic:
    """`size` bytes that are the same every time, without holding them in memory."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self._block = random.Random(seed).randbytes(MIB)

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` bytes from one block; each block begins with its number, so none repeats."""
        number, inside = divmod(offset, MIB)
        head = number.to_bytes(8, "big")
        end = min(inside + count, MIB, inside + self.size - offset)
        return head[inside:end] + self._block[max(8, inside) : end]

    def __len__(self) -> int:
        return self.size


class Whole:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, offset: int, count: int) -> bytes:
        return self.content[offset : offset + count]

    def __len__(self) -> int:
        return len(self.content)


class OnDisk:
    """A file that is too large for memory; read where it lies."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._fd).st_size

    def read(self, offset: int, count: int) -> bytes:
        return os.pread(self._fd, count, offset)

    def __len__(self) -> int:
        return self.size


Content = Synthetic | Whole | OnDisk


@dataclass
class HubFile:
    content: Content
    lfs: bool
    sha256: str
    git_blob: str

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_blob

    @staticmethod
    def of(data: bytes | Synthetic | OnDisk, lfs: bool) -> HubFile:
        content: Content = Whole(data) if isinstance(data, bytes) else data
        sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % len(content))
        at = 0
        while at < len(content):
            chunk = content.read(at, MIB)
            sha256.update(chunk)
            if not lfs:
                blob.update(chunk)
            at += len(chunk)
        if lfs:
            pointer = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {at}\n".encode()
            )
            blob = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer)
        return HubFile(content, lfs, sha256.hexdigest(), blob.hexdigest())


@dataclass
class Fault:
    """What goes wrong with the next `times` GETs (None: all) of a file. Fields combine."""

    times: int | None = 1
    status: int | None = None  # answer this instead
    retry_after: str | None = None
    ignore_range: bool = False
    cut_after: int | None = None  # close the connection after so many body bytes
    stall_after: int | None = None  # send nothing more after so many, keep the connection
    stall_seconds: float = 30.0
    content_length: int | None = None  # a lie
    total: int | None = None  # a lie in Content-Range
    start_at: int | None = None  # answer 206 from another offset
    content: bytes | None = None  # another file
    etag: str | None = None
    omit: tuple[str, ...] = ()  # response headers left out, lower case
    html: bool = False
    redirect: str | None = None  # a Location
    content_type: str | None = None
    gzip: bool = False


@dataclass
class Seen:
    """One request as it came in and what was sent."""

    method: str
    path: str
    headers: dict[str, str]
    range: tuple[int, int | None] | None = None
    sent: int = 0
    file: str = ""


@dataclass
class Repo:
    commits: dict[str, dict[str, HubFile]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    gated_by: str | None = None  # a token that is needed


@dataclass
class Window:
    """A rate limit: from the first request on everything is answered 429 for so many seconds."""

    seconds: float
    where: str  # "api" | "files"
    header: str  # "RateLimit" | "Retry-After" | ""
    said: int | None = None  # seconds that the header tells; None: the true ones
    until: float = 0.0
    refused: int = 0


class LoopbackHub:
    """Start with `with`; `url` is the endpoint. A second listener (`store_url`) plays the object store of redirects."""

    def __init__(self, *, rate: float | None = None, port: int = 0, redirect_lfs: bool = False) -> None:
        self.repos: dict[str, Repo] = {}
        self.moved: dict[str, str] = {}  # renamed repositories: answered with a 307
        self.rate = rate  # bytes per second in all
        self.redirect_lfs = redirect_lfs
        self.expired: dict[str, int] = {}  # tokens that are refused -> the status
        self.expired_where: tuple[str, ...] = ("api", "files")
        self.explains = True  # a refused token is told in X-Error-Message
        self.window: Window | None = None
        self.requests: list[Seen] = []
        self.lfs_batches: list[dict[str, Any]] = []
        self.stopping = threading.Event()
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._budget_at = time.monotonic()
        self._server = _Server(("127.0.0.1", port), self, is_store=False)
        self._store = _Server(("127.0.0.1", 0), self, is_store=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def store_url(self) -> str:
        return f"http://localhost:{self._store.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        for server in (self._server, self._store):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        for server in (self._server, self._store):
            server.shutdown()
            server.server_close()

    def add(
        self,
        name: str,
        files: Mapping[str, bytes | Synthetic | OnDisk],
        *,
        ref: str | None = "main",
        tag: str | None = None,
        commit: str | None = None,
        lfs: tuple[str, ...] = (".bin", ".safetensors", ".model", ".gguf"),
    ) -> str:
        """A new commit of `name`; -> its full id."""
        made = {path: HubFile.of(data, path.endswith(lfs)) for path, data in files.items()}
        listing = "".join(f"{path}{one.git_blob}" for path, one in sorted(made.items()))
        commit = commit or hashlib.sha1(f"{name}{listing}".encode()).hexdigest()
        repo = self.repos.setdefault(name, Repo())
        repo.commits[commit] = made
        if ref:
            repo.refs[ref] = commit
        if tag:
            repo.tags[tag] = commit
        return commit

    def file(self, name: str, path: str, commit: str | None = None) -> HubFile:
        repo = self.repos[name]
        return repo.commits[commit or repo.refs["main"]][path]

    def fault(self, path: str, **what: Any) -> None:
        """Faults of one file queue up; "*" stands for every file."""
        with self._lock:
            self._faults.setdefault(path, []).append(Fault(**what))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def next_fault(self, path: str) -> Fault:
        with self._lock:
            for key in (path, "*"):
                if waiting := self._faults.get(key):
                    fault = waiting[0]
                    if fault.times is not None:
                        fault.times -= 1
                        if fault.times <= 0:
                            waiting.pop(0)
                    return fault
        return Fault()

    def requests_for(self, path: str, method: str = "GET") -> list[Seen]:
        return [one for one in self.requests if one.file == path and one.method == method]

    def sent_for(self, path: str) -> int:
        return sum(one.sent for one in self.requests_for(path))

    def pace(self, count: int) -> None:
        """Wait so that all connections together stay under `rate`."""
        if not self.rate:
            return
        with self._lock:
            self._budget_at = max(self._budget_at, time.monotonic() - 0.05) + count / self.rate
            wait = self._budget_at - time.monotonic()
        if wait > 0:
            self.stopping.wait(wait)

    def find(self, name: str, revision: str) -> tuple[str, dict[str, HubFile]] | str:
        """-> (commit, files) or the hub's error code."""
        repo = self.repos.get(name)
        if repo is None:
            return "RepoNotFound"
        commit = repo.refs.get(revision) or repo.tags.get(revision) or revision
        return (commit, repo.commits[commit]) if commit in repo.commits else "RevisionNotFound"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], hub: LoopbackHub, *, is_store: bool) -> None:
        self.hub, self.is_store = hub, is_store
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes away is part of the game
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        super().setup()

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def _route(self) -> None:
        hub = self.server.hub
        self.seen = Seen(self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        hub.requests.append(self.seen)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if self.server.is_store:
            return self._store(path)
        where = "files" if "/resolve/" in path else "api"
        if self._limited(where) or self._expired(where):
            return None
        if found := re.fullmatch(r"/([^/]+(?:/[^/]+)?)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        if found := re.fullmatch(r"/(.+?)(?:\.git)?/info/lfs/objects/batch", path):
            return self._lfs_batch(found.group(1), json.loads(body))
        if not path.startswith("/api/models/"):
            return self._fail(404, "no such page")
        if found := re.fullmatch(r"/api/models/(.+?)/(revision|tree|paths-info|refs)(?:/([^/]+)(?:/(.*))?)?", path):
            name, what, revision, folder = found.groups()
        else:
            name, what, revision, folder = path.removeprefix("/api/models/"), "revision", "main", None
        if new := hub.moved.get(name):
            return self._redirect(307, self.path.replace(name, new))
        if self._locked(name):
            return None
        if what == "refs" and name in hub.repos:
            repo = hub.repos[name]

            def made(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
                return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": c} for n, c in refs.items()]

            return self._json({"branches": made(repo.refs, "heads"), "tags": made(repo.tags, "tags"), "converts": []})
        found_commit = hub.find(name, revision or "main")
        if isinstance(found_commit, str):
            return self._fail(404, "not found", code=found_commit)
        commit, files = found_commit
        if what == "revision":
            blobs = parse_qs(parts.query).get("blobs", [""])[0].lower() in ("true", "1")
            siblings = [{"rfilename": p, **(_sibling(one) if blobs else {})} for p, one in files.items()]
            return self._json(
                {"id": name, "modelId": name, "sha": commit, "private": False, "gated": False, "disabled": False,
                 "tags": [], "downloads": 1, "likes": 0, "lastModified": "2024-01-01T00:00:00.000Z",
                 "createdAt": "2024-01-01T00:00:00.000Z", "siblings": siblings}
            )  # fmt: skip
        if what == "paths-info":
            if "json" in (self.headers.get("content-type") or ""):
                wanted = json.loads(body)["paths"]
            else:
                wanted = parse_qs(body.decode()).get("paths", [])
            return self._json([_described(p, files[p]) for p in wanted if p in files])
        prefix = f"{folder}/" if folder else ""
        listed = [_described(p, one) for p, one in files.items() if p.startswith(prefix)]
        if prefix and not listed:
            return self._fail(404, "not found", code="EntryNotFound")
        if parse_qs(parts.query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
            listed = [one for one in listed if "/" not in one["path"].removeprefix(prefix)]
        return self._json(listed)

    def _limited(self, where: str) -> bool:
        """The hub's own form: RateLimit: "api";r=0;t=55, with no Retry-After."""
        window = self.server.hub.window
        if window is None or window.where != where:
            return False
        now = time.monotonic()
        if not window.until:
            window.until = now + window.seconds
        if now >= window.until:
            return False
        window.refused += 1
        left = window.said if window.said is not None else math.ceil(window.until - now)
        headers = {"Retry-After": str(left)} if window.header == "Retry-After" else {}
        if window.header == "RateLimit":
            headers = {
                "RateLimit": f'"resolvers";r=0;t={left}',
                "RateLimit-Policy": '"fixed window";"resolvers";q=3000;w=300',
            }
        self._fail(429, "too many requests", headers=headers)
        return True

    def _expired(self, where: str) -> bool:
        hub = self.server.hub
        status = hub.expired.get((self.headers.get("authorization") or "").removeprefix("Bearer "))
        if status is None or where not in hub.expired_where:
            return False
        words = "Invalid credentials in Authorization header"
        self._fail(status, words, headers={"X-Error-Message": words} if hub.explains else {})
        return True

    def _locked(self, name: str) -> bool:
        repo = self.server.hub.repos.get(name)
        if repo is None or repo.gated_by is None or self.headers.get("authorization") == f"Bearer {repo.gated_by}":
            return False
        self._fail(401, "Access to this model is restricted", code="GatedRepo")
        return True

    def _resolve(self, name: str, revision: str, path: str) -> None:
        hub = self.server.hub
        self.seen.file = path
        if new := hub.moved.get(name):
            return self._redirect(307, self.path.replace(name, new))
        if self._locked(name):
            return None
        found = hub.find(name, revision)
        if isinstance(found, str):
            return self._fail(404, "not found", code=found)
        commit, files = found
        if path not in files:
            return self._fail(404, "Entry not found", code="EntryNotFound", headers={"X-Repo-Commit": commit})
        one = files[path]
        fault = hub.next_fault(path) if self.command == "GET" else Fault()
        hub_headers = {"X-Repo-Commit": commit, "ETag": f'"{fault.etag or one.etag}"'}
        if one.lfs:
            hub_headers |= {"X-Linked-Etag": f'"{one.sha256}"', "X-Linked-Size": str(len(one.content))}
        for name_ in [n for n in hub_headers if n.lower() in fault.omit]:
            del hub_headers[name_]
        if fault.redirect:
            return self._redirect(302, fault.redirect, hub_headers)
        if one.lfs and hub.redirect_lfs:
            return self._redirect(302, f"{hub.store_url}/{one.sha256}?signature=secret", hub_headers)
        self._send(one.content, fault, hub_headers)
        return None

    def _store(self, path: str) -> None:
        """The object store behind redirects: content by sha256, its own ETags, no hub headers."""
        for repo in self.server.hub.repos.values():
            for files in repo.commits.values():
                for name, one in files.items():
                    if one.sha256 == path.strip("/"):
                        self.seen.file = name
                        fault = self.server.hub.next_fault(name) if self.command == "GET" else Fault()
                        etag = fault.etag or hashlib.md5(one.sha256.encode()).hexdigest() + "-7"
                        return self._send(one.content, fault, {"ETag": f'"{etag}"'})
        return self._fail(404, "no such key")

    def _send(self, content: Content, fault: Fault, headers: dict[str, str]) -> None:
        if fault.status:
            extra = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            return self._fail(fault.status, "a fault", headers=extra)
        if fault.html:
            content, fault.content_type, fault.ignore_range = Whole(b"<html>please log in</html>"), "text/html", True
        if fault.content is not None:
            content = Whole(fault.content)
        if fault.gzip:
            import gzip

            content, fault.ignore_range = Whole(gzip.compress(content.read(0, len(content)))), True
            headers["Content-Encoding"] = "gzip"
        size, start, end, status = len(content), 0, len(content), 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range") or "")
        if asked:
            self.seen.range = (int(asked.group(1)), int(asked.group(2)) if asked.group(2) else None)
        condition = self.headers.get("if-range")
        if asked and not fault.ignore_range and (condition is None or condition == headers.get("ETag")):
            start, status = int(asked.group(1)), 206
            end = min(size, int(asked.group(2)) + 1) if asked.group(2) else size
            if start >= size:
                return self._fail(416, "out of range", headers={"Content-Range": f"bytes */{fault.total or size}"})
            if fault.start_at is not None:
                start = fault.start_at
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{fault.total or size}"
        headers |= {
            "Content-Type": fault.content_type or "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Content-Length": str(fault.content_length if fault.content_length is not None else end - start),
        }
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in fault.omit:
                self.send_header(name, value)
        if "content-length" in fault.omit:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return None
        self._body(content, start, end, fault)
        if fault.content_length is not None or "content-length" in fault.omit or fault.cut_after is not None:
            self.close_connection = True
        return None

    def _body(self, content: Content, start: int, end: int, fault: Fault) -> None:
        hub = self.server.hub
        at = start
        while at < end and not hub.stopping.is_set():
            limits = [end - at, 64 * 1024]
            for stop in (fault.cut_after, fault.stall_after):
                if stop is not None:
                    limits.append(stop - (at - start))
            count = min(limits)
            if count <= 0:
                if fault.stall_after is not None:
                    hub.stopping.wait(fault.stall_seconds)
                self.close_connection = True
                return
            chunk = content.read(at, count)
            hub.pace(len(chunk))
            self.wfile.write(chunk)
            at += len(chunk)
            self.seen.sent += len(chunk)

    def _lfs_batch(self, name: str, asked: dict[str, Any]) -> None:
        """git-lfs' batch API (github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md)."""
        self.server.hub.lfs_batches.append(asked)
        known = {one.sha256: one for files in self.server.hub.repos[name].commits.values() for one in files.values()}
        objects = []
        for item in asked["objects"]:
            if one := known.get(item["oid"]):
                action = {"download": {"href": f"{self.server.hub.store_url}/{one.sha256}", "header": {"X-Store": "1"}}}
                objects.append({**item, "size": len(one.content), "actions": action})
            else:
                objects.append({**item, "error": {"code": 404, "message": "Object does not exist"}})
        self._json({"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _redirect(self, status: int, location: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", {**(headers or {}), "Location": location})

    def _json(self, data: Any, kind: str = "application/json") -> None:
        self._answer(200, json.dumps(data).encode(), {"Content-Type": kind})

    def _fail(self, status: int, words: str, *, code: str = "", headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": words} if code else {}
        self._answer(status, json.dumps({"error": words}).encode(), {**extra, **(headers or {})})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _described(path: str, one: HubFile) -> dict[str, Any]:
    data: dict[str, Any] = {"type": "file", "path": path, "size": len(one.content), "oid": one.git_blob}
    if one.lfs:
        data["lfs"] = {"oid": one.sha256, "sha256": one.sha256, "size": len(one.content), "pointerSize": 134}
    return data


def _sibling(one: HubFile) -> dict[str, Any]:
    """The same facts under the names that model info has for them."""
    data = _described("", one)
    found = {"size": data["size"], "blobId": data["oid"]}
    return {**found, "lfs": data["lfs"]} if one.lfs else found


def main() -> None:
    """Serve synthetic files for the benchmarks, until killed; the first line on stdout is the address."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=200_000_000)
    parser.add_argument("--files", type=int, default=1)
    parser.add_argument("--rate", type=float, default=None)
    options = parser.parse_args()
    with LoopbackHub(rate=options.rate) as hub:
        each = options.size // options.files
        files: dict[str, bytes | Synthetic] = {
            f"model-{i + 1:05d}-of-{options.files:05d}.safetensors": Synthetic(each, seed=i)
            for i in range(options.files)
        }
        hub.add("bench/model", {"config.json": b'{"model_type": "gpt2"}', **files})
        print(hub.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
