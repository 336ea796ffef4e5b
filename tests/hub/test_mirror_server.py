"""`glmchat mirror serve`: the hub's protocol, asked by hand and by the real clients; nothing outside the folder.

Covers hub/mirror_protocol.py.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from hub_helpers import glmchat
from loopback_hub import LoopbackHub, Synthetic
from polling import wait_until

from glmchat.core.errors import Failed, Usage
from glmchat.hub.download import Candidate, FileRequest, download
from glmchat.hub.mirror import execute_mirror, plan_mirror
from glmchat.hub.mirror_server import MirrorServer
from glmchat.hub.plan import PullOptions
from glmchat.hub.references import parse

WEIGHTS = Synthetic(900_000, seed=6)
FILES: dict[str, bytes | Synthetic] = {
    "config.json": b'{"model_type": "gpt2"}',
    "model.safetensors": WEIGHTS,
    "deep/er/notes.txt": b"hello",
    "empty.txt": b"",
}


@pytest.fixture
def mirror(loopback_hub: LoopbackHub, tmp_path: Path) -> Path:
    loopback_hub.add("tiny/model", FILES, tag="v1.0")
    plan = plan_mirror(parse("tiny/model"), tmp_path / "m", PullOptions(endpoints=(loopback_hub.url,)))
    execute_mirror(plan, lambda _: None, lambda: False)
    return tmp_path / "m"


@pytest.fixture
def server(mirror: Path) -> Iterator[MirrorServer]:
    with MirrorServer(mirror, port=0) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: MirrorServer, path: str, method: str = "GET", body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """One request as it stands, no client between that would tidy the path up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def commit_of(mirror: Path) -> str:
    return json.loads((mirror / "tiny--model/refs.json").read_text())["branches"]["main"]


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs%2Fheads%2Fmain"])
def test_a_file_is_served_by_branch_tag_and_commit(server: MirrorServer, mirror: Path, revision: str) -> None:
    for name in (revision, commit_of(mirror), commit_of(mirror)[:10]):
        status, headers, body = ask(server, f"/tiny/model/resolve/{name}/model.safetensors")
        assert (status, hashlib.sha256(body).hexdigest()) == (200, headers["etag"].strip('"'))
        assert headers["x-repo-commit"] == commit_of(mirror)
        assert headers["x-linked-size"] == str(len(WEIGHTS)) == headers["content-length"]


def test_head_says_what_get_sends(server: MirrorServer) -> None:
    for path in FILES:
        head = ask(server, f"/tiny/model/resolve/main/{path}", "HEAD")
        get = ask(server, f"/tiny/model/resolve/main/{path}")
        assert head[0] == get[0] == 200 and head[2] == b""
        for name in ("etag", "content-length", "x-repo-commit", "accept-ranges"):
            assert head[1][name] == get[1][name]


@pytest.mark.parametrize(
    ("asked", "status", "start", "end"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=100-199", 206, 100, 200),
        ("bytes=899999-", 206, 899_999, 900_000),
        ("bytes=-5", 206, 899_995, 900_000),
        ("bytes=-5000000", 206, 0, 900_000),
        ("bytes=10-99999999", 206, 10, 900_000),
        ("bytes=0-1,5-6", 200, 0, 900_000),
        ("pages=1-2", 200, 0, 900_000),
        ("bytes=-", 200, 0, 900_000),
        ("bytes=900000-", 416, 0, 0),
        ("bytes=5-2", 416, 0, 0),
        ("bytes=-0", 416, 0, 0),
    ],
)
def test_ranges_are_answered_as_the_standard_says(
    server: MirrorServer, asked: str, status: int, start: int, end: int
) -> None:
    got, headers, body = ask(server, "/tiny/model/resolve/main/model.safetensors", Range=asked)
    assert got == status
    if status == 206:
        assert headers["content-range"] == f"bytes {start}-{end - 1}/900000"
    if status == 416:
        assert headers["content-range"] == "bytes */900000"
    else:
        assert body == WEIGHTS.read(0, 900_000)[start:end]


