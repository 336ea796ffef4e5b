"""Hubs that lie, answer with something else, or try to write where they should not; and what a token never reaches.

Covers hub/sources.py, hub/safe_paths.py, hub/selection.py.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hub_helpers import COMMIT_A, CONFIG, git_blob, glmchat, last_json, sha256
from loopback_hub import LoopbackHub, Synthetic

from glmchat.core import locations
from glmchat.hub import lookup, store
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

SECRET = "hf_thisMustNeverBeSeen"


def everything_below(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []


@pytest.mark.parametrize(
    "path",
    [
        "../../x", "..", "/etc/cron.d/x", "C:/windows/x", "c:x", "a\\..\\b", "nul", "sub/CON.json", "a\0b", "a\x1b[2Jb",
        "x/../../y", "a//b", "trailing.", "x" * 300, "~/.bashrc",
    ],
)  # fmt: skip
def test_a_listing_with_a_hostile_name_is_refused_whole(
    path: str, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any, own_home: Path
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    loopback_hub.add("bad/model", {"config.json": CONFIG, path: b"x", "model.safetensors": b"w"})
    code, out, err = glmchat(capsys, "pull", "bad/model", "--all", "--json")
    assert code == 3
    assert last_json(out)["event"] == "error"
    assert "\x1b" not in err and "\0" not in err
    assert everything_below(locations.hf_cache()) == []
    assert not (own_home / "x").exists()


def test_names_that_meet_on_a_disk_without_case_are_refused(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    loopback_hub.add("bad/model", {"config.json": CONFIG, "Config.json": b"x", "model.safetensors": b"w"})
    assert glmchat(capsys, "pull", "bad/model")[0] == 3


@contextmanager
def server(answer: Any) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server whose answer to everything is answer(path) -> (status, headers, body); -> its address, headers seen."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append({k.lower(): v for k, v in self.headers.items()})
            status, headers, body = answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads, running.block_on_close = True, False
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}", seen
    finally:
        running.shutdown()
        running.server_close()


def as_json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def listing(**changes: Any) -> dict[str, Any]:
    sibling = {"rfilename": "config.json", "size": 3, "blobId": "0" * 40}
    return {"id": "a/b", "sha": COMMIT_A, "siblings": [sibling], **changes}


@pytest.mark.parametrize(
    "body",
    [
        (200, {"Content-Type": "text/html"}, b"<html>please log in</html>"),
        (200, {"Content-Type": "application/json"}, b"[" * 100_000),
        as_json([1, 2]),
        as_json({"id": "a/b", "siblings": []}),
        as_json(listing(sha="../../../etc")),
        as_json(listing(siblings=[{"rfilename": "config.json", "size": 3, "blobId": "../../x"}])),
        as_json(listing(siblings=[{"rfilename": "config.json", "size": -3, "blobId": "0" * 40}])),
        as_json(listing(siblings=[{"rfilename": "config.json", "size": "many", "blobId": "0" * 40}])),
        as_json(listing(siblings=[{"rfilename": 7, "size": 3, "blobId": "0" * 40}])),
        as_json(listing(siblings=[{"rfilename": "m", "lfs": {"sha256": "/x", "size": 3, "pointerSize": 1}}])),
    ],
)  # fmt: skip
def test_what_is_no_listing_is_refused_with_one_line(body: Any, capsys: Any) -> None:
    with server(lambda _: body) as (address, _seen):
        code, out, err = glmchat(capsys, "pull", "a/b", "--endpoint", address, "--json")
    assert code == 3, err
    assert last_json(out)["code"] == "pull.not_a_hub"
    assert "<html>" not in err
    assert len(err.strip().splitlines()) == 2
    assert everything_below(locations.hf_cache()) == []


def test_a_commit_that_was_asked_for_is_not_traded_for_another(capsys: Any) -> None:
    with server(lambda _: as_json(listing())) as (address, _seen):
        code, _, err = glmchat(capsys, "pull", f"a/b@{'c' * 40}", "--endpoint", address)
    assert code == 3
    assert "a different commit" in err


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
def test_a_refusal_is_one_line_with_a_hint(status: int, capsys: Any) -> None:
    with server(lambda _: (status, {}, b"<html>no</html>")) as (address, _seen):
        code, _, err = glmchat(capsys, "pull", "a/b", "--endpoint", address)
    assert code == 1
    assert "hint" in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 2


def test_nobody_there_is_a_network_error(capsys: Any) -> None:
    code, out, err = glmchat(capsys, "pull", "a/b", "--endpoint", "http://127.0.0.1:9", "--json")
    assert code == 1
    assert last_json(out)["code"] == "pull.network"
    assert "127.0.0.1:9" in err


def test_the_token_goes_to_the_hub_and_to_nobody_else(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Not to a mirror named with --endpoint, not to the object store that the hub redirects to."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    loopback_hub.redirect_lfs = True
    loopback_hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": Synthetic(1_000_000)})
    code, out, err = glmchat(capsys, "pull", "tiny/model", "--json")
    assert code == 0
    carried = {(one.headers.get("host"), "authorization" in one.headers) for one in loopback_hub.requests}
    assert (loopback_hub.url.removeprefix("http://"), True) in carried
    assert (loopback_hub.store_url.removeprefix("http://"), True) not in carried
    assert (loopback_hub.store_url.removeprefix("http://"), False) in carried
    manifest_text = "".join(p.read_text() for p in locations.manifests_dir().glob("*.json"))
    assert SECRET not in out + err + manifest_text
    with server(lambda _: (500, {}, b"")) as (address, seen):
        _, out, err = glmchat(capsys, "pull", "other/model", "--endpoint", address)
    assert seen and all("authorization" not in one for one in seen)
    assert SECRET not in out + err


def test_with_an_endpoint_the_hub_library_asks_nobody_else_and_tells_nothing_of_this_machine(
    loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    loopback_hub.add("tiny/model", {"config.json": CONFIG, "model.safetensors": b"w"})
    assert glmchat(capsys, "pull", "tiny/model", "--endpoint", loopback_hub.url)[0] == 0
    assert not any("torch/" in one.headers.get("user-agent", "") for one in loopback_hub.requests)
    assert not any("agent-harnesses" in one.path for one in loopback_hub.requests)


def test_a_token_is_in_no_error_message(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    for body in ((401, {}, b""), (500, {}, b""), (200, {}, b"<html>"), (403, {"X-Error-Message": SECRET}, b"")):
        with server(lambda _, body=body: body) as (address, seen):
            monkeypatch.setenv("HF_ENDPOINT", address)
            _, out, err = glmchat(capsys, "pull", "a/b", "--json")
        assert any(one.get("authorization") == f"Bearer {SECRET}" for one in seen)
        assert SECRET not in out + err


def test_a_password_in_an_endpoint_is_not_shown(capsys: Any) -> None:
    _, out, err = glmchat(capsys, "pull", "a/b", "--endpoint", "http://me:pass-word@127.0.0.1:9", "--json")
    assert "pass-word" not in out + err


@pytest.mark.parametrize("endpoint", ["ftp://x/y", "https://", "no-such-folder", "http://[::1"])
def test_what_is_no_endpoint_is_a_usage_error(endpoint: str, capsys: Any) -> None:
    assert glmchat(capsys, "pull", "a/b", "--endpoint", endpoint)[0] == 2


BARE = {"config.json": CONFIG, "model.safetensors": b"w" * 4000}


def without_hashes(path: str) -> tuple[int, dict[str, str], bytes]:
    """A mirror that lists names only, as half-working ones do."""
    if path.startswith("/api/models/a/b/tree"):
        return 404, {}, b"{}"
    if path.startswith("/api/"):
        return as_json(listing(siblings=[{"rfilename": p} for p in BARE]))
    content = BARE.get(path.rpartition("/")[2])
    return (404, {}, b"") if content is None else (200, {}, content)


def test_a_file_whose_hash_nobody_knows_is_refused_unless_the_host_is_trusted(capsys: Any) -> None:
    with server(without_hashes) as (address, _seen):
        code, out, err = glmchat(capsys, "pull", "a/b", "--endpoint", address, "--json")
        assert code == 1
        assert last_json(out)["code"] == "pull.no_hash"
        assert "--trust-host" in err
        code, out, err = glmchat(capsys, "pull", "a/b", "--endpoint", address, "--trust-host", "--json")
        assert code == 0, err
    row = find_installed(parse("a/b"))
    assert row is not None
    assert {f.path: f.sha256 for f in row.files} == {p: sha256(c) for p, c in BARE.items()}
    assert glmchat(capsys, "verify", "a/b")[0] == 0


def test_hashes_that_the_model_info_leaves_out_are_asked_of_the_tree(capsys: Any) -> None:
    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        if path.startswith("/api/models/a/b/tree"):
            big = {"oid": sha256(BARE["model.safetensors"]), "size": 4000, "pointerSize": 130}
            small = {"type": "file", "path": "config.json", "size": len(CONFIG), "oid": git_blob(CONFIG)}
            return as_json([small, {**small, "path": "model.safetensors", "size": 4000, "oid": "1" * 40, "lfs": big}])
        return without_hashes(path)

    with server(answer) as (address, _seen):
        code, _, err = glmchat(capsys, "pull", "a/b", "--endpoint", address)
    assert code == 0, err


MODELSCOPE = {"config.json": CONFIG, "model.safetensors": b"w" * 4000}


def modelscope_answer(path: str) -> tuple[int, dict[str, str], bytes]:
    """The parts of ModelScope's interface that a pull uses, as its own client uses them."""
    parts = urlsplit(path)
    if parts.path == "/api/v1/models/Zhipu/tiny/repo/files":
        if parse_qs(parts.query)["Revision"] not in (["master"], ["v1"]):
            return 404, {}, b"{}"
        files = [{"Path": p, "Type": "blob", "Size": len(c), "Sha256": sha256(c)} for p, c in MODELSCOPE.items()]
        return as_json({"Code": 200, "Data": {"Files": [*files, {"Path": "sub", "Type": "tree", "Size": 0}]}})
    if parts.path.startswith("/models/Zhipu/tiny/resolve/"):
        content = MODELSCOPE.get(parts.path.rpartition("/")[2])
        return (404, {}, b"") if content is None else (200, {}, content)
    return 404, {}, b""


