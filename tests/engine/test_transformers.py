"""Configurations of transformers' own kinds: measures, or one line, never a raw exception."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, DeepseekV2Config, DeepseekV2ForCausalLM, Gemma2Config, Gemma2ForCausalLM

from glmchat.core.errors import Damaged, Failed
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.models.transformers import parse


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma3n_text", "gemma3_text", "phi3", "mamba"])
def test_layers_of_different_sizes_have_measures(kind: str) -> None:
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    spec = parse({**config, "model_type": kind})
    assert spec.layers == config["num_hidden_layers"]
    assert spec.ffn_size > 0


@pytest.mark.parametrize("kind", ["nemotron_h", "bamba"])
def test_an_infinite_number_is_read_as_transformers_writes_it(kind: str) -> None:
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    assert {"__float__": "Infinity"} in config["time_step_limit"]
    assert parse({**config, "model_type": kind}).layers > 0


@pytest.mark.parametrize("kind", ["deepseek_v4", "musicgen"])
def test_what_transformers_cannot_describe_is_one_line(kind: str) -> None:
    config = json.loads(AutoConfig.for_model(kind).to_json_string(use_diff=False))
    with pytest.raises(Damaged, match=f"does not describe a {kind} model") as caught:
        parse({**config, "model_type": kind})
    assert "\n" not in caught.value.message


SMALL = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "pad_token_id": 0,
}  # fmt: skip


def test_what_transformers_cannot_compute_is_one_line(tmp_path: Path) -> None:
    config = DeepseekV2Config(
        **{**SMALL, "num_key_value_heads": 2}, qk_rope_head_dim=8, qk_nope_head_dim=16, kv_lora_rank=16,
        q_lora_rank=None, v_head_dim=16, first_k_dense_replace=2,
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, threads=1)
    with pytest.raises(
        Failed, match="transformers cannot compute this deepseek_v2 model: The size of tensor"
    ) as caught:
        engine.logits([5, 9, 40])
    assert "\n" not in caught.value.message


def test_what_a_caller_raises_between_layers_stays_the_callers_own(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    Gemma2ForCausalLM(Gemma2Config(**SMALL)).save_pretrained(tmp_path)
    engine = Engine.load(tmp_path, threads=1)
    with pytest.raises(Stop):
        engine.model(torch.tensor([5, 9]), between_layers=stop)


@pytest.mark.parametrize("name", ["RwkvForCausalLM", "OpenAIGPTLMHeadModel", "MiniMaxForCausalLM", "CpmAntForCausalLM"])
def test_a_model_without_a_cache_goes_on_from_its_whole_text(name: str, tmp_path: Path) -> None:
    measures = {**SMALL, "eos_token_id": 2}
    if "MiniMax" in name:
        measures |= {"num_local_experts": 4, "block_size": 4, "head_dim": 16}
    elif "CpmAnt" in name:
        measures = {"vocab_size": 272, "hidden_size": 64, "num_attention_heads": 4, "dim_head": 16, "dim_ff": 128,
                    "num_hidden_layers": 2, "prompt_length": 8, "position_bias_num_buckets": 32}  # fmt: skip
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**measures)).eval()
    model.save_pretrained(tmp_path)
    text = [5, 40, 77, 105, 9, 200]
    with torch.inference_mode():
        for _ in range(8):
            text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert list(engine.generate(text[:6], Sampling(temperature=0, max_tokens=8, ignore_eos=True))) == text[6:]


@pytest.mark.parametrize("name", ["Bamba", "Jamba", "GraniteMoeHybrid"])
def test_a_hybrid_says_what_its_own_generate_says(name: str, tmp_path: Path) -> None:
    layers = {
        "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
        "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
                             "num_local_experts": 4, "num_experts_per_tok": 2},
    }[name]  # fmt: skip
    torch.manual_seed(1)
    kind = getattr(transformers, f"{name}ForCausalLM")
    model = kind(kind.config_class(**SMALL, **layers, eos_token_id=2)).eval()
    for name_of, parameter in model.named_parameters():
        if "norm" not in name_of and parameter.dim() == 2:
            parameter.data *= 6  # else positions hardly count
    model.save_pretrained(tmp_path)
    ids = [5, 40, 77, 105, 9, 200, 31, 64, 12, 88]
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    prompt = torch.tensor([ids])
    right = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)[0, len(ids) :].tolist()
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert list(engine.generate(ids, Sampling(temperature=0, max_tokens=12, ignore_eos=True))) == right