def test_conditions_are_kept(server: MirrorServer) -> None:
    path = "/tiny/model/resolve/main/model.safetensors"
    tag = ask(server, path, "HEAD")[1]["etag"]
    assert ask(server, path, If_None_Match=tag)[0] == 304
    assert ask(server, path, Range="bytes=5-", If_Range=tag)[0] == 206
    assert ask(server, path, Range="bytes=5-", If_Range='"other"')[0] == 200


def test_errors_carry_the_codes_that_clients_read(server: MirrorServer) -> None:
    for path, code in [
        ("/no/model/resolve/main/config.json", "RepoNotFound"),
        ("/api/models/no/model", "RepoNotFound"),
        ("/tiny/model/resolve/nothing/config.json", "RevisionNotFound"),
        ("/api/models/tiny/model/tree/nothing", "RevisionNotFound"),
        ("/tiny/model/resolve/main/nothing.json", "EntryNotFound"),
        ("/api/models/tiny/model/tree/main/nothing", "EntryNotFound"),
    ]:
        status, headers, _ = ask(server, path)
        assert (status, headers["x-error-code"]) == (404, code)


@pytest.mark.parametrize(
    "path",
    [
        "/tiny/model/resolve/main/../../../../../../etc/passwd",
        "/tiny/model/resolve/main/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/tiny/model/resolve/main/%2fetc%2fpasswd",
        "/tiny/model/resolve/main/..%5c..%5cx",
        "/tiny/model/resolve/main/config.json%00.txt",
        "/tiny/model/resolve/../../glmchat-mirror.json",
        "/../../etc/passwd",
        "/..%2f/model/resolve/main/config.json",
        "/tiny/..%2f..%2fx/resolve/main/config.json",
        "//etc/passwd",
        "/api/models/..%2f..%2f/tree/main",
        "/glmchat-mirror.json",
        "/tiny--model/refs.json",
        "*",
        "http://127.0.0.1/etc/passwd",
    ],
)
def test_no_path_leads_out_of_the_listing(server: MirrorServer, path: str) -> None:
    status, _, body = ask(server, path)
    assert status in (403, 404) and b"root:" not in body and b'"format"' not in body


@pytest.mark.parametrize(
    ("target", "headers", "status"),
    [
        ("http://[/x", {}, 400),
        ("/tiny/model/resolve/main/config.json", {"range": "bytes=0-" + "9" * 5000}, 200),
        ("/tiny/model/resolve/main/config.json", {"range": "bytes=-" + "9" * 5000}, 200),
    ],
)
def test_a_request_that_is_nonsense_is_answered(
    server: MirrorServer, target: str, headers: dict[str, str], status: int
) -> None:
    assert server.protocol.answer("GET", target, headers).status == status


@pytest.mark.parametrize(("body", "status"), [(b"[" * 100_000, 404), (b'{"paths": 3}', 200), (b'{"paths": null}', 200)])
def test_a_body_that_is_nonsense_is_answered(server: MirrorServer, body: bytes, status: int) -> None:
    answer = server.protocol.answer(
        "POST", "/api/models/tiny/model/paths-info/main", {"content-type": "application/json"}, body
    )
    assert answer.status == status


