"""What each reader is meant to read, small: the inputs that are mutated."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
COMMIT, SHA, BLOB = "a" * 40, "b" * 64, "c" * 40
QUESTION = [{"role": "user", "content": "Hello 你好"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] | trim }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": [2, 3], "dtype": "float32",
    "torch_dtype": "float32", "transformers_version": "5.23.0", "use_cache": True,
}  # fmt: skip


TINY = {**LLAMA, "vocab_size": 8, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "head_dim": 4,
        "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip


def as_json(*values: Any) -> list[bytes]:
    return [json.dumps(value).encode() for value in values]


# What lies on the disk of a model.


@cache
def gguf() -> list[bytes]:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    def written(add: Any, tensors: dict[str, Any], architecture: str = "llama") -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.gguf"
            writer = GGUFWriter(path, architecture)
            add(writer)
            for name, (data, kind) in tensors.items():
                kinds = {"raw_dtype": kind} if kind is not None else {}
                writer.add_tensor(name, quants.quantize(data, kind) if kind is not None else data, **kinds)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            return path.read_bytes()

    def sizes(writer: Any) -> None:
        writer.add_context_length(256)
        writer.add_block_count(1)
        writer.add_embedding_length(32)
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)

    def bpe(writer: Any) -> None:
        sizes(writer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        letters = list(_letters())
        writer.add_token_list(["<|end|>", *letters, "he", "Ġt"])
        writer.add_token_types([3] + [1] * (len(letters) + 2))
        writer.add_token_merges(["h e", "Ġ t"])
        writer.add_eos_token_id(0)
        writer.add_chat_template(TEMPLATE)

    def spm(writer: Any) -> None:
        sizes(writer)
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "e", "he"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(i) for i in range(len(pieces))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    def lora(writer: Any) -> None:
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 8.0)

    noise = np.random.default_rng(1)
    wide = noise.standard_normal((64, 32)).astype(np.float32)
    tensors = {
        "token_embd.weight": (wide, None),
        "blk.0.attn_q.weight": (wide[:32], GGMLQuantizationType.Q4_0),
        "blk.0.ffn_up.weight": (wide, GGMLQuantizationType.Q8_0),
        "output_norm.weight": (wide[0], None),
    }
    pair = {"blk.0.attn_q.weight.lora_a": (wide[:4], None), "blk.0.attn_q.weight.lora_b": (wide[:, :4].copy(), None)}
    return [written(bpe, tensors), written(spm, tensors), written(lora, pair)]


def _letters() -> Sequence[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


@cache
def safetensors() -> list[bytes]:
    import torch
    from safetensors.torch import save

    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool)
    named = {f"model.layers.0.{kind}.weight": torch.zeros(4, 8, dtype=kind) for kind in kinds}
    return [save({"lm_head.weight": torch.ones(8, 4)}, {"format": "pt"}), save(named)]


def large_weights() -> bytes:
    """For a config of LLAMA's sizes."""
    header = b'{"a": {"dtype": "U8", "shape": [400000], "data_offsets": [0, 400000]}}'
    return len(header).to_bytes(8, "little") + header + bytes(400_000)


@cache
def pickles() -> list[bytes]:
    import torch

    tensors = {
        "model.embed_tokens.weight": torch.ones(8, 4),
        "lm_head.weight": torch.ones(8, 4, dtype=torch.bfloat16),
        "bias": torch.arange(6)[::2],
    }
    saved = []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        saved.append(file.getvalue())
    return saved


@cache
def tokenizer_files() -> list[bytes]:
    words = ["<|endoftext|>", "<|im_start|>"]
    added = [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for i, text in enumerate(words)
    ]  # fmt: skip
    vocabulary = {text: i for i, text in enumerate([*words, *_letters(), "he", "Ġt"])}
    bpe = {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 512, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"}, {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "Strip", "strip_left": True, "strip_right": False},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}| ?\\p{L}+|\\s+"},
             "behavior": "Isolated", "invert": False},
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": [["h", "e"], ["Ġ", "t"]],
        },
    }  # fmt: skip
    unigram = {
        **bpe, "truncation": None, "padding": None, "normalizer": {
            "type": "Precompiled",
            "precompiled_charsmap": base64.b64encode((1024).to_bytes(4, "little") + bytes(1025)).decode(),
        },
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "Unigram", "unk_id": 0, "byte_fallback": False,
            "vocab": [["<unk>", 0.0], ["▁", -2.0], ["h", -2.5], ["e", -2.6], ["he", -1.0]],
        },
    }  # fmt: skip
    plain = {**bpe, "truncation": None, "padding": None, "normalizer": None}
    piece = {
        **plain, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {"[UNK]": 0, "he": 1, "##llo": 2},
        },
    }  # fmt: skip
    return as_json(bpe, plain, unigram, piece)


