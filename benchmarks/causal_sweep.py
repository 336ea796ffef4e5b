"""Every causal type of the installed transformers, tiny and random: the same ids and logits here, or one line why not.

    OMP_NUM_THREADS=1 python benchmarks/causal_sweep.py [--seconds 600] [--only mixtral,gemma2] [--out table.md]

Each type gets its own configuration with small measures, weights at random, and the tokenizer of the tests. A child
computes 24 logits and 12 greedy ids by transformers and by glmchat, loads it once more with eight bits, and once more
as `quantize` writes it. What the check before a start refuses, and only that, must fail. Types of which no small
configuration can be made, and those that transformers itself cannot run, are counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engine"))

import torch
from engine_builders import TEMPLATE, tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES
from transformers.utils import logging

from glmchat.checkpoints.fit import check_folder
from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import GlmchatError
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

IDS = [5, 40, 77, 105, 9, 200, 31, 64, 12, 88, 41, 150, 7, 19, 230, 66, 90, 33, 121, 54, 8, 71, 99, 17]
NEW, LAYERS, MOST_WEIGHTS = 12, 4, 30_000_000
_CLOSE = 1e-4  # of the largest logit; float32 sums in another order
_DEPTHS = (
    "depth",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_MEASURES: Mapping[int, str] = {
    272: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    64: "hidden_size n_embd d_model word_embed_proj_dim embedding_size dim dim_model lru_width "
    "attention_hidden_size embed_dim embedding_dim",
    128: "intermediate_size n_inner ffn_dim d_ff dff dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size mlp_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
    "moe_latent_size hidden_size_per_layer_input index_head_dim head_k_dim expert_ffn_hidden_size",
    16: "head_dim dim_head qk_nope_head_dim v_head_dim kv_lora_rank linear_key_head_dim linear_value_head_dim d_kv "
    "kv_channels sliding_window attention_chunk_size "
    "mamba_d_state state_size ssm_state_size mamba_chunk_size chunk_size "
    "time_step_rank mamba_dt_rank global_head_dim mamba_d_head mamba_head_dim window_size attention_window_size",
    24: "q_lora_rank",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads",
    4: "num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads "
    "linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts index_n_heads",
    2: "num_key_value_heads num_kv_heads n_kv_heads linear_num_key_heads num_experts_per_tok moe_k moe_topk "
    "top_k_experts num_global_key_value_heads num_experts_per_token moe_top_k",
    1: "n_group topk_group num_expert_group n_shared_experts num_shared_experts n_groups mamba_n_groups",
    256: "max_position_embeddings n_positions n_ctx max_seq_len seq_length max_sequence_length max_target_positions",
}  # fmt: skip
_BY_NAME = {name: size for size, names in _MEASURES.items() for name in names.split()} | dict.fromkeys(_DEPTHS, LAYERS)
_TOKENS = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}


def small(value: Any, name: str = "", layers: int | None = None) -> Any:
    """A configuration with small measures: known names get them, lists of one entry a layer are cut."""
    if isinstance(value, Mapping):
        counts = (value.get(key) for key in _DEPTHS)
        layers = next((count for count in counts if isinstance(count, int)), None)
        if name == "per_layer_config":
            value = {key: part for key, part in value.items() if int(key) < LAYERS}
        parts = {key: small(part, str(key), layers) for key, part in value.items()}
        if "qk_rope_head_dim" in parts:  # latent attention: the rotary part is the head that others know
            parts |= {key: size for key, size in (("head_dim", 8), ("num_key_value_heads", 4)) if key in parts}
        return parts
    if isinstance(value, list) and layers and len(value) == layers:
        return [small(part, name) for part in value[:LAYERS]]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if name.endswith("_token_id"):
        return _TOKENS.get(name, 260)
    return min(value, _BY_NAME[name]) if name in _BY_NAME else value


_PLAIN: Mapping[str, Any] = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, **_TOKENS,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
           "head_dim": 24}  # fmt: skip
_BYTES = {**_PLAIN, "vocab_size": 260, "num_hidden_layers": 1, "num_key_value_heads": 4}
# Types whose measures hang together in ways of their own: all of what their configuration is made from.
_OWN: Mapping[str, Mapping[str, Any]] = {
    "blt": {
        "vocab_size": 260, "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4],
        "max_position_embeddings": 256, "patcher_config": _BYTES, "global_config": _BYTES,
        "encoder_config": {**_BYTES, "hidden_size_global": 64}, "decoder_config": {**_BYTES, "hidden_size_global": 64},
        "eos_token_id": 2,
    },
    "cohere_compass_text": {
        **_PLAIN, "head_dim": 16, "sliding_window": 16,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "vocab_size": 272, **_TOKENS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note_text": {
        **_PLAIN, **_LATENT, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "shared_experts_intermediate_size": 32, "index_topk": 8, "index_head_dim": 16,
        "index_n_heads": 2, "sliding_window": 16, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4,
        **{f"swa_{name}": size for name, size in _LATENT.items()},
    },
    "falcon_h1": {
        **_PLAIN, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_chunk_size": 16, "head_dim": 16,
    },
    "nemotron": {**_PLAIN, "head_dim": 16},
    "qwen4_exp_text": {
        **_PLAIN, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_lowrank": 16, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 1000,
    },
    "zamba": {
        **_PLAIN, "num_key_value_heads": 4, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1,
        "mamba_dt_rank": 8, "mamba_d_state": 8, "attention_head_dim": 32,
    },
}  # fmt: skip
# What differs from `small` for types that are else small enough by their names.
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "linear_head_dim": 16, "linear_num_heads": 4,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
    "dots1": {
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24, "num_layers": 2},
    "mamba2": {"num_heads": 16, "head_dim": 8},
    "ministral": {"head_dim": 16},
    "reformer": {"axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 16)},
    "xlm": {"emb_dim": 64},
    "xlnet": {"d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0, "num_blocks": LAYERS},
    "xmod": {"default_language": "en_XX"},
}  # fmt: skip


def configuration(kind: str) -> Any:
    if kind in _OWN:
        return AutoConfig.for_model(kind, **_OWN[kind])
    given = {**small(AutoConfig.for_model(kind).to_dict()), **_CHANGES.get(kind, {})}
    decoder = {"is_decoder": True} if "is_decoder" in given else {}  # encoders are refused without it
    drop = ("model_type", "architectures", "transformers_version", "auto_map")
    return AutoConfig.for_model(kind, **{k: v for k, v in given.items() if k not in drop} | decoder)


def write(kind: str, folder: Path) -> None:
    """A folder of this type. Raises ValueError where it would be large."""
    config = configuration(kind)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_WEIGHTS:
        raise ValueError(f"{count:,} weights")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    words = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))


def theirs(folder: Path) -> tuple[torch.Tensor, list[int], list[int]]:
    """Logits, the ids of `generate`, and those of one whole forward pass after the other: for some types (RoBERTa's
    relatives count positions otherwise in `generate`) these are not the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no forced end or beam search: greedy and nothing else
    prompt = torch.tensor([IDS])
    with torch.inference_mode():
        logits = model(input_ids=prompt).logits[0].float()
        more = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **more)[0, len(IDS) :].tolist()
        text = list(IDS)
        for _ in range(NEW):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return logits, ids, text[len(IDS) :]


