"""The Llama family against transformers' own implementation, on random weights.

Covers engine/models/base.py, engine/models/layers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from glmchat.checkpoints.architectures import refuse_settings
from glmchat.engine import Engine, Sampling
from glmchat.engine.adapters.low_rank import fused
from glmchat.engine.models import layers
from glmchat.engine.quantize.linear import QuantLinear

IDS = [3, 17, 99, 4, 5, 200, 31, 8] * 6
SMALL: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "tied with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama 3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    import transformers

    name, changes = CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **changes)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in theirs.parameters():
        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which would hide a mistake
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    theirs.save_pretrained(tmp_path)
    mine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert mine.family == "llama"
    with torch.no_grad():
        wanted = theirs(torch.tensor([IDS])).logits[0]
    assert torch.allclose(mine.logits(IDS), wanted, atol=1e-4)


ODD: dict[str, dict[str, Any]] = {
    "no epsilon": {"rms_norm_eps": 0.0},
    "an epsilon below zero": {"rms_norm_eps": -1e-5},
    "a huge epsilon": {"rms_norm_eps": 1e9},
    "a huge base of the positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e30}},
    "a small base of the positions": {"rope_parameters": {"rope_type": "default", "rope_theta": 0.5}},
    "a window that its layers do not know": {"sliding_window": 8},
    "tokens outside the vocabulary": {"bos_token_id": 9999, "eos_token_id": -1, "pad_token_id": -2},
    "another activation": {"hidden_act": "relu2"},
    "answers of another form": {"output_hidden_states": True, "id2label": {"0": "good"}},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_settings_that_transformers_takes_give_its_logits_and_its_answer(case: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, **ODD[case])).eval()
    theirs.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        right = theirs(torch.tensor([IDS]), output_hidden_states=False).logits[0]
        made = theirs.generate(
            torch.tensor([IDS]), max_new_tokens=12, do_sample=False, eos_token_id=None, bos_token_id=1
        )
    refuse_settings(json.loads((tmp_path / "config.json").read_text()))
    mine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert torch.allclose(mine.logits(IDS), right, atol=1e-4)
    sampling = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    assert list(mine.generate(IDS, sampling)) == getattr(made, "sequences", made)[0, len(IDS) :].tolist()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_fused_products_are_the_products_side_by_side(rows: int) -> None:
    noise = torch.Generator().manual_seed(5)
    parts = []
    for outputs in (64, 32, 32):
        q = torch.randint(0, 16, (outputs, 64), generator=noise, dtype=torch.uint8)
        scale = torch.rand(outputs, 2, generator=noise).half().float()
        parts.append(QuantLinear.from_int4(q, scale, scale * 2))
    x = torch.randn(rows, 64, generator=noise)
    wanted = torch.cat([part(x) for part in parts], -1)
    found = fused(parts)(x)
    assert torch.equal(found, wanted)
    assert torch.equal(torch.cat([part(x) for part in parts], -1), wanted)  # the parts go on working


def test_a_swapped_layer_is_used_at_once(tmp_path: Path, builders: Any) -> None:
    engine = Engine.load(builders.write_gguf(tmp_path / "t.gguf", "Q8_0"), threads=1)
    before = engine.logits(IDS)
    place = "model.layers.0.self_attn.q_proj"
    old = engine.model.get_submodule(place)

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = old(x) * 2
            return found

    engine.model.swap(place, Doubled())
    assert not torch.equal(engine.logits(IDS), before)
    engine.model.swap(place, old)
    assert torch.equal(engine.logits(IDS), before)


def test_the_short_norm_of_one_row_is_the_norm() -> None:
    norm = layers.RMSNorm(64, 1e-5)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.allclose(norm(x[1:2]), norm(x)[1:2], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_one_row_is_the_last_row_of_many(dtype: torch.dtype) -> None:
    noise = torch.Generator().manual_seed(2)
    query = torch.randn(7, 6, 16, generator=noise).to(dtype)
    keys, values = (torch.randn(2, 7, 16, generator=noise).to(dtype) for _ in range(2))
    whole = layers.attend(query, keys, values, None)
    assert torch.allclose(layers.attend(query[-1:], keys, values, None), whole[-1:], atol=0.02)
    part = layers.attend(query[4:], keys, values, layers.causal_mask(4, 3, query.device))
    assert torch.allclose(part, whole[4:], atol=0.02)