@cache
def tokenizer_models() -> list[bytes]:
    import sentencepiece

    lines = ["the cat sat on the mat", "a cat and the hat", "1 23 456", "你好 世界"] * 20
    made = []
    for kind in ("bpe", "unigram"):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, vocab_size=300, model_type=kind, byte_fallback=True,
            character_coverage=1.0, hard_vocab_limit=False, minloglevel=2, num_threads=1, control_symbols=["<|user|>"],
        )  # fmt: skip
        made.append(model.getvalue())
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    return [*made, ranks + base64.b64encode(b"he") + b" 256\n"]


@cache
def adapters() -> list[bytes]:
    """One line of adapter_config.json, then the file with the weights."""
    import torch
    from safetensors.torch import save

    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(64, 4)}
    lora = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none",
        "base_model_name_or_path": "a/b", "revision": None, "task_type": "CAUSAL_LM", "use_dora": False,
        "use_rslora": False, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "modules_to_save": None,
        "fan_in_fan_out": False, "layers_to_transform": [0], "layers_pattern": "layers", "inference_mode": True,
    }  # fmt: skip
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 5, "token_dim": 64, "num_layers": 2}
    loha = {"peft_type": "LOHA", "r": 4, "alpha": 8, "target_modules": ["q_proj"]}
    hada = {f"{stem}.hada_w{i}_{end}": torch.ones(4, 64) for i in (1, 2) for end in "ab"}
    file = io.BytesIO()
    torch.save(pair, file)
    prefix = {"transformer.prefix_encoder.embedding.weight": torch.ones(4, 256)}
    return [
        config + b"\n" + weights
        for config, weights in zip(
            as_json(lora, prompt, loha, lora, {"pre_seq_len": 4}),
            (save(pair), save({"prompt_embeddings": torch.ones(5, 64)}), save(hada), file.getvalue(), save(prefix)),
            strict=True,
        )
    ]


def configs() -> list[bytes]:
    glm = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 2, "hidden_size": 64,
        "padded_vocab_size": 320, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4,
        "multi_query_attention": True, "multi_query_group_num": 2, "seq_length": 256, "layernorm_epsilon": 1e-5,
        "rmsnorm": True, "add_qkv_bias": True, "add_bias_linear": False, "original_rope": True, "rope_ratio": 1,
        "eos_token_id": 2, "pre_seq_len": None, "quantization_bit": 0, "torch_dtype": "float16",
    }  # fmt: skip
    first = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 2, "hidden_size": 64,
        "inner_hidden_size": 96, "num_attention_heads": 4, "vocab_size": 130528, "max_sequence_length": 256,
        "position_encoding_2d": True, "layernorm_epsilon": 1e-5, "gmask_token_id": 130001, "mask_token_id": 130000,
        "bos_token_id": 130004, "eos_token_id": 130005, "pad_token_id": 3,
    }  # fmt: skip
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 300}
    scaled = {
        **LLAMA, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
                "group_0": {"weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True,
                                        "type": "int"}, "targets": ["Linear"]},
            }, "ignore": ["lm_head"],
        },
    }  # fmt: skip
    fallback = {**LLAMA, "model_type": "opt", "architectures": ["OPTForCausalLM"]}
    qwen = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    hf_glm = {**LLAMA, "model_type": "glm4", "architectures": ["Glm4ForCausalLM"], "partial_rotary_factor": 0.5}
    return as_json(LLAMA, glm, first, gpt2, scaled, fallback, qwen, hf_glm)