def outcome(kind: str) -> dict[str, str]:
    """What came of one type: {"result", "detail", "quant"}."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        try:
            write(kind, folder)
        except Exception as error:  # noqa: BLE001 - what came is told
            return {"result": "no small configuration", "detail": _line(error)}
        ours = _told(lambda: _ours(folder))
        try:
            logits, ids, one_by_one = theirs(folder)
        except Exception as error:  # noqa: BLE001 - what came is told
            here = ours["result"] if isinstance(ours, dict) else "answers"
            return {"result": "transformers cannot", "detail": _line(error), "here": f"(here: {here})"}
        if not isinstance(ours, tuple):
            return {"result": ours["result"], "detail": ours["detail"]}
        gap = float((ours[0] - logits).abs().max() / logits.abs().max())
        said = _told(lambda: check_folder(folder))
        if said is not None:
            return {"result": "refused before a start, but runs", "detail": said["detail"]}
        if gap < _CLOSE and ours[1] in (ids, one_by_one):
            result = "equal" if ours[1] == ids else "equal to forward, not to generate"
        else:
            result = "differs"
        row = {"result": result, "detail": f"{gap:.0e}" + ("" if ours[1] == ids else ", ids")}
        packed = _told(lambda: Engine.load(folder, quant=8, dtype="float32", threads=1).logits(IDS))
        if isinstance(packed, dict):
            return {**row, "quant": packed["result"], "why": packed["detail"]}
        written = _told(lambda: _written(folder, folder / "int8"))
        if isinstance(written, dict):
            return {**row, "quant": "not written", "why": written["detail"]}
        row["why"] = "" if torch.equal(written, packed) else "differs as written"
        return {**row, "quant": f"{float((packed - logits).norm() / logits.norm()):.3f}"}


def _written(folder: Path, out: Path) -> torch.Tensor:
    execute(plan_quantise(folder, out, Recipe(8, ends=8)))
    return Engine.load(out, dtype="float32", threads=1).logits(IDS)


def _ours(folder: Path) -> tuple[torch.Tensor, list[int]]:
    engine = Engine.load(folder, dtype="float32", threads=1)
    ids = list(engine.generate(IDS, Sampling(temperature=0, max_tokens=NEW, ignore_eos=True)))
    return engine.logits(IDS), ids


def _told(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except GlmchatError as error:
        return {"result": "refused", "detail": _line(error)}
    except Exception as error:  # noqa: BLE001 - what came is told
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"result": "traceback", "detail": f"{_line(error)} ({Path(where.filename).name}:{where.lineno})"}


def _line(error: BaseException) -> str:
    return (type(error).__name__ + ": " + " ".join(str(error).split()))[:150]


def _child(kind: str, place: Any) -> None:
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        place.send(outcome(kind))


def swept(kind: str, seconds: float) -> dict[str, str]:
    """The outcome of a type in a process of its own."""
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_child, args=(kind, there))
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else {"result": "too slow", "detail": f"more than {seconds:.0f} s"}
    except EOFError:
        child.join()
        return {"result": "died", "detail": f"exit code {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="start no further type after so long")
    parser.add_argument("--only", default="", help="types, by commas")
    parser.add_argument("--out", type=Path, help="also write the table there")
    given = parser.parse_args()
    kinds = given.only.split(",") if given.only else sorted(TYPES)
    until = time.monotonic() + given.seconds
    lines = ["| type | result | gap or reason | INT8: distance or reason |", "|---|---|---|---|"]
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    outcome("llama")  # imports and self-tests, once for all
    print("\n".join(lines), flush=True)
    counts: Counter[str] = Counter()
    quants: Counter[str] = Counter()
    for kind in kinds:
        if time.monotonic() > until:
            counts["not tried"] += 1
            continue
        row = swept(kind, 60.0)
        counts[row["result"]] += 1
        quant = row.get("quant", "")
        if quant:
            quants[quant if quant in ("refused", "traceback", "not written") else "packed"] += 1
            quants["differs as written"] += row.get("why") == "differs as written"
        lines.append(f"| {kind} | {row['result']} | {row['detail']} | {quant} {row.get('why', row.get('here', ''))} |")
        print(lines[-1], flush=True)
    lines += ["", f"{len(kinds)} types: {dict(counts)}; INT8 of those that ran: {dict(quants)}"]
    print(lines[-1])
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
