"""Packed layers in the place of dense ones: never of one that computes in a way of its own, and only where most are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from glmchat.core.errors import Usage
from glmchat.engine import Engine

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]
SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


def config(name: str) -> Any:
    return getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")


def saved(folder: Path, name: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    measures = {key: value for key, value in SMALL.items() if (name, key) != ("Falcon", "head_dim")}
    model = getattr(transformers, f"{name}ForCausalLM")(config(name)(**{**measures, **changes}))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3", "Phi3", "FalconMamba", "Falcon"])
@pytest.mark.parametrize(("quant", "error"), [(8, 0.03), (4, 0.3)])
def test_a_quantised_model_computes_what_the_dense_one_does(
    name: str, quant: int, error: float, tmp_path: Path
) -> None:
    folder = saved(tmp_path, name)
    dense = Engine.load(folder, dtype="float32", threads=1).logits(IDS)
    packed = Engine.load(folder, dtype="float32", threads=1, quant=quant).logits(IDS)
    assert float((packed - dense).norm() / dense.norm()) < error


def test_experts_that_cannot_be_packed_are_no_reason_to_say_four_bits(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="are no plain matrices") as caught:
        Engine.load(saved(tmp_path, "Mixtral", num_local_experts=8), threads=1, quant=4)
    assert caught.value.hint