def indexes() -> list[bytes]:
    names = {f"model.layers.{i}.weight": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    return as_json({"metadata": {"total_size": 100}, "weight_map": names})


def templates() -> list[bytes]:
    """Templates, and the tokenizer_config.json around one."""
    words = {
        "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "add_bos_token": True,
        "added_tokens_decoder": {"1": {"content": "<|user|>", "special": True, "lstrip": False}},
        "additional_special_tokens": ["<|user|>"], "tokenizer_class": "LlamaTokenizerFast", "legacy": False,
        "model_max_length": 1000000000000000019884624838656, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    named = [{"name": "default", "template": TEMPLATE}]
    loud = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') }}"
    macro = "{%- macro said(m, n=2) -%}{{ m.content[:n] | upper }}{%- endmacro -%}{{ said(messages | last) }}"
    space = "{% set ns = namespace(x=0) %}{% for m in messages %}{% set ns.x = ns.x + 1 %}{% endfor %}{{ ns.x }}"
    texts = [text.encode() for text in (TEMPLATE, loud, macro, space)]
    return [*texts, *as_json({**words, "chat_template": TEMPLATE}, {**words, "chat_template": named})]


# What glmchat wrote itself.


def manifests() -> list[bytes]:
    file = {
        "path": "config.json",
        "size": 5,
        "sha256": SHA,
        "git_blob": BLOB,
        "host": "h",
        "date": "2026-01-01T00:00:00Z",
    }
    one = {
        "format": 1, "name": "x", "kind": "model", "source": "hf", "root": "/nowhere/x", "repo": "a/b",
        "revision": COMMIT, "family": "llama", "quant": "none", "base": None, "complete": True, "asked": "x",
        "date": "2026-01-01T00:00:00Z", "files": [file, {**file, "path": "model.safetensors", "git_blob": None}],
    }  # fmt: skip
    facts = {"kind": "lora", "form": "raw", "rank": 4, "alpha": 8, "forced": False, "shapes": {"q_proj": [64, 64]},
             "layers": 2, "vocabulary": None, "length": None, "extracted": False}  # fmt: skip
    return as_json(one, {**one, "kind": "adapter", "source": "made", "adapter": facts}, {**one, "source": "path"})


def locks() -> list[bytes]:
    files = [{"path": "config.json", "size": 5, "sha256": SHA, "git_blob": BLOB}]
    hub = {"kind": "hf", "repo": "a/b", "revision": COMMIT}
    wheel = {"kind": "pypi", "repo": "tiny", "revision": "1.0", "sha256": SHA, "size": 5, "member": "a/b.gguf"}
    models = [{"name": n, "family": "llama", "quant": "none", "source": s, "files": files}
              for n, s in (("x", hub), ("tiny", wheel))]  # fmt: skip
    poet = {"name": "poet", "base": "x", "alpha": 8, "source": hub, "files": files}
    return as_json({"format": 1, "models": models, "adapters": [poet]})


def tomls() -> list[bytes]:
    settings = b"""default_model = "chatglm-6b"
theme = "dark"
enter_sends = true
context_policy = "drop"
endpoints = ["https://hf-mirror.com"]
threads = 4
context = 4096
downloads = 4
history = true
system = "x"
language = "en"
[keys]
send = "ctrl+s"
[sampling]
temperature = 0.8
top_k = 40
stop = ["a"]
seed = 1
"""
    catalogue = f"""[[model]]
name = "tiny"
label = "main"
aliases = ["t"]
about = "x"
family = "llama"
quant = "none"
parameters = 5
context = 256
languages = ["en"]
licence = {{ name = "MIT", url = "https://x", commercial = "yes" }}
sampling = {{ temperature = 0.5 }}
[[model.source]]
kind = "hf"
repo = "a/b"
revision = "{COMMIT}"
[[model.file]]
path = "config.json"
size = 5
sha256 = "{SHA}"
git_blob = "{BLOB}"
"""
    return [settings, catalogue.encode(), b'{"fast": "smollm2", "b": "a/b@main"}']


def conversations() -> list[bytes]:
    """An export of ours, and those of the other programs."""
    time, text = "2026-01-01T00:00:00+00:00", [{"type": "text", "text": "Hello"}]
    details = {
        "model": "m", "revision": "r", "quant": "q", "sampling": {"temperature": 0.5}, "passes": [[0, 1]], "seed": 1,
        "adapters": [{"name": "x", "scale": 1.0, "forced": True}], "kernel": "k", "threads": 2, "finish_reason": "stop",
        "prompt_tokens": 1, "completion_tokens": 2, "ttft_seconds": 0.1, "decode_tokens_per_second": 5.0,
        "prompt_ids": [1], "compare": 1, "column": "a", "error": {"code": "x", "message": "y"}, "ignored": ["x"],
        "load_seconds": 1.0, "stopped_by": "eos", "dropped": 1,
    }  # fmt: skip
    settings = {
        "system": "s", "sampling": {"temperature": 0.5, "stop": ["a"]}, "adapters": [{"name": "x", "scale": 1.0}],
        "context_policy": "drop",
    }  # fmt: skip
    message: dict[str, Any] = {
        "id": 1, "parent": None, "role": "user", "text": "Hi", "state": "complete", "created": time, "token_ids": [],
        "details": {},
    }  # fmt: skip
    answer = {**message, "id": 2, "parent": 1, "role": "assistant", "token_ids": [1, 2], "details": details}
    own = {"id": 1, "title": "T", "renamed": False, "model": "m", "created": time, "updated": time, "pinned": False,
           "settings": settings, "leaf": 2, "messages": [message, answer]}  # fmt: skip
    node = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}, "create_time": 1.7e9,
            "metadata": {"model_slug": "gpt"}, "recipient": "all"}  # fmt: skip
    chatgpt = {"title": "T", "create_time": 1.7e9, "current_node": "b", "mapping": {
        "r": {"message": None, "parent": None, "children": ["a"]},
        "a": {"message": node, "parent": "r", "children": ["b"]},
        "b": {"message": {**node, "author": {"role": "assistant"}}, "parent": "a", "children": []},
    }}  # fmt: skip
    said = {"id": "a", "parentId": None, "role": "user", "content": "Hi", "timestamp": 1700000000, "model": "m"}
    open_webui = [{"title": "T", "created_at": 1700000000, "chat": {"history": {"currentId": "b", "messages": {
        "a": said, "b": {**said, "id": "b", "parentId": "a", "role": "assistant"},
    }}}}]  # fmt: skip
    child = {"messageId": "b", "parentMessageId": "a", "isCreatedByUser": False, "text": "Hello", "createdAt": time}
    libre = {"title": "T", "messages": [
        {**child, "messageId": "a", "parentMessageId": None, "isCreatedByUser": True,
         "children": [child]}]}  # fmt: skip
    claude = [{"name": "T", "created_at": time, "chat_messages": [
        {"uuid": "a", "sender": "human", "text": "Hi", "content": text, "created_at": time},
        {"uuid": "b", "sender": "assistant", "parent_message_uuid": "a", "content": text,
         "created_at": time}]}]  # fmt: skip
    sharegpt = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}]
    plain = [*QUESTION, {"role": "assistant", "content": text}]
    lines = b"\n".join(as_json({"messages": plain}, {"messages": plain}))
    return [
        *as_json({"glmchat_history": 1, "conversations": [own]}, chatgpt, open_webui, libre, claude, sharegpt, plain),
        lines,
    ]