def test_a_link_that_points_outside_is_not_served(server: MirrorServer, mirror: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(FILES["config.json"])  # type: ignore[arg-type]
    place = mirror / "tiny--model" / commit_of(mirror) / "config.json"
    place.unlink()
    place.symlink_to(secret)
    status, _, body = ask(server, "/tiny/model/resolve/main/config.json")
    assert status == 403 and b"model_type" not in body


def test_a_damaged_copy_is_an_error_and_not_half_a_file(server: MirrorServer, mirror: Path) -> None:
    (mirror / "tiny--model" / commit_of(mirror) / "model.safetensors").write_bytes(b"short")
    assert ask(server, "/tiny/model/resolve/main/model.safetensors")[0] == 500


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST", "MKCOL"])
def test_nothing_can_be_written(server: MirrorServer, mirror: Path, method: str) -> None:
    before = sorted(str(p) for p in mirror.rglob("*"))
    status, _, _ = ask(server, "/tiny/model/resolve/main/config.json", method, b"x")
    assert status in (405, 501)
    assert sorted(str(p) for p in mirror.rglob("*")) == before


def test_a_huge_or_endless_request_is_turned_away(server: MirrorServer) -> None:
    url = "/api/models/tiny/model/paths-info/main"
    assert ask(server, url, "POST", b"", Content_Length="99999999999")[0] == 413
    assert ask(server, "/" + "a" * 70_000)[0] == 414
    assert ask(server, url, "POST", b"{", Content_Type="application/json")[0] == 404


def test_silent_clients_do_not_keep_others_out(server: MirrorServer) -> None:
    host, port = cast(tuple[str, int], server.server_address[:2])
    idle = [socket.create_connection((host, port)) for _ in range(70)]
    path = "/tiny/model/resolve/main/config.json"
    wait_until(lambda: ask(server, path)[0] == 503)
    for one in idle:
        one.close()
    wait_until(lambda: ask(server, path)[0] == 200)


def test_a_model_that_is_added_while_it_serves_is_served(
    server: MirrorServer, mirror: Path, loopback_hub: LoopbackHub
) -> None:
    loopback_hub.add("other/model", {"config.json": b"{}"})
    plan = plan_mirror(parse("other/model"), mirror, PullOptions(endpoints=(loopback_hub.url,)))
    execute_mirror(plan, lambda _: None, lambda: False)
    assert ask(server, "/other/model/resolve/main/config.json")[2] == b"{}"
    listed = json.loads(ask(server, "/api/models")[2])
    assert [one["id"] for one in listed] == ["other/model", "tiny/model"]


def test_glmchats_own_downloader_resumes_from_it(server: MirrorServer, tmp_path: Path) -> None:
    sha = hashlib.sha256(WEIGHTS.read(0, len(WEIGHTS))).hexdigest()
    (tmp_path / "p").write_bytes(WEIGHTS.read(0, 500_000))
    url = f"{server.url}/tiny/model/resolve/v1.0/model.safetensors"
    want = FileRequest("w", tmp_path / "w", tmp_path / "p", [Candidate(url)], size=len(WEIGHTS), sha256=sha)
    (got,) = download([want], on_progress=lambda _: None, cancelled=lambda: False)
    assert got.resumed_from == 500_000


def test_hub_library_calls_see_a_hub(server: MirrorServer) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    api = HfApi(endpoint=server.url, token=False)
    info = api.model_info("tiny/model", revision="v1.0", files_metadata=True)
    assert {s.rfilename: s.size for s in info.siblings or []} == {name: len(data) for name, data in FILES.items()}
    tree = list(api.list_repo_tree("tiny/model"))
    assert sorted(item.path for item in tree) == ["config.json", "deep", "empty.txt", "model.safetensors"]
    assert [item.path for item in api.list_repo_tree("tiny/model", "deep/er")] == ["deep/er/notes.txt"]
    assert len(list(api.list_repo_tree("tiny/model", recursive=True))) == 6
    paths = api.get_paths_info("tiny/model", ["model.safetensors", "deep", "absent"])
    assert [item.path for item in paths] == ["model.safetensors", "deep"]
    refs = api.list_repo_refs("tiny/model")
    assert [r.name for r in refs.branches] == ["main"] and [r.name for r in refs.tags] == ["v1.0"]
    assert api.file_exists("tiny/model", "config.json") and not api.file_exists("tiny/model", "x")
    assert api.revision_exists("tiny/model", "v1.0") and not api.repo_exists("no/model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("no/model")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tiny/model", revision="nothing")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("tiny/model", "nothing"))


def test_an_address_that_cannot_be_had_is_told(mirror: Path, server: MirrorServer) -> None:
    with pytest.raises(Failed, match="listen"):
        MirrorServer(mirror, port=server.server_address[1])
    with pytest.raises(Usage):
        MirrorServer(mirror, host="no.such.host.invalid")


