"""A merged model is what base and adapter compute together, in a folder that transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

from glmchat.core.errors import Usage
from glmchat.engine import Engine
from glmchat.engine.adapters.files import read_adapter
from glmchat.engine.adapters.merge import merge

IDS = [1, 40, 77, 105, 9]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": ["embed_tokens", "v_proj"]},
    ],
    ids=["dora", "head-and-embedding"],
)
def test_transformers_loads_the_merged_model_and_agrees_with_peft(
    tmp_path: Path, builders: ModuleType, settings: dict[str, Any]
) -> None:
    base = builders.write_folder(tmp_path / "base")
    reference = adapters.peft_logits(adapters.write_peft(base, tmp_path / "lora", **settings), IDS)
    folder = merge(read_adapter(tmp_path / "lora"), base, tmp_path / "merged")
    with torch.no_grad():
        found = adapters.theirs(folder)(input_ids=torch.tensor([IDS])).logits[0]
    tied = settings.get("modules_to_save") is not None
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is not tied
    assert float((found - reference).abs().max()) < 1e-4
    engine = Engine.load(folder, dtype="float32", threads=1)
    assert float((engine.logits(IDS) - reference).abs().max()) < 1e-4
    assert engine.tokenizer.encode("the heat")


TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "some rows": ({"trainable_token_indices": [3, 40, 105], "target_modules": ["v_proj"]}, True),
    "a low rank of the embedding": ({"target_modules": ["embed_tokens"]}, False),
    "layers": ({"target_modules": ["q_proj"]}, True),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_model_stays_tied_where_the_adapter_leaves_its_ends_the_same(
    case: str, tmp_path: Path, builders: ModuleType
) -> None:
    settings, stays = TIED[case]
    base = builders.write_folder(tmp_path / "base", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != "lm_head.weight"}, base / "model.safetensors")
    reference = adapters.peft_logits(adapters.write_peft(base, tmp_path / "lora", **settings), IDS)
    folder = merge(read_adapter(tmp_path / "lora"), base, tmp_path / "merged")
    table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" not in table) is stays
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is stays
    with torch.no_grad():
        found = adapters.theirs(folder)(input_ids=torch.tensor([IDS])).logits[0]
    assert float((found - reference).abs().max()) < 1e-4
    assert float((Engine.load(folder, dtype="float32", threads=1).logits(IDS) - reference).abs().max()) < 1e-4


def test_a_merged_model_is_written_quantised(tmp_path: Path, builders: ModuleType) -> None:
    base = builders.write_folder(tmp_path / "base")
    adapters.write_peft(base, tmp_path / "lora")
    folder = merge(read_adapter(tmp_path / "lora"), base, tmp_path / "merged", quant=8)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora", "merged"]
    plain = Engine.load(base, dtype="float32", threads=1)
    plain.attach(tmp_path / "lora", "lora")
    plain.activate({"lora": 1.0})
    expected, found = plain.logits(IDS), Engine.load(folder, dtype="float32", threads=1).logits(IDS)
    assert float((found - expected).norm() / expected.norm()) < 0.05


def test_a_prefix_merges_into_the_older_full_form(shared: Path, tmp_path: Path) -> None:
    folder = shared / "reference" / "chatglm"
    adapter = read_adapter(folder / "v1_new_ptuning_proj" / "prefix_only")
    merged = merge(adapter, folder / "v1_new_struct", tmp_path / "merged")
    expected = load_file(folder / "v1_new_ptuning_proj" / "golden.safetensors")
    ids = expected["p17.input_ids"][0].tolist()
    found = Engine.load(merged, dtype="float32", threads=1).logits(ids)[:, expected["probe_ids"]]
    assert float((found - expected["p17.logits_probe"]).abs().max()) < 1e-4


def test_a_place_that_is_taken_stays_as_it_is(tmp_path: Path, builders: ModuleType) -> None:
    base = builders.write_folder(tmp_path / "base")
    adapters.write_peft(base, tmp_path / "lora")
    with pytest.raises(Usage, match="already exists"):
        merge(read_adapter(tmp_path / "lora"), base, base)
    adapters.write_lora(tmp_path / "other", adapters.factors(4))
    with pytest.raises(Usage, match="belong to no layer"):
        merge(read_adapter(tmp_path / "other"), base, tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "lora", "other"]