@cache
def databases() -> list[bytes]:
    """A history.db with one conversation."""
    from glmchat.chat.history.history import History
    from glmchat.chat.history.transcript import add_to_history, read_import

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "history.db"
        history = History.open(path)
        add_to_history(history, read_import(conversations()[0], "x"))
        history.close()
        with sqlite3.connect(path) as file:
            file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        file.close()
        return [path.read_bytes()]


# What comes over a network.


def requests() -> list[bytes]:
    """Bodies; the first letter says of which address: c chat, p completion, t tokenize, l load of an adapter."""
    full = {
        "model": "fake", "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1,
        "seed": 1, "max_tokens": 5, "max_completion_tokens": 5, "stop": ["a"], "stream": True,
        "stream_options": {"include_usage": True}, "n": 1, "logprobs": False, "adapters": [],
        "return_token_ids": True, "ignore_eos": False, "response_format": {"type": "text"}, "tools": [],
        "logit_bias": {"5": 1}, "presence_penalty": 0.1, "stop_token_ids": [7], "min_tokens": 1,
        "chat_template_kwargs": {"enable_thinking": False}, "user": "me", "metadata": {"a": "b"},
    }  # fmt: skip
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "a", "name": "n", "metadata": "x", "tool_calls": None},
    ]  # fmt: skip
    chat = {**full, "messages": messages, "continue_final": True, "continue_token_ids": [1, 2]}
    shaped = {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "strict": True, "schema": {
            "type": "object", "properties": {"a": {"type": "integer"}}}}}}  # fmt: skip
    letters = (b"c", b"c", b"c", b"p", b"p", b"t", b"t", b"l")
    bodies = as_json(
        chat, {"messages": QUESTION}, shaped, {**full, "prompt": "x"}, {"prompt": [5, 6], "max_tokens": 2},
        {"prompt": "né"}, {"messages": QUESTION, "continue_final": False}, {"lora_name": "x"},
    )  # fmt: skip
    return [letter + body for letter, body in zip(letters, bodies, strict=True)]


