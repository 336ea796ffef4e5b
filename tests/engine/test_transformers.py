"""What runs through transformers: measures or one line, never a raw exception, and folders of packed matrices.

Covers engine/models/transformers_model.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folder_draws import unpacked
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from glmchat.checkpoints.architectures import refuse_settings
from glmchat.checkpoints.families import refuse_quantising
from glmchat.checkpoints.fit import config_at
from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import Failed, GlmchatError, Interrupted
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.formats.compressed import describe, pack, pack_zero_points
from glmchat.engine.models.transformers import parse
from glmchat.engine.quantize.int4 import quantise_int4
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.engine.quantize.plan import QuantizePlan, plan_quantise
from glmchat.engine.quantize.quantiser import QuantizeProgress, execute


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
    with pytest.raises(
        GlmchatError, match=f"does not describe a {kind} model|this {kind} model .* cannot chat"
    ) as caught:
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


@pytest.mark.parametrize("name", ["Llama", "Gemma"])
def test_a_window_of_true_in_a_type_that_has_none_is_no_window_there_either(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    kind = getattr(transformers, f"{name}ForCausalLM")
    kind(kind.config_class(**SMALL, head_dim=16, initializer_range=0.3)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sliding_window": True}))
    refuse_settings(json.loads(file.read_text()))
    prompt = torch.tensor([[5, 40, 77, 105, 9, 200, 31, 64, 12, 88]])
    asked = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    right = model.generate(prompt, attention_mask=torch.ones_like(prompt), **asked)[0, 10:].tolist()
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    asked_here = Sampling(temperature=0, max_tokens=12, ignore_eos=True)
    assert list(engine.generate(prompt[0].tolist(), asked_here)) == right
    assert len(set(right)) > 3


@pytest.mark.parametrize("name", ["Bamba", "Jamba", "GraniteMoeHybrid"])
def test_a_hybrid_says_what_its_own_generate_says(name: str, tmp_path: Path) -> None:
    each: dict[str, dict[str, Any]] = {
        "Bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16},
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8},
        "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 16,
                             "num_local_experts": 4, "num_experts_per_tok": 2},
    }  # fmt: skip
    layers = each[name]
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


# Of every kind that people quantise: norms around the layers, windows, fused matrices, factors, several tied heads.
TYPES: dict[str, dict[str, Any]] = {
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 8},
    "Gemma3": {"head_dim": 16, "sliding_window": 8},
    "Phi3": {},
    "Mistral": {"sliding_window": 8},
    "Olmo2": {},
    "Granite": {"tie_word_embeddings": True, "embedding_multiplier": 12.0},
    "Cohere2": {"sliding_window": 8},
    "SmolLM3": {},
    "Exaone4": {"sliding_window": 8},
    "StableLm": {"use_qkv_bias": True},
    "GPTNeoX": {},
    "Bloom": {"n_head": 4},
    "BioGpt": {},
}
IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12, 88, 41, 150]


def saved(folder: Path, name: str, **changes: Any) -> Path:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config" if name != "Gemma3" else "Gemma3TextConfig")
    measures = {**SMALL, "num_key_value_heads": 2, **TYPES.get(name, {}), **changes}
    getattr(transformers, f"{name}ForCausalLM")(config(**measures)).save_pretrained(folder)
    return folder


def logits(folder: Path, quant: int | None = None) -> torch.Tensor:
    return Engine.load(folder, dtype="float32", threads=1, quant=quant).logits(IDS)


def by_transformers(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    with torch.inference_mode():
        result: torch.Tensor = model(torch.tensor([IDS])).logits[0].float()
    return result


def layers(engine: Engine) -> dict[str, nn.Module]:
    return {name: m for name, m in engine.model.named_modules() if isinstance(m, QuantLinear | nn.Linear)}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TYPES)
def test_a_written_folder_computes_what_quantising_in_memory_does(name: str, bits: int, tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", name)
    out = execute(plan_quantise(source, tmp_path / "packed", Recipe(bits, ends=8)))
    assert torch.equal(logits(out), logits(source, bits))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TYPES)
def test_transformers_reads_what_is_written(name: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out = execute(plan_quantise(saved(tmp_path / "dense", name), tmp_path / "packed", Recipe(bits)))
    engine = Engine.load(out, dtype="float32", threads=1)
    ours, theirs = engine.logits(IDS), by_transformers(out)
    assert float((ours - theirs).abs().max() / ours.abs().max()) < 2**-8, "they multiply in 16 bits"
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    dense = {f"inner.{name}" for name in described["ignore"]}
    plain = {name for name, layer in layers(engine).items() if type(layer) is nn.Linear}
    assert plain <= {*dense, "inner.lm_head", "inner.embed_out", "inner.output_projection"}, "what is said to be dense"
    assert any(isinstance(layer, QuantLinear) for layer in layers(engine).values())


# Networks whose layers are Conv1D: a linear layer whose file holds [in, out].
TURNED: dict[str, tuple[str, dict[str, Any]]] = {
    "the first GPT": ("OpenAIGPT", {}),
    "GPT-2 with another activation": ("GPT2", {"activation_function": "relu"}),
    "GPT-2 that scales by depth": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}),
    "GPT-2 with cross attention": ("GPT2", {"add_cross_attention": True}),
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", TURNED)
def test_layers_that_lie_the_other_way_round_are_packed_upright_and_compute_their_codes(
    case: str, bits: int, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    name, changes = TURNED[case]
    torch.manual_seed(0)
    measures = {"vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
    kind, config = getattr(transformers, f"{name}LMHeadModel"), getattr(transformers, f"{name}Config")
    model = kind(config(**measures, **changes, bos_token_id=1, eos_token_id=2)).eval()
    model.save_pretrained(tmp_path / "dense")
    refuse_quantising(config_at(tmp_path / "dense"))
    plan = plan_quantise(tmp_path / "dense", tmp_path / "packed", Recipe(bits, ends=0))
    assert plan.to_json()["readers"]["programs"] == ["glmchat"]
    out, weights = execute(plan), model.state_dict()
    packed = 0
    for key, matrix in unpacked(out, lies_across=True).items():
        own = weights[key if key in weights else f"transformer.{key}"]
        assert float((matrix - own).abs().max()) < (0.1 if bits == 4 else 0.01), "it is the matrix that it was"
        packed += not torch.equal(matrix, own)
        own.copy_(matrix)
    assert packed == 2 * (4 if "cross" not in case else 7)
    with torch.inference_mode():
        right = model(torch.tensor([IDS])).logits[0]
    ours = logits(out)
    assert float((ours - right).norm() / right.norm()) < 0.02, "activations go in eight bits"
    written = execute(plan_quantise(tmp_path / "dense", tmp_path / "whole", Recipe(bits, ends=8)))
    assert torch.equal(logits(tmp_path / "dense", bits), logits(written))


def test_an_embedding_that_is_the_head_too_is_held_once(tmp_path: Path) -> None:
    out = execute(plan_quantise(saved(tmp_path / "dense", "Granite"), tmp_path / "packed", Recipe(8)))
    engine = Engine.load(out, dtype="float32", threads=1)
    inner: Any = engine.model.get_submodule("inner")
    assert inner.lm_head is inner.model.embed_tokens.linear


def test_a_run_that_was_stopped_goes_on_and_makes_the_same_folder(tmp_path: Path) -> None:
    source = saved(tmp_path / "dense", "Gemma2")

    def plan(name: str) -> QuantizePlan:
        made = plan_quantise(source, tmp_path / name, Recipe(4))
        return replace(made, shards=tuple((n, n + 1) for n in range(len(made.tensors))))

    calls = iter(range(100))
    with pytest.raises(Interrupted):
        execute(plan("packed"), cancelled=lambda: next(calls) == 12)
    done: list[QuantizeProgress] = []
    out, whole = execute(plan("packed"), on_progress=done.append), execute(plan("whole"))
    assert done[0].done > 0
    for file in whole.glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_a_packed_folder_of_many_experts_is_unpacked_for_transformers(tmp_path: Path) -> None:
    """As llm-compressor writes one: each expert's matrices packed under the names of the original files."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**{**SMALL, "num_key_value_heads": 2}, num_local_experts=4)).eval()
    model.save_pretrained(tmp_path / "dense")
    tensors, twin = {}, {}
    for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items():
        twin[name] = tensor
        if "_proj" not in name and "experts" not in name:
            tensors[name] = tensor
            continue
        codes = quantise_int4(tensor, 32)
        twin[name] = codes.stored().dequantise()
        stem = name.removesuffix("weight")
        tensors[f"{stem}weight_packed"], tensors[f"{stem}weight_scale"] = pack(codes.q, 4), codes.scale
        tensors[f"{stem}weight_zero_point"] = pack_zero_points(codes.zero_point)
        tensors[f"{stem}weight_shape"] = torch.tensor(codes.q.shape)
    save_file(twin, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    expected = by_transformers(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "packed")
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = describe({(4, 32, False): ["Linear"]}, ["lm_head"])
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    engine = Engine.load(tmp_path / "packed", dtype="float32", threads=1)
    assert float((engine.logits(IDS) - expected).norm() / expected.norm()) < 2e-3
    assert any(isinstance(layer, QuantLinear) for layer in layers(engine).values())