def test_modelscope_is_a_source_of_its_own(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its repositories have branches and no commits: they get a folder of their own, not one in the hub's cache."""
    from glmchat.hub import sources

    with server(modelscope_answer) as (address, _seen):
        monkeypatch.setattr(sources, "MODELSCOPE", address)
        code, out, err = glmchat(capsys, "pull", "Zhipu/tiny", "--endpoint", "modelscope", "--json")
        assert code == 0, err
        again = glmchat(capsys, "pull", "Zhipu/tiny", "--endpoint", "modelscope")
    row = last_json(out)
    assert (row["name"], row["revision"], row["complete"]) == ("Zhipu/tiny", "master", True)
    assert Path(row["path"]).is_relative_to(locations.models_dir())
    assert not locations.hf_cache().exists()
    assert again[0] == 0 and "is already here" in again[2]
    found = find_installed(parse("Zhipu/tiny"))
    assert found is not None and {f.host for f in found.files} == {address.removeprefix("http://")}
    assert glmchat(capsys, "verify", "Zhipu/tiny")[0] == 0
    assert glmchat(capsys, "rm", "Zhipu/tiny", "--yes")[0] == 0
    assert lookup.list_installed() == []


def test_a_file_from_modelscope_counts_only_if_its_hash_is_the_catalogues(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub_helpers import hub_entry, user_catalogue

    from glmchat.hub import plan

    entry = hub_entry("glm", "me/glm", COMMIT_A, MODELSCOPE)
    entry = entry.replace(
        "[[model.file]]", '[[model.source]]\nkind = "modelscope"\nrepo = "Zhipu/tiny"\n\n[[model.file]]', 1
    )
    user_catalogue(entry)
    with server(modelscope_answer) as (address, _seen):
        monkeypatch.setattr(plan, "MODELSCOPE", address)
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        code, _, err = glmchat(capsys, "pull", "glm")
        assert code == 0, err
    row = find_installed(parse("glm"))
    assert row is not None and row.path == store.snapshot("me/glm", COMMIT_A)
    assert {f.host for f in row.files} == {address.removeprefix("http://")}