# The hub's own command and transformers' loaders, in one process because each start of them takes seconds.
# Arguments: the cache that `hf` fills, the cache that glmchat filled.
CLIENTS = """
import sys
from huggingface_hub.cli.hf import app
from transformers import AutoModelForCausalLM, AutoTokenizer

theirs, ours = sys.argv[1:]
for words in (["download", "tiny/real", "--cache-dir", theirs], ["cache", "ls", "--cache-dir", ours],
              ["cache", "verify", "tiny/real", "--cache-dir", ours]):
    app(words, standalone_mode=False)
print("-- loaded")
for more in ({}, {"cache_dir": ours, "local_files_only": True}):
    tokenizer = AutoTokenizer.from_pretrained("tiny/real", **more)
    model = AutoModelForCausalLM.from_pretrained("tiny/real", **more)
    print(tokenizer("hello world").input_ids, float(sum(p.double().sum() for p in model.parameters())))
"""


def tiny_gpt2() -> dict[str, bytes]:
    """A GPT-2 with one layer and a vocabulary of three words, as transformers lays it out on disk."""
    import numpy
    from safetensors.numpy import save
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    shapes = {
        "wte.weight": (3, 8), "wpe.weight": (16, 8), "ln_f.weight": (8,), "ln_f.bias": (8,),
        "h.0.ln_1.weight": (8,), "h.0.ln_1.bias": (8,), "h.0.ln_2.weight": (8,), "h.0.ln_2.bias": (8,),
        "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,),
        "h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,),
        "h.0.mlp.c_fc.weight": (8, 32), "h.0.mlp.c_fc.bias": (32,),
        "h.0.mlp.c_proj.weight": (32, 8), "h.0.mlp.c_proj.bias": (8,),
    }  # fmt: skip
    chance = numpy.random.default_rng(0)
    weights = {f"transformer.{n}": chance.standard_normal(s, dtype=numpy.float32) for n, s in shapes.items()}
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 3, "n_embd": 8, "n_layer": 1,
        "n_head": 1, "n_positions": 16, "dtype": "float32", "bos_token_id": 2, "eos_token_id": 2,
    }  # fmt: skip
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": save(weights, {"format": "pt"}),
        "tokenizer.json": words.to_str().encode(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
    }


def test_real_clients_pull_byte_identical_files(
    tmp_path: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """hf download, hf cache ls and verify, transformers' Auto classes and glmchat, against the real command."""
    files = tiny_gpt2()
    loopback_hub.add("tiny/real", dict(files))
    assert glmchat(capsys, "mirror", "tiny/real", str(tmp_path / "m"), "--endpoint", loopback_hub.url)[0] == 0
    serving = subprocess.Popen(
        [sys.executable, "-P", "-m", "glmchat", "mirror", "serve", str(tmp_path / "m"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd="/",
    )
    try:
        assert serving.stdout is not None
        endpoint = serving.stdout.readline().strip()
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "by-glmchat"))
        assert glmchat(capsys, "pull", "tiny/real", "--all", "--endpoint", endpoint)[0] == 0

        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "by-transformers")}
        command = [sys.executable, "-P", "-c", CLIENTS, str(tmp_path / "by-hf"), str(tmp_path / "by-glmchat")]
        told = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)
        assert told.returncode == 0, told.stdout + told.stderr
        by_hf, by_us = tmp_path / "by-hf/models--tiny--real", tmp_path / "by-glmchat/models--tiny--real"
        commit = (by_hf / "refs/main").read_text()
        for cache in (by_hf, by_us):
            assert {p.name: p.read_bytes() for p in (cache / "snapshots" / commit).iterdir()} == files
        assert {p.name for p in (by_us / "blobs").iterdir()} == {p.name for p in (by_hf / "blobs").iterdir()}
        by_command, _, loaded = told.stdout.partition("-- loaded")
        assert "tiny/real" in by_command and "checked: 4" in by_command
        from_mirror, from_cache = loaded.split("\n")[1:3]
        assert from_mirror.startswith("[0, 1]") and from_mirror == from_cache
    finally:
        serving.send_signal(signal.SIGINT)
        assert serving.wait(60) == 0
