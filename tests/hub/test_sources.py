"""What a hub says before it gives anything: that a token has expired, that it wants to be left alone for a time.

Covers hub/sources.py, hub/hf_token.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hub_helpers import glmchat, hub_entry, user_catalogue
from huggingface_hub.utils import parse_ratelimit_headers
from loopback_hub import LoopbackHub, Window

from glmchat.checkpoints.weight_files import Pointer, pointer_text
from glmchat.core import locations
from glmchat.hub.fetch import asked_wait
from glmchat.hub.sources import offline

FILES = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": b"w" * 5000}
OLD = "hf_expired"


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


@pytest.mark.parametrize("where", [("api", "files"), ("api",), ("files",)])
@pytest.mark.parametrize(("status", "explains"), [(401, True), (401, False), (403, True)])
def test_an_expired_token_is_blamed_and_what_is_public_comes_without_it(
    status: int, explains: bool, where: tuple[str, ...], hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/tiny", FILES)
    hub.expired, hub.expired_where, hub.explains = {OLD: status}, where, explains
    monkeypatch.setenv("HF_TOKEN", OLD)
    code, out, err = glmchat(capsys, "pull", "acme/tiny")
    assert code == 0, err
    assert OLD not in out + err
    assert err.count("going on without it") == 1 and "HF_TOKEN" in err
    refused = [seen for seen in hub.requests if seen.headers.get("authorization") and "/resolve/" in seen.path]
    # config.json is read in planning; then one file at most of those that are asked for at once finds out.
    assert len([seen for seen in refused if seen.file != "config.json"]) <= 3 and len(refused) <= 4


@pytest.mark.parametrize("command", [("pull", "acme/tiny"), ("mirror", "acme/tiny"), ("adapters", "add", "acme/tiny")])
def test_a_token_that_opens_nothing_is_named_with_its_file_and_never_shown(
    command: tuple[str, ...],
    hub: LoopbackHub,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    hub.add("acme/tiny", FILES)
    hub.repos["acme/tiny"].gated_by = "another"
    hub.expired = {OLD: 401}
    saved = tmp_path / "token"  # as `hf auth login` leaves it
    saved.write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(saved))
    more = [str(tmp_path / "m")] if command[0] == "mirror" else []
    code, out, err = glmchat(capsys, *command, *more)
    assert code == 1 and str(saved) in err and OLD not in out + err
    assert "check the name" not in err and "expired" in err


def test_a_good_token_without_rights_is_told_to_accept_the_terms(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/tiny", FILES)
    hub.repos["acme/tiny"].gated_by = "another"
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    code, _, err = glmchat(capsys, "pull", "acme/tiny")
    assert code == 1 and "terms" in err and "refuses the token" not in err


def test_a_model_of_the_catalogue_comes_without_the_expired_token_too(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = hub.add("me/mine", FILES)
    user_catalogue(hub_entry("mine", "me/mine", pinned, FILES))
    hub.expired = {OLD: 401}
    monkeypatch.setenv("HF_TOKEN", OLD)
    assert glmchat(capsys, "pull", "mine")[0] == 0


def test_pointers_of_a_clone_are_fetched_without_the_expired_token_too(
    hub: LoopbackHub, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("acme/tiny", FILES)
    hub.expired = {OLD: 401}
    monkeypatch.setenv("HF_TOKEN", OLD)
    file = hub.file("acme/tiny", "model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(pointer_text(Pointer(file.sha256, 5000)))
    code, _, err = glmchat(capsys, "pull", "acme/tiny", "--into", str(tmp_path))
    assert code == 0, err
    assert (tmp_path / "model.safetensors").read_bytes() == FILES["model.safetensors"]


@pytest.mark.parametrize("header", ["RateLimit", "Retry-After"])
@pytest.mark.parametrize("where", ["api", "files"])
def test_nothing_is_asked_while_a_hub_wants_to_be_left_alone_and_the_screen_says_why(
    where: str, header: str, hub: LoopbackHub, capsys: Any
) -> None:
    hub.add("acme/tiny", {**FILES, **{f"extra{n}.json": b"{}" for n in range(6)}})
    hub.window = Window(2.0, where, header)
    begun = time.monotonic()
    code, _, err = glmchat(capsys, "pull", "acme/tiny")
    assert code == 0, err
    assert hub.window.refused == 1
    assert time.monotonic() - begun >= 2.0
    assert "429" in err and "asks to wait" in err


def test_a_wait_for_the_index_is_told_too(hub: LoopbackHub, capsys: Any) -> None:
    index = b'{"metadata": {}, "weight_map": {"t": "model.safetensors"}}'
    files = {name: content for name, content in FILES.items() if name != "model.safetensors"}
    hub.add("acme/tiny", {**files, "model-1-of-1.safetensors": b"w" * 5000, "model.safetensors.index.json": index})
    hub.window = Window(1.0, "files", "RateLimit")
    code, _, err = glmchat(capsys, "pull", "acme/tiny", "--dry-run")
    assert code == 3 and "lacks" in err  # the index names another file than the listing has
    assert "index.json" in err and "asks to wait" in err and hub.window.refused == 1


@pytest.mark.parametrize("header", ["RateLimit", "Retry-After"])
@pytest.mark.parametrize("where", ["api", "files"])
def test_a_wait_of_a_quarter_of_an_hour_is_told_and_not_slept(
    where: str, header: str, hub: LoopbackHub, capsys: Any
) -> None:
    hub.add("acme/tiny", FILES)
    hub.window = Window(900.0, where, header)
    begun = time.monotonic()
    code, _, err = glmchat(capsys, "pull", "acme/tiny")
    assert code == 1 and "asks to wait 90" in err
    # Planning asks for config.json and goes on without it.
    assert time.monotonic() - begun < 20 and hub.window.refused == (2 if where == "files" else 1)


@pytest.mark.parametrize(
    "headers",
    [
        {"ratelimit": '"api";r=0;t=55'},
        {"ratelimit": '"resolvers";r=0;t=4', "ratelimit-policy": '"fixed window";"resolvers";q=3000;w=300'},
        {"ratelimit": '"api"; r=0; t=1'},
        {"ratelimit": '"api";r=3;t=55'},
        {"ratelimit": "nonsense"},
        {},
    ],
)
def test_the_hubs_header_is_read_as_huggingface_hub_reads_it(headers: dict[str, str]) -> None:
    info = parse_ratelimit_headers(headers)
    right = info.reset_in_seconds if info is not None and info.remaining == 0 else None
    found = asked_wait(headers)
    assert found == (None if right is None else right + 1)


SEEN = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE); print(c.is_offline_mode())"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"HF_HOME": "$SCRATCH/hf"},
        {"HF_HOME": "~/hf"},
        {"HF_HUB_CACHE": "${SCRATCH}/hub", "HF_HOME": "/elsewhere"},
        {"HUGGINGFACE_HUB_CACHE": "$SCRATCH/old"},
        {"HF_HUB_CACHE": "/a", "HUGGINGFACE_HUB_CACHE": "/b"},
        {"XDG_CACHE_HOME": "$SCRATCH/cache"},
        {"HF_HOME": "$NOT_SET_ANYWHERE/hf"},
        {"HF_HOME": "relative/hf"},
        {"HF_HUB_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "1"},
        {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "YES"},
    ],
)
def test_paths_and_switches_are_read_as_huggingface_hub_reads_them(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    for name in (*names, "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SCRATCH": "/scratch/me", "HOME": str(tmp_path / "home"), **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    asked = subprocess.run([sys.executable, "-c", SEEN], capture_output=True, text=True, env=dict(os.environ))
    cache, is_offline = asked.stdout.split()
    assert locations.hf_cache() == Path(cache).absolute()
    assert str(offline()) == is_offline


@pytest.mark.parametrize(
    "address", ["http://[", "https://me:secret@host:port/x?key=secret", "http://host:0", "https://"]
)
def test_an_endpoint_that_is_no_address_is_refused_before_anything_is_asked(address: str, capsys: Any) -> None:
    code, _, err = glmchat(capsys, "pull", "a/b", "--endpoint", address)
    assert code == 2 and "is not an endpoint" in err and "secret" not in err
