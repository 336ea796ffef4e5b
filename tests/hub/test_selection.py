"""What a pull takes of a repository: the files that transformers would fetch of it, or a refusal before the first byte.

Covers hub/candidates.py, chat/launch.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_helpers import glmchat, last_json
from loopback_hub import LoopbackHub
from safetensors.torch import save

from glmchat.core.text import human_bytes
from glmchat.hub import lookup, store
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

CONFIG = json.dumps(
    {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
     "num_attention_heads": 1, "num_key_value_heads": 1}
).encode()  # fmt: skip
WORDS = b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
# Of a type that runs through transformers, whose tensors may have any names.
ANY_TYPE = CONFIG.replace(b'"llama"', b'"gemma"')
SMALL = {"config.json": ANY_TYPE, "tokenizer.json": WORDS, "README.md": b"# tiny"}
TENSORS = {name: save({name: torch.ones(8, 8, 3)}) for name in ("a", "b", "c")}
SAFE, BIN = "model.safetensors", "pytorch_model.bin"


def numbered(pattern: str, numbers: Sequence[int] = (1, 2)) -> list[str]:
    return [pattern.format(number) for number in numbers]


def index(names: Sequence[str]) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"t{n}": name for n, name in enumerate(names)}}).encode()


def repository(names: Sequence[str], indexes: Mapping[str, Sequence[str]] = {}) -> dict[str, bytes]:
    weights = {name: list(TENSORS.values())[number % 3] for number, name in enumerate(names)}
    return {**SMALL, **weights, **{f"{stem}.index.json": index(files) for stem, files in indexes.items()}}


SIX = numbered("model-{:05d}-of-000002.safetensors")
FIVE = numbered("model-{:05d}-of-00002.safetensors")
THREE = numbered("model-{:05d}-of-00003.safetensors", (1, 2, 3))
SIX_BIN = numbered("pytorch_model-{:05d}-of-000002.bin")
FROM_ZERO = numbered("model-{:05d}-of-00002.safetensors", (0, 1))
PLAIN = numbered("model-{}-of-2.safetensors")
PARTS = ["model_part1.safetensors", "model_part2.safetensors"]
BEHIND = numbered("model.safetensors-{:05d}-of-00002")
CONSOLIDATED = ["consolidated.safetensors", "params.json", "tekken.json"]
META = ["original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"]
# What transformers loads of each: it is asked itself in the test.
REPOSITORIES: Mapping[str, dict[str, bytes]] = {
    "six": repository(SIX, {SAFE: SIX}),
    "six-bin": repository(SIX_BIN, {BIN: SIX_BIN}),
    "zero": repository(FROM_ZERO, {SAFE: FROM_ZERO}),
    "plain": repository(PLAIN, {SAFE: PLAIN}),
    "parts": repository(PARTS, {SAFE: PARTS}),
    "stale": repository([SAFE], {SAFE: THREE}),
    "older": repository([*FIVE, *THREE], {SAFE: FIVE}),
    "both": repository([*FIVE, BIN], {SAFE: FIVE}),
    "both-indexes": repository([*FIVE, *SIX_BIN], {SAFE: FIVE, BIN: SIX_BIN}),
    "bin-only": repository([BIN, "tf_model.h5", "flax_model.msgpack"]),
    "bin-beside": repository([*FIVE, BIN]),
    "meta": repository([SAFE, *META]),
    "mistral": repository([*FIVE, *CONSOLIDATED], {SAFE: FIVE}),
    "variant": repository([SAFE, "model.fp16.safetensors"]),
    "below": repository([SAFE, "onnx/model.onnx", "fp16/model.safetensors"]),
}
# What transformers does not load and glmchat does: the names of the shards say that they are whole.
WITHOUT_INDEX: Mapping[str, tuple[dict[str, bytes], Sequence[str]]] = {
    "no-index": (repository(FIVE), FIVE),
    "lone-shard": (repository(["model-00001-of-00001.safetensors"]), ["model-00001-of-00001.safetensors"]),
    "no-index-bin": (repository(SIX_BIN), SIX_BIN),
    "behind": (repository(BEHIND, {SAFE: BEHIND}), BEHIND),
}
REFUSED: Mapping[str, tuple[dict[str, bytes], str]] = {
    "lacks-one": (repository(SIX[:1], {SAFE: SIX}), SIX[1]),
    "lacks-one-unsaid": (repository(SIX[:1]), SIX[1]),
    "lacks-zero": (repository(FROM_ZERO[:1]), FROM_ZERO[1]),
    "foreign-index": (repository(FIVE, {SAFE: THREE}), "--exclude model.safetensors.index.json"),
    "metas-own": ({"params.json": b"{}", "consolidated.00.pth": b"x", "tokenizer.model": b"x"}, "Meta"),
    "mistrals-own": (repository(CONSOLIDATED), "Mistral"),
    "no-total": (repository(["model-00001.safetensors", "model-00002.safetensors"]), "model-00001.safetensors"),
    "tensorflow": (repository(["tf_model.h5"]), "tf_model.h5"),
    "in-a-folder": (repository(["weights/model.safetensors"]), "--include 'weights/*'"),
    "only-a-variant": (repository(["model.fp16.safetensors"]), "fp16"),
    "config-alone": (repository([]), "no weights"),
    "an-adapter": ({"adapter_config.json": b"{}", "adapter_model.safetensors": TENSORS["a"]}, "adapters add"),
    "gguf-part": ({"x-Q4_0-00001-of-00002.gguf": b"GGUF"}, "x-Q4_0-00002-of-00002.gguf"),
}

ASK = """
import json, sys
from transformers.modeling_utils import _get_resolved_checkpoint_files
chosen = {}
for name in sys.argv[1:]:
    files, _ = _get_resolved_checkpoint_files(name, None, None, None, None, False)
    chosen[name] = sorted(file.rpartition("/")[2] for file in files)
