"""Folders drawn at random are what transformers makes of them, or are refused: ids, logits, answers, ends, two turns.

Covers engine/engine.py, engine/loading.py, checkpoints/fit.py, checkpoints/families.py. Of benchmarks: folder_sweep.py,
which runs 2,000 of these draws; `--seed` runs one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chatglm_draws import ORIGINALS, FirstGLM, Words, glm_of
from folder_checks import Reference, check, quiet
from folder_draws import FAMILIES, GGUF_VOCABULARIES, QUANTS, SHARDS, draw
from safetensors.torch import load_file

SEEDS = range(60)
ROLES = ("user", "assistant")
RESULTS: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def quietly() -> Iterator[None]:
    with quiet():
        yield


@pytest.mark.parametrize("seed", SEEDS)
def test_a_drawn_folder_is_what_transformers_makes_of_it_or_is_refused(seed: int, tmp_path: Path) -> None:
    outcome = check(seed, tmp_path / "model")
    print(outcome)
    RESULTS.append(outcome.result)
    if outcome.result == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.result in ("equal", "refused"), str(outcome)


def test_most_of_the_draws_run() -> None:
    if len(RESULTS) < len(SEEDS):
        pytest.skip("not all of the draws above were run")
    assert RESULTS.count("equal") > 0.7 * (len(SEEDS) - RESULTS.count("skipped"))


@pytest.mark.parametrize("name", ["v1_old", "v1_new_struct", "v1_new_int8", "v2", "v2_int4", "v3"])
def test_what_a_drawn_chatglm_is_compared_with_computes_what_the_original_code_recorded(
    shared: Path, name: str
) -> None:
    folder = shared / "reference" / "chatglm" / name
    config = json.loads((folder / "config.json").read_text())
    golden = load_file(folder / "golden.safetensors")
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("pytorch_model*.bin"):
        tensors |= torch.load(file, weights_only=True)
    if "_int" in name:
        tensors = {n: dequantised(tensors, n, name) for n in tensors if not n.endswith("_scale")}
    config |= {"_name_or_path": "THUDM/chatglm2-6b"}
    model = FirstGLM(tensors, config, early=name == "v1_old") if name.startswith("v1") else glm_of(tensors, config)
    prompt = next(key.removesuffix(".input_ids") for key in ("p17.input_ids", "p3.input_ids") if key in golden)
    ids = golden[f"{prompt}.input_ids"][0].tolist()
    theirs = Reference(model, None)
    found = theirs.logits(ids)[:, golden["probe_ids"]]
    assert (found - golden[f"{prompt}.logits_probe"]).abs().max() < 1e-4
    assert theirs.answer(ids, 16) == golden[f"{prompt}.greedy_ids"].tolist()


def dequantised(tensors: dict[str, torch.Tensor], name: str, variant: str) -> torch.Tensor:
    code, scale = tensors[name], tensors.get(f"{name}_scale")
    if scale is None:
        return code
    if "int4" in variant:
        code = torch.stack((code >> 4, (code << 4) >> 4), -1).view(len(code), -1)
    return code * scale.float()[:, None]


@pytest.mark.parametrize("family", ["ChatGLM-6B, early", "ChatGLM-6B", "ChatGLM2", "ChatGLM3"])
def test_the_words_of_a_drawn_chatglm_are_those_that_the_original_code_recorded(shared: Path, family: str) -> None:
    words, folder = Words(family), shared / "reference" / "chatglm"
    name = {"ChatGLM-6B, early": "v1_old", "ChatGLM-6B": "v1_new", "ChatGLM2": "v2", "ChatGLM3": "v3"}[family]
    for row in json.loads((folder / "tokenizers" / f"{name}.json").read_text())["strings"]:
        assert words.encode(row["text"]) == row["sp_encode"], row["text"]
    told = json.loads((folder / "prompts" / f"{name[:2]}.json").read_text())
    if name == "v3":
        for row in told["build_chat_input"]:
            said = [*(row["history"] or []), {"role": row["role"], "content": row["query"]}]
            if not any(turn.get("tools") or turn.get("metadata") for turn in said):
                assert words.conversation(said) == row["input_ids"], row["decoded"]
        return
    for row in told["rows"] if name == "v2" else told[name]:
        said = [{"role": r, "content": c} for pair in row["history"] or [] for r, c in zip(ROLES, pair, strict=True)]
        found = words.conversation([*said, {"role": "user", "content": row["query"]}])
        assert found == row["input_ids"], row["prompt"]


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = next(seed for seed in SEEDS if draw(seed).quant == "none" and draw(seed).index == "right")
    right = Reference.logits
    monkeypatch.setattr(Reference, "logits", lambda self, ids: 1.01 * right(self, ids))
    outcome = check(seed, tmp_path / "model")
    assert outcome.result == "differs" and "logits are 9.9e-03 off" in outcome.reason and f"seed {seed}" in str(outcome)


def test_the_draws_come_to_every_kind_of_thing() -> None:
    drawn = [draw(seed) for seed in range(2000)]
    assert {one.family for one in drawn} == {*FAMILIES, *ORIGINALS}
    assert {one.vocabulary for one in drawn if one.quant.startswith("GGUF")} == {
        name for names in GGUF_VOCABULARIES.values() for name in names
    }
    assert {one.shards for one in drawn} == set(SHARDS)
    assert {one.quant for one in drawn} == {"none", *QUANTS}