def raw_requests() -> list[bytes]:
    """Whole requests as they stand on the wire."""
    paths = {
        b"c": b"/v1/chat/completions",
        b"p": b"/v1/completions",
        b"t": b"/tokenize",
        b"l": b"/v1/load_lora_adapter",
    }
    made = []
    for request in requests():
        made.append(
            b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"Connection: close\r\n\r\n%s" % (paths[request[:1]], len(request) - 1, request[1:])
        )
    chunked = (
        b"Transfer-Encoding: chunked\r\n\r\n1e\r\n"
        + b'{"prompt": "x", "max_tokens":1}'[:30]
        + b"\r\n1\r\n}\r\n0\r\n\r\n"
    )
    made.append(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        + chunked
    )
    for path in (b"/health", b"/v1/models", b"/v1/models/fake", b"/nothing?x=1"):
        made.append(b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % path)
    return made


def streams() -> list[bytes]:
    """What a server streams as an answer."""
    first = {
        "id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "prompt_token_ids": [1],
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi", "reasoning_content": "t"},
                     "finish_reason": None, "token_ids": [1], "text": "x"}],
        "glmchat": {"seed": 1, "load_ms": 5, "cached_n": 1, "passes": [[0, 1]], "sampling": {}, "model": "m",
                    "adapters": [{"name": "x", "scale": 1}], "quant": "q"},
    }  # fmt: skip
    last = {
        **first, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}},
        "timings": {"prompt_n": 1, "prompt_ms": 2.0, "predicted_n": 3, "predicted_ms": 4.0, "cache_n": 1},
    }  # fmt: skip
    parts = {"choices": [{"delta": {"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "b"}],
                                    "tool_calls": [{"id": "x"}]}}]}  # fmt: skip
    error = {"error": {"message": "m", "type": "t", "code": "c", "param": None, "hint": "h"}}
    progress = b': glmchat {"waiting": 1, "prefill": 2, "of": 3}\n\n'
    one, two, three, four = as_json(first, last, parts, error)
    done = b"data: [DONE]\n\n"
    return [
        b"data: " + one + b"\n\n" + progress + b"data: " + two + b"\n\n" + done,
        b"event: message\r\ndata: " + three + b"\r\n\r\ndata: " + two + b"\r\n\r\n" + done,
        b"data: " + one + b"\n\ndata: " + four + b"\n\n",
    ]


