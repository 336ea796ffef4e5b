"""What a quantised folder needs beside its weights: config.json, the tokenizer, the licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint

_LARGEST = 64 * 2**20
# Not carried over: weights and their indexes, code that is never run, what is written anew.
_SKIPPED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".py", ".index.json", ".md5")
_REWRITTEN = ("config.json", "glmchat.json", "plan.json")


def write_companions(checkpoint: Checkpoint, folder: Path, description: Mapping[str, Any]) -> None:
    """Write config.json with `description` as its quantization_config, and bring everything but weights and code along.

    Raises Usage for a GGUF file whose vocabulary cannot be written as tokenizer.json.
    """
    if checkpoint.gguf is not None:
        _from_gguf(checkpoint, folder, description)
        return
    for path in sorted(checkpoint.path.iterdir()):
        if path.name.startswith(".") or path.name in _REWRITTEN or path.name.endswith(_SKIPPED):
            continue
        if path.is_file() and path.stat().st_size <= _LARGEST:
            shutil.copyfile(path, folder / path.name)  # follows the links of a hub's snapshot
    config = dict(read_json(checkpoint.path / "config.json"))
    for key in (
        "auto_map",
        "quantization_bit",
        "quantization_embeddings",
    ):  # code that is not here; THUDM's own packing
        config.pop(key, None)
    _write(folder / "config.json", {**config, "quantization_config": description})


def _from_gguf(checkpoint: Checkpoint, folder: Path, description: Mapping[str, Any]) -> None:
    from glmchat.engine.tokenizers.hf import HFTokenizer

    assert checkpoint.gguf is not None
    tokenizer = checkpoint.family.load_tokenizer(checkpoint.path, checkpoint.spec)
    if not isinstance(tokenizer, HFTokenizer):
        raise Usage(
            tr(
                "the vocabulary of {name} is of a kind that tokenizer.json cannot store",
                name=one_line(checkpoint.path.name),
            ),
            hint=tr("quantise the Hugging Face folder of this model"),
            code="quant.tokenizer",
        )
    tokenizer.save(folder / "tokenizer.json")
    meta: Mapping[str, Any] = checkpoint.gguf.metadata
    words = meta.get("tokenizer.ggml.tokens")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token"), ("unknown", "unk_token")):
        number = meta.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(words, list) and isinstance(number, int) and 0 <= number < len(words):
            settings[name] = words[number]
    template = meta.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    _write(folder / "tokenizer_config.json", settings)
    config = {key: value for key, value in checkpoint.config.items() if key != "gguf"}
    architectures = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config["architectures"] = [architectures[str(config["model_type"])]]
    _write(folder / "config.json", {**config, "quantization_config": description})


def _write(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1, default=_plain), encoding="utf-8")


def _plain(value: Any) -> Any:
    """GGUF metadata brings views of arrays."""
    return list(value)