print(json.dumps(chosen))
"""


@pytest.fixture
def hub(loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def planned_weights(capsys: Any, name: str, *flags: str) -> list[str]:
    code, out, err = glmchat(capsys, "pull", name, "--dry-run", "--json", *flags)
    assert code == 0, err
    tensors = (".safetensors", ".bin", ".pth", ".h5", ".gguf")
    return sorted(f["path"] for f in json.loads(out)["files"] if f["path"].endswith(tensors))


def test_a_pull_takes_the_weights_that_transformers_fetches(hub: LoopbackHub, capsys: Any, tmp_path: Path) -> None:
    for name, files in REPOSITORIES.items():
        hub.add(f"acme/{name}", files)
    names = [f"acme/{name}" for name in REPOSITORIES]
    environ = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url, "DISABLE_SAFETENSORS_CONVERSION": "1"}
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        environ.pop(name, None)
    asked = subprocess.run(
        [sys.executable, "-P", "-c", ASK, *names], capture_output=True, text=True, env=environ, cwd="/"
    )
    assert asked.returncode == 0, asked.stderr
    right = last_json(asked.stdout)
    assert {name: planned_weights(capsys, name) for name in names} == right


@pytest.mark.parametrize("name", [*REPOSITORIES, *WITHOUT_INDEX])
def test_what_was_pulled_is_whole_for_list_show_and_verify_and_passes_the_check_of_run(
    name: str, hub: LoopbackHub, capsys: Any
) -> None:
    files = REPOSITORIES[name] if name in REPOSITORIES else WITHOUT_INDEX[name][0]
    hub.add("acme/model", files)
    code, _, err = glmchat(capsys, "pull", "acme/model", "-q")
    assert code == 0
    row = last_json(glmchat(capsys, "list", "--json")[1])[0]
    assert row["complete"] is True
    shown = last_json(glmchat(capsys, "show", "acme/model", "--json")[1])
    assert ("is ready" in err) == (shown["problem"] is None)
    assert shown["problem"] is None or "bin" in name  # those of this file are no archives of torch
    assert glmchat(capsys, "verify", "acme/model")[0] == 0
    if name in WITHOUT_INDEX:
        snapshot = store.snapshot("acme/model", row["revision"])
        assert set(WITHOUT_INDEX[name][1]) < {path.name for path in snapshot.iterdir()}
    code, _, err = glmchat(capsys, "pull", "acme/model")
    assert code == 0 and "is already here" in err


@pytest.mark.parametrize("name", REFUSED)
def test_a_repository_that_run_would_refuse_is_refused_before_its_first_byte(
    name: str, hub: LoopbackHub, capsys: Any
) -> None:
    files, word = REFUSED[name]
    hub.add("acme/model", files)
    for flags in ((), ("--dry-run",)):
        code, _, err = glmchat(capsys, "pull", "acme/model", *flags)
        assert code in (2, 3) and word in err and "ready" not in err
    asked = {seen.file for seen in hub.requests if seen.method == "GET" and seen.file}
    assert asked <= {"config.json", "model.safetensors.index.json"}
    assert lookup.list_installed() == []


def test_files_that_were_chosen_by_hand_are_fetched_and_not_called_ready(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("acme/model", repository(SIX, {SAFE: SIX}))
    code, _, err = glmchat(capsys, "pull", "acme/model", "--include", SIX[0], "--include", "*.json")
    assert code == 0 and "ready" not in err and SIX[1] in err
    code, _, err = glmchat(capsys, "run", "acme/model", "hi")
    assert code == 3 and SIX[1] in err
    assert glmchat(capsys, "pull", "acme/model")[0] == 0
    assert find_installed(parse("acme/model")) is not None


def test_what_is_left_out_by_hand_gives_way_to_the_next_choice(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("acme/model", repository([*FIVE, BIN], {SAFE: THREE}))
    assert planned_weights(capsys, "acme/model", "--exclude", "model.safetensors.index.json") == [BIN]
    hub.add("acme/other", repository(FIVE, {SAFE: THREE}))
    assert planned_weights(capsys, "acme/other", "--exclude", "model.safetensors.index.json") == FIVE


def test_an_index_from_a_hub_that_names_a_path_is_hostile(hub: LoopbackHub, capsys: Any) -> None:
    hub.add("acme/model", repository(SIX, {SAFE: ["../../outside.safetensors"]}))
    code, _, err = glmchat(capsys, "pull", "acme/model")
    assert code == 3 and "outside" in err


def test_a_half_download_says_how_much_is_missing_and_that_a_pull_goes_on(hub: LoopbackHub, capsys: Any) -> None:
    commit = hub.add("acme/model", repository(SIX, {SAFE: SIX}))
    assert glmchat(capsys, "pull", "acme/model")[0] == 0
    blob = (store.snapshot("acme/model", commit) / SIX[1]).resolve()
    size = blob.stat().st_size
    blob.unlink()
    row = last_json(glmchat(capsys, "list", "--json")[1])[0]
    assert row["complete"] is False
    for command in (("run", "acme/model", "hi"), ("lock", "acme/model"), ("quantize", "acme/model")):
        code, _, err = glmchat(capsys, *command)
        assert code == 1 and f"{human_bytes(size)} of" in err and "glmchat pull acme/model" in err
    assert "missing" in glmchat(capsys, "show", "acme/model")[1]
    assert glmchat(capsys, "verify", "acme/model")[0] == 3
    assert glmchat(capsys, "pull", "acme/model")[0] == 0
    assert last_json(glmchat(capsys, "list", "--json")[1])[0]["complete"] is True