def replies() -> list[bytes]:
    """Whole replies of a server that is chatted with."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nConnection: close\r\n\r\n"
    models = {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "glmchat", "parent": None,
                                          "created": 1, "max_model_len": 5, "meta": {"n_ctx": 5}}]}  # fmt: skip
    error = {"error": {"message": "m", "type": "t", "param": "n", "code": "c"}}
    refused = b"HTTP/1.1 400 Bad Request\r\nRetry-After: 1\r\nContent-Type: application/json\r\n\r\n"
    return [
        *(head % b"text/event-stream" + stream for stream in streams()),
        head % b"application/json" + as_json(models)[0],
        refused + as_json(error)[0],
        b"HTTP/1.1 302 Found\r\nLocation: /v1/models\r\nContent-Length: 0\r\n\r\n",
    ]


def listings() -> list[bytes]:
    """Whole replies of a hub that is asked for its files."""
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Repo-Commit: %s\r\n\r\n" % COMMIT.encode()
    big = {"rfilename": "model.safetensors", "size": 5, "blobId": BLOB, "lfs": {"sha256": SHA, "size": 5,
           "pointerSize": 134}}  # fmt: skip
    hub = {"id": "a/b", "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": [
        {"rfilename": "config.json", "size": 5, "blobId": BLOB}, big], "lastModified": "2026-01-01T00:00:00.000Z",
        "cardData": {"license": "mit"}, "downloads": 1}  # fmt: skip
    scope = {"Code": 200, "Data": {"Files": [
        {"Path": "config.json", "Size": 5, "Sha256": SHA, "Type": "blob"}, {"Path": "d", "Type": "tree"}]}}  # fmt: skip
    busy = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"
    gated = b"HTTP/1.1 401 No\r\nX-Error-Code: GatedRepo\r\nX-Error-Message: m\r\nContent-Length: 0\r\n\r\n"
    return [*(head + body for body in as_json(hub, scope)), busy, gated]


def mirror_requests() -> list[bytes]:
    """Requests to a mirror, and the listings in its folder."""
    paths = (
        "/", "/api/models", "/api/models/a/b", "/api/models/a/b/revision/main?blobs=true",
        f"/api/models/a/b/tree/{COMMIT}/?recursive=true", "/api/models/a/b/refs", "/a/b/resolve/main/config.json",
        f"/a/b/resolve/{COMMIT}/deep/er/notes.txt",
    )  # fmt: skip
    gets = [f"GET {path} HTTP/1.1\r\nRange: bytes=0-3\r\nIf-None-Match: x\r\n\r\n".encode() for path in paths]
    post = b"POST /api/models/a/b/paths-info/main HTTP/1.1\r\nContent-Type: %s\r\n\r\n%s"
    asked = [
        post % (b"application/json", b'{"paths": ["config.json"], "expand": true}'),
        post % (b"application/x-www-form-urlencoded", b"paths=config.json&expand=True"),
    ]
    file = {"path": "config.json", "size": 2, "sha256": SHA, "git_blob": BLOB, "lfs": False}
    listing = {"format": 1, "repo": "a/b", "commit": COMMIT, "date": "", "source": "", "files": [file]}
    refs = {"branches": {"main": COMMIT}, "tags": {"v1": COMMIT}}
    return [*gets, *asked, *as_json(listing, refs, {"format": 1})]


def lines() -> list[bytes]:
    """Lines that a person enters: of a shell, and in a conversation."""
    return [
        b"run smollm2 hello --temp 0.5 --top-k 5 --seed 1 --stop x -n 5 --json --device cpu --threads 2",
        b"pull a/b@main --include *.json --endpoint http://127.0.0.1:1 --quant 4 --dry-run",
        b"show ./model.gguf --fit --json", b"list --json", b"history search words --limit 5", b"adapters add poet x",
        b"serve smollm2 --port 0 --host 127.0.0.1 --no-api-key --allow-host x", b"hf.co/a/b/blob/main/x.gguf",
        b"compare a b:int4+poet:0.5,temperature=0.2 hello", b"https://huggingface.co/a/b/resolve/main/x.bin?download=1",
        b"/set temperature 0.5", b"/system be brief", b"/adapter poet:0.5 other:-1", b"/export json x.json", b"/undo",
        b"/context drop", b"/load 1", b"/file x.txt", b"/save A title", b"/complete Once upon", b"//slash",
        b"/regen n=1", b"/edit again", b"/reset seed", b"/stats",
    ]  # fmt: skip


def extend_path() -> None:
    """Makes the fakes of the other tests known by name."""
    for folder in ("tests", "tests/fuzz", "tests/chat"):
        if str(ROOT / folder) not in sys.path:
            sys.path.insert(0, str(ROOT / folder))
