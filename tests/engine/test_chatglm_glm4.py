"""GLM-4 against transformers' own GLM model with the same weights."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

from glmchat.engine import Engine, Sampling


def transformers_twin(engine: Engine) -> torch.nn.Module:
    """transformers' model with our tensors under its names."""
    from transformers import GlmConfig, GlmForCausalLM

    spec = engine.spec
    config = GlmConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.ffn_size,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.extra["epsilon"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * spec.extra["rope_ratio"],
            "partial_rotary_factor": 0.5,
        },
        attention_bias=True,
        pad_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    twin = GlmForCausalLM(config).float().eval()
    ours = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    heads = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.kv_heads * spec.head_dim)
    theirs = {
        "model.embed_tokens.weight": ours["transformer.embedding.word_embeddings.weight"],
        "model.norm.weight": ours["transformer.encoder.final_layernorm.weight"],
        "lm_head.weight": ours["transformer.output_layer.weight"],
    }
    for layer in range(spec.layers):
        here, there = f"transformer.encoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = ours[f"{here}self_attention.query_key_value.{kind}"].split(heads)  # type: ignore[no-untyped-call]
            theirs |= {f"{there}self_attn.{n}_proj.{kind}": p for n, p in zip("qkv", parts, strict=True)}
        theirs[f"{there}self_attn.o_proj.weight"] = ours[f"{here}self_attention.dense.weight"]
        theirs[f"{there}mlp.gate_up_proj.weight"] = ours[f"{here}mlp.dense_h_to_4h.weight"]
        theirs[f"{there}mlp.down_proj.weight"] = ours[f"{here}mlp.dense_4h_to_h.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            theirs[f"{there}{norm}.weight"] = ours[f"{here}{norm}.weight"]
    twin.load_state_dict(theirs)
    return twin


def test_glm4_computes_what_transformers_glm_computes(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    config = random_checkpoints.tiny("glm-4-9b-chat", padded_vocab_size=151552, hidden_size=16, num_layers=2)
    random_checkpoints.write_checkpoint(tmp_path, config, dtype=torch.float32)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert engine.family == "glm4"
    twin = transformers_twin(engine)
    ids = torch.randint(0, 151552, (40,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        expected = twin(ids[None]).logits[0]
    assert (engine.logits(ids.tolist()) - expected).abs().max() < 1e-4
    said = list(engine.generate(ids[:8].tolist(), Sampling(temperature=0, max_tokens=6, ignore_eos=True)))
    with torch.inference_mode():
        rows = twin(torch.tensor([[*ids[:8].tolist(), *said]])).logits[0]
    assert said == rows[7:-1].argmax(-1).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm2-6b"])
def test_half_precision_stays_near_float32(
    name: str, dtype: str, tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    ids_of_6b = {"bos_token_id": 204, "eos_token_id": 205, "mask_token_id": 200, "gmask_token_id": 201}
    changes = {"vocab_size": 300, **ids_of_6b} if name == "chatglm-6b" else {"padded_vocab_size": 300}
    random_checkpoints.write_checkpoint(tmp_path, random_checkpoints.tiny(name, **changes))
    ids = [11, 12, 13, 201, 204, 21, 22]
    exact = Engine.load(tmp_path, dtype="float32", threads=1).logits(ids)
    near = Engine.load(tmp_path, dtype=dtype, threads=1).logits(ids)
    assert near.dtype == torch.float32
    assert (near - exact).abs().max() < (0.15 if dtype == "bfloat16" else 0.02)
