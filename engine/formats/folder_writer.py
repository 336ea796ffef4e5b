"""Writing a model's folder: safetensors shards with their index, and the files that are copied along."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from glmchat.core.errors import Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ROOM_FOR_HEADER = 1 << 20  # bytes kept free in front of a mapped file; a header is some 100 for each tensor
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def file_size(layout: Layout) -> int:
    """Bytes of the file, header included."""
    return len(header_bytes(layout)) + sum(_size(*entry) for entry in layout.values())


def _size(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    count = dtype.itemsize
    for length in shape:
        count *= length
    return count


def header_bytes(layout: Layout, metadata: Mapping[str, str] | None = None, length: int | None = None) -> bytes:
    """What a safetensors file begins with.

    length: in bytes; None takes what is needed, so that what is mapped begins on a cache line.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + _size(dtype, shape)
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    if length is not None and len(text) > length - 8:
        raise OSError(f"a header of {len(text)} bytes is too long")
    length = len(text) + 8 + -(len(text) + 8) % 64 if length is None else length
    return (length - 8).to_bytes(8, "little") + text.ljust(length - 8)


class SafetensorsWriter:
    """The header is written first, so every tensor must come in the order, dtype and shape of `layout`.

    The file appears under its name when all of it is on the disk: `.incomplete`, fsync, rename.
    """

    def __init__(self, path: Path, layout: Layout, metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".incomplete")
        self._waiting = list(layout.items())
        self._hash = hashlib.sha256()
        self._file = self._partial.open("wb")
        self._put(header_bytes(layout, metadata))

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor. Raises ValueError if it is not the one whose turn it is."""
        expected, (dtype, shape) = self._waiting.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, dtype, shape):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} came, {expected} {dtype} {shape} was due")
        if tensor.numel():
            self._put(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._waiting:
                    raise ValueError(f"{self._waiting[0][0]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
        finally:  # Ctrl-C may come while the disk is waited for
            self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def sha256(self) -> str:
        """Of the whole file, once everything is written."""
        return self._hash.hexdigest()


class MappedWriter:
    """A file that grows while it is mapped: a tensor comes back as a view of it. The header, in front, comes last."""

    def __init__(self, path: Path, most: int) -> None:
        """most: bytes of tensors; the map is made for so many, and the file cut to what there is at the end."""
        self.path = path
        self._file = path.open("w+b")
        self._end = _ROOM_FOR_HEADER
        self._layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._most = _ROOM_FOR_HEADER + most
        self._file.truncate(self._most)  # costs no room on the disk: nothing is written there
        self._map = mmap.mmap(self._file.fileno(), self._most, access=mmap.ACCESS_READ)
        self._file.seek(_ROOM_FOR_HEADER)

    def write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Append these, each some cache lines long. Raises OSError, or ValueError if `most` did not expect them."""
        if self._end + sum(tensor.nbytes for tensor in tensors.values()) > self._most:
            raise ValueError("there are more of them than the checkpoint's size lets expect")
        views = {}
        for name, tensor in tensors.items():
            self._file.write(tensor.view(-1).view(torch.uint8).numpy().data)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                view = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=self._end)
            views[name] = view.view(tensor.shape)
            self._layout[name] = (tensor.dtype, tuple(tensor.shape))
            self._end += tensor.nbytes
        self._file.flush()
        return views

    def finish(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Write the header and give the file its name when all of it is on the disk. Raises OSError."""
        self._file.seek(0)
        self._file.write(header_bytes(self._layout, metadata, _ROOM_FOR_HEADER))
        self._file.truncate(self._end)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.path.replace(path)


_LARGEST = 64 * 2**20
# Not carried over: weights and their indexes, code that is never run, what is written anew.
_SKIPPED = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".py", ".index.json", ".md5")
_REWRITTEN = ("config.json", "glmchat.json", "plan.json")


def _is_skipped(name: str) -> bool:
    return name.endswith(_SKIPPED) or ".safetensors" in name  # also model.safetensors-00001-of-00002


def write_companions(checkpoint: Checkpoint, folder: Path, description: Mapping[str, Any]) -> None:
    """Write config.json with `description` as its quantization_config, and bring everything but weights and code along.

    Raises Usage for a GGUF file whose vocabulary cannot be written as tokenizer.json.
    """
    if checkpoint.gguf is not None:
        _from_gguf(checkpoint, folder, description)
        return
    for path in sorted(checkpoint.path.iterdir()):
        if path.name.startswith(".") or path.name in _REWRITTEN or _is_skipped(path.name):
            continue
        if path.is_file() and path.stat().st_size <= _LARGEST:
            shutil.copyfile(path, folder / path.name)  # follows the links of a hub's snapshot
    config = dict(read_json(checkpoint.path / "config.json"))
    for key in (
        "auto_map",
        "quantization_bit",
        "quantization_embeddings",
        "transformers_weights",
    ):  # code that is not here; THUDM's own packing; the name of a file that is not written
        config.pop(key, None)
    if checkpoint.config.get("tie_word_embeddings") is False:  # by the tensors, whatever the file said
        config["tie_word_embeddings"] = False
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
