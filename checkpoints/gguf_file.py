"""A GGUF file's header, read by us and believed only where it can be checked.

Counts, lengths and offsets in a header are claims. Each is compared with the bytes that are really there before it is
used, and everything kept from it is bounded, so a lying or truncated file is refused in well under a second without
taking memory. Source: the GGUF specification in ggml's docs (version 2 and 3, little endian).

Its words for the Llama family are said here in those of config.json and of its checkpoints.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, cast

from glmchat.checkpoints.architectures import refuse_gguf_kind
from glmchat.checkpoints.spec import ModelSpec, match_tensors
from glmchat.checkpoints.weight_choice import listed
from glmchat.checkpoints.weight_files import gguf_parts, refuse_pointer
from glmchat.core.errors import Damaged, Hostile, Usage
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.shell import shell_word
from glmchat.core.text import human_bytes, one_line

# value type -> (its letter in `struct`, bytes); 8 is a string and 9 an array
_SCALARS = {
    0: ("B", 1), 1: ("b", 1), 2: ("H", 2), 3: ("h", 2), 4: ("I", 4), 5: ("i", 4), 6: ("f", 4), 7: ("?", 1),
    10: ("Q", 8), 11: ("q", 8), 12: ("d", 8),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MOST_STRINGS = 1_500_000  # the largest vocabularies hold 262,144 pieces and about twice as many merges
_MOST_ARRAYS = 1024  # in an array; no published file has any
_LONGEST_STRING = 16 * 2**20
_MOST_FIELDS = 65_536
_MOST_TENSORS = 100_000
_MOST_ELEMENTS = 2**42
_PIECE = 2**20  # bytes of a header that are read at a time
_BEGINNING = 16_384  # bytes of each packed tensor that are looked at: of random ones, one scale in 32 is none
_FINITE = bytes(high for high in range(256) if high & 0x7C != 0x7C)  # the higher byte of a float16 that is a number

# GGML's number of a type -> (name, elements in a block, bytes of a block); tests compare it with the gguf package.
TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# What the gguf package cannot turn into weights either: types of activations, of counts, and one bit a weight.
UNREAD = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64", "Q1_0"})
PACKED: Mapping[str, int] = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # types that stay packed in memory -> bits; groups of 32


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies. shape is in torch's order: rows first."""

    name: str
    shape: tuple[int, ...]
    type: int  # GGML's number
    type_name: str
    offset: int  # from the start of the file
    nbytes: int
    part: int = 0  # of a model in several files, the one that it lies in


def unread_type(tensor: GGUFTensor) -> Damaged:
    return Damaged(
        tr(
            "{name} is stored as {type_name}, which cannot be read",
            name=one_line(tensor.name, 60),
            type_name=tensor.type_name,
        ),
        hint=tr("use a Q4_0, Q4_1, Q8_0, Q4_K, Q6_K, F16 or BF16 file of this model"),
        code="gguf.type",
    )


def open_gguf(path: Path) -> GGUFFile:
    """The validated file, with the tensors of all parts if it is the first of several; one that was opened a moment ago
    is not read again. Raises Damaged, Hostile, or Usage for a part that is not the first."""
    stamps = [(part, part.stat()) for part in gguf_parts(path) if part.is_file()] or [(path, path.stat())]
    return _opened(path, tuple((part, stat.st_mtime_ns, stat.st_size) for part, stat in stamps))


@lru_cache(maxsize=1)
def _opened(path: Path, stamps: tuple[tuple[Path, int, int], ...]) -> GGUFFile:
    file = GGUFFile(path)
    count = file.metadata.get("split.count")
    if isinstance(count, int) and count > 1:
        file.join(count)
    return file


class GGUFFile:
    """A validated GGUF file: `metadata` (key -> value; arrays of numbers as views), `tensors`, its bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        refuse_pointer(path)
        self._at = 0
        self._strings = 0
        self.parts = [self]
        with open_file(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            # The header is read and not looked up in the map: one that is cut meanwhile would end the process.
            self._file, self._head = file, bytearray()
            self._read_header()
        del self._file, self._head

    def data(self, tensor: GGUFTensor) -> memoryview:
        """The stored bytes of one tensor, mapped, not copied."""
        return memoryview(self.parts[tensor.part].bytes)[tensor.offset : tensor.offset + tensor.nbytes]

    def check_tensors(self, spec: ModelSpec) -> None:
        """Raise Damaged for what the table of tensors tells: one that is missing, belongs to no part of such a network,
        has another shape, or is stored in a way that nobody reads."""
        for tensor in self.tensors.values():
            if tensor.type_name in UNREAD:
                raise unread_type(tensor)
        match_tensors({checkpoint_name(name): tensor.shape for name, tensor in self.tensors.items()}, spec, "llama")

    def check_scales(self) -> None:
        """Raise Damaged for packed tensors in whose beginnings a scale is not a finite number: data that lies elsewhere
        than the header says. The engine looks at all of them, when it loads them."""
        for number, part in enumerate(self.parts):
            with open_file(part.path) as file:
                for tensor in self.tensors.values():
                    if tensor.part != number or tensor.type_name not in PACKED:
                        continue
                    width, places = TYPES[tensor.type][2], (1, 3) if tensor.type_name == "Q4_1" else (1,)
                    begin = os.pread(file.fileno(), min(tensor.nbytes, _BEGINNING), tensor.offset)
                    if any(begin[place::width].translate(None, _FINITE) for place in places):
                        raise Damaged(
                            tr("{name}: a scale is not a finite number", name=one_line(tensor.name, 80)),
                            hint=tr("the file is damaged: run `glmchat verify`, or pull the model again"),
                            code="weights.not_finite",
                        )

    def join(self, count: int) -> None:
        """Take in the tensors of the other parts. Raises Damaged or Usage that says which part is what."""
        name, number, paths = one_line(self.path.name), self.metadata.get("split.no"), gguf_parts(self.path)
        number = number + 1 if isinstance(number, int) else 1
        if len(paths) != count:
            raise Damaged(
                tr("{name} says that it is part {number} of {count}, but its name does not", name=name, number=number,
                   count=count),
                hint=tr("give every part its name back (…-00001-of-{count}.gguf); cat does not join them",
                        count=f"{count:05}"),
                code="gguf.part",
            )  # fmt: skip
        missing = [part.name for part in paths if not part.is_file()]
        if number != 1 and paths[0].is_file():
            raise Usage(
                tr("{name} is part {number} of {count}", name=name, number=number, count=count),
                hint=tr("name the first part: {path}", path=one_line(str(paths[0]))),
                code="gguf.not_first",
            )
        if missing:
            raise Damaged(
                tr("{name} is part {number} of {count}; missing: {names}", name=name, number=number, count=count,
                   names=listed(missing)),
                hint=tr("pull the model again: what was downloaded is kept"),
                code="gguf.part",
            )  # fmt: skip
        self.parts += [GGUFFile(part) for part in paths[1:]]
        for index, part in enumerate(self.parts):
            said = part.metadata.get("split.no"), part.metadata.get("split.count")
            if said != (index, count) or (index and not self.tensors.keys().isdisjoint(part.tensors)):
                raise Damaged(
                    tr("{name} is not part {number} of {count}", name=one_line(part.path.name), number=index + 1,
                       count=count),
                    hint=tr("the parts belong to different models: pull the model again"),
                    code="gguf.part",
                )  # fmt: skip
            self.tensors |= {short: replace(tensor, part=index) for short, tensor in part.tensors.items()}
        total = self.metadata.get("split.tensors.count")
        if isinstance(total, int) and total != len(self.tensors):
            raise Damaged(
                tr("{name} promises {total} tensors, but its parts contain {n}", name=name, total=total,
                   n=len(self.tensors)),
                hint=tr("pull the model again"),
                code="gguf.part",
            )  # fmt: skip

    # reading -------------------------------------------------------------------------------------------------------

    def _read_header(self) -> None:
        if self._take(min(4, self.size)) != b"GGUF":
            raise Damaged(
                tr("{name} is not a GGUF file", name=one_line(self.path.name)),
                hint=tr("pull the model again"),
                code="gguf.magic",
            )
        version = self._integer("<I", 4)
        if version not in (2, 3):
            raise Damaged(
                tr(
                    "{name} is GGUF version {version}",
                    name=one_line(self.path.name),
                    version=version if version < 1000 else "big-endian",
                ),
                hint=tr("only little-endian versions 2 and 3 can be read: convert the file again"),
                code="gguf.version",
            )
        tensor_count, field_count = self._integer("<Q", 8), self._integer("<Q", 8)
        left = self.size - self._at
        # The smallest field takes 13 bytes and the smallest tensor record 32.
        if field_count > min(_MOST_FIELDS, left // 13) or tensor_count > min(_MOST_TENSORS, left // 32):
            self._lie(f"it claims {field_count} fields and {tensor_count} tensors")
        self.metadata: dict[str, Any] = {}
        for _ in range(field_count):
            key = self._string()
            if key in self.metadata:
                self._lie(f"the field {one_line(key, 60)} stands in it twice")
            self.metadata[key] = self._value(self._integer("<I", 4), key, depth=0)
        records = [self._tensor_record() for _ in range(tensor_count)]
        self.header_bytes = self._at
        self.tensors = self._placed(records)

    def _placed(self, records: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, GGUFTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            self._lie(f"its alignment is {one_line(repr(alignment), 40)}")
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in records:
            type_name, block, block_bytes = self._type(kind, name)
            count = 1
            for extent in shape:
                count *= extent
            if shape[-1] % block:
                self._lie(f"the rows of {one_line(name, 60)} are no multiple of {block}")
            nbytes = count // block * block_bytes
            if name in tensors:
                self._lie(f"{one_line(name, 60)} stands in it twice")
            if offset % alignment or offset > self.size:
                self._lie(f"{one_line(name, 60)} is said to lie at byte {offset} of {self.size}")
            if start + offset + nbytes > self.size:
                raise Damaged(
                    tr(
                        "{name} is truncated: {name2} ends at byte {start}, the file has {size} ({size2})",
                        name=one_line(self.path.name),
                        name2=one_line(name, 60),
                        start=start + offset + nbytes,
                        size=self.size,
                        size2=human_bytes(self.size),
                    ),
                    hint=tr("the download was interrupted: pull the model again"),
                    code="gguf.truncated",
                )
            tensors[name] = GGUFTensor(name, shape, kind, type_name, start + offset, nbytes)
        end = start
        for tensor in sorted(tensors.values(), key=lambda t: t.offset):
            if tensor.offset < end:
                self._lie(f"{one_line(tensor.name, 60)} overlaps another tensor")
            if tensor.offset > end:  # nobody writes such a file, and llama.cpp refuses it
                self._lie(f"{one_line(tensor.name, 60)} lies {tensor.offset - end} bytes behind the tensor before it")
            end = -(-(tensor.offset + tensor.nbytes) // alignment) * alignment
        return tensors

    def _type(self, kind: int, name: str) -> tuple[str, int, int]:
        if kind not in TYPES:
            self._lie(f"{one_line(name, 60)} is of the unknown type {kind}")
        return TYPES[kind]

    def _tensor_record(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._integer("<I", 4)
        if not 1 <= dimensions <= 4:
            self._lie(f"{one_line(name, 60)} has {dimensions} dimensions")
        extents = [self._integer("<Q", 8) for _ in range(dimensions)]
        elements = 1
        for extent in extents:
            elements *= extent
        if not 1 <= elements <= _MOST_ELEMENTS:
            self._lie(f"{one_line(name, 60)} has the shape {extents}")
        kind, offset = self._integer("<I", 4), self._integer("<Q", 8)
        return name, tuple(reversed(extents)), kind, offset

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in _SCALARS:
            letter, width = _SCALARS[kind]
            return struct.unpack(f"<{letter}", self._take(width))[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 2:
            self._lie(f"the field {one_line(key, 60)} is of the unknown type {kind}")
        inner, length = self._integer("<I", 4), self._integer("<Q", 8)
        if inner in _SCALARS:
            letter, width = _SCALARS[inner]
            if length > (self.size - self._at) // width:
                self._lie(f"the field {one_line(key, 60)} claims {length} values")
            return memoryview(self._take(length * width)).cast(cast(Any, letter))
        if length > min((self.size - self._at) // 8, _MOST_STRINGS - self._strings):
            self._lie(f"the field {one_line(key, 60)} claims {length} entries")
        if inner == _STRING:
            return self._strings_of(length)
        if length > _MOST_ARRAYS:
            self._lie(f"the field {one_line(key, 60)} claims {length} arrays")
        self._strings += length
        return [self._value(inner, key, depth + 1) for _ in range(length)]

    def _strings_of(self, count: int) -> list[str]:
        """`count` strings in one tight loop: a vocabulary has a hundred thousand."""
        self._strings += count
        source, at, unpack = self._head, self._at, struct.Struct("<Q").unpack_from
        here = len(source)
        found: list[str] = []
        for _ in range(count):
            if at + 8 > here:
                here = self._fetch(at + 8)
            length = unpack(source, at)[0]
            end = at + 8 + length
            if length > _LONGEST_STRING:
                self._short()
            if end > here:
                here = self._fetch(end)
            found.append(source[at + 8 : end].decode("utf-8", "replace"))
            at = end
        self._at = at
        return found

    def _string(self) -> str:
        length = self._integer("<Q", 8)
        if length > _LONGEST_STRING:
            self._lie(f"a text in its header claims {length} bytes")
        return self._take(length).decode("utf-8", "replace")

    def _integer(self, form: str, width: int) -> int:
        value: int = struct.unpack(form, self._take(width))[0]
        return value

    def _take(self, width: int) -> bytes:
        if self._at + width > len(self._head):
            self._fetch(self._at + width)
        self._at += width
        return bytes(self._head[self._at - width : self._at])

    def _fetch(self, end: int) -> int:
        """Have the file's bytes up to `end` in memory, and some more; returns how many there are now."""
        if end <= self.size:  # what a header claims is no reason to ask for memory
            self._head += self._file.read(max(_PIECE, end - len(self._head)))
        if end > len(self._head):
            self._short()
        return len(self._head)

    def _short(self) -> NoReturn:
        raise Damaged(
            tr(
                "{name} ends in the middle of its header ({size})",
                name=one_line(self.path.name),
                size=human_bytes(self.size),
            ),
            hint=tr("the download was interrupted: pull the model again"),
            code="gguf.truncated",
        )

    def _lie(self, what: str) -> NoReturn:
        raise Hostile(
            tr("{name} has an impossible header: {what}", name=one_line(self.path.name), what=what),
            hint=tr("the file is damaged or malicious: pull the model again from a source you trust"),
            code="gguf.lie",
        )


ARCHITECTURES = ("llama", "qwen2", "qwen3")

# general.architecture's own prefix is stripped: "llama.block_count" is looked up as "block_count".
_MEASURES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "rope_freqs.weight": "model.rope_freqs",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def is_adapter(file: GGUFFile) -> bool:
    """A LoRA as llama.cpp takes it: no model."""
    return file.metadata.get("general.type") == "adapter" or "adapter.type" in file.metadata


def adapter_config(file: GGUFFile) -> dict[str, Any]:
    """What adapter_config.json would say of such a file. Raises Usage for one that is a model, or another kind."""
    meta: Mapping[str, Any] = file.metadata
    name, kind, architecture = one_line(file.path.name), meta.get("adapter.type"), meta.get("general.architecture")
    if not is_adapter(file):
        raise Usage(
            tr("{name} contains a model, not an adapter", name=name),
            hint=f"glmchat run {shell_word(str(file.path))}",
            code="adapter.kind",
        )
    if kind != "lora" or architecture not in ARCHITECTURES:
        raise Usage(
            tr(
                "{name} is an adapter of the type {kind} for {architecture}, which glmchat does not read from GGUF",
                name=name,
                kind=one_line(repr(kind), 40),
                architecture=one_line(repr(architecture), 40),
            ),
            hint=tr("use the adapter as PEFT saved it (adapter_model.safetensors)"),
            code="adapter.type",
        )
    ranks = {tensor.shape[-1] for short, tensor in file.tensors.items() if short.endswith(".lora_b")}
    alpha = meta.get("adapter.lora.alpha")
    config: dict[str, Any] = {"r": max(ranks, default=1), "lora_alpha": alpha}
    if not alpha and len(ranks) == 1:  # llama.cpp then takes the product as it is
        config["lora_alpha"] = config["r"]
    if len(ranks) > 1:
        config["rank_pattern"] = {
            re.escape(adapter_name(short).partition(".lora_")[0]): tensor.shape[-1]
            for short, tensor in file.tensors.items()
            if short.endswith(".lora_b")
        }
    address = meta.get("general.base_model.0.repo_url")
    base = "/".join(address.rstrip("/").split("/")[-2:]) if isinstance(address, str) else None
    return {**config, "base_model_name_or_path": base or meta.get("general.base_model.0.name")}


def adapter_name(name: str) -> str:
    """ "blk.3.attn_q.weight.lora_a" -> "model.layers.3.self_attn.q_proj.lora_A.weight"; others as they are."""
    whole, _, factor = name.rpartition(".")
    if factor not in ("lora_a", "lora_b"):
        return checkpoint_name(name)
    place = checkpoint_name(whole).removesuffix(".weight")
    if place == "model.embed_tokens":
        return f"{place}.lora_embedding_{factor[-1].upper()}"
    return f"{place}.lora_{factor[-1].upper()}.weight"


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The metadata in config.json's words, with `model_type` and `gguf: True`."""
    meta: Mapping[str, Any] = file.metadata
    architecture = meta.get("general.architecture")
    if is_adapter(file):
        base = meta.get("general.base_model.0.name")
        path = shell_word(str(file.path))
        raise Usage(
            tr(
                "{name} contains only an adapter; it needs {base}",
                name=one_line(file.path.name),
                base=one_line(base, 80) if isinstance(base, str) and base else tr("its base model"),
            ),
            hint=f"glmchat run BASE --adapter {path}",
            code="model.only_adapter",
        )
    if not isinstance(architecture, str):
        raise Damaged(
            tr("{name} does not say which architecture it contains", name=one_line(file.path.name)),
            hint=tr("it is an adapter or a vocabulary, or it is damaged"),
            code="gguf.no_architecture",
        )
    config: dict[str, Any] = {"model_type": architecture, "gguf": True}
    refuse_gguf_kind(one_line(file.path.name), architecture)
    if architecture not in ARCHITECTURES:
        raise Damaged(
            tr(
                "{name} contains a model of the architecture {architecture}, which glmchat does not read from GGUF",
                name=one_line(file.path.name),
                architecture=one_line(architecture, 40),
            ),
            hint=tr(
                "GGUF files of {names} can be read; for this model, use the Hugging Face folder",
                names=", ".join(ARCHITECTURES),
            ),
            code="gguf.architecture",
        )
    if not file.tensors:
        raise Damaged(
            tr("{name} contains no tensors", name=one_line(file.path.name)),
            hint=tr("it is only a vocabulary, or one of several files: name the file with the weights"),
            code="gguf.no_tensors",
        )
    if meta.get(f"{architecture}.expert_count"):
        raise _unread(file, tr("a mixture of experts"))
    for word, ours in _MEASURES.items():
        value = meta.get(f"{architecture}.{word}")
        if value is not None:
            config[ours] = value
    config |= _rope(file, architecture)
    if "rope_freqs.weight" in file.tensors:
        config["rope_freqs"] = True
    rotated = meta.get(f"{architecture}.rope.dimension_count")
    if rotated is not None:
        config["rotary_dim"] = rotated
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    config["attention_output_bias"] = "blk.0.attn_output.bias" in file.tensors
    ids = [meta.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    config["eos_token_id"] = [value for value in ids if isinstance(value, int)]
    config["bos_token_id"] = meta.get("tokenizer.ggml.bos_token_id")
    return config


def _rope(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The scaling of rotary positions in config.json's words; llama.cpp takes a factor without a type as linear."""
    meta: Mapping[str, Any] = file.metadata
    said = {key: meta.get(f"{architecture}.rope.{key}") for key in ("scaling.type", "scaling.factor", "scale_linear")}
    kind, factor = said["scaling.type"], said["scaling.factor"] or said["scale_linear"]
    if kind == "none" or (kind is None and (not factor or factor == 1)):
        return {}
    if kind not in (None, "linear", "yarn"):
        raise _unread(file, tr("the rope scaling {kind}", kind=one_line(str(kind), 40)))
    scaling: dict[str, Any] = {"rope_type": kind or "linear", "factor": factor or 1.0}
    if kind == "yarn":
        for key, name in (("original_context_length", "original_max_position_embeddings"),
                          ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):  # fmt: skip
            if (value := meta.get(f"{architecture}.rope.scaling.{key}")) is not None:
                scaling[name] = value
        if (own := meta.get(f"{architecture}.rope.scaling.attn_factor")) not in (None, 1.0):
            scaling["attention_factor"] = float(own) * (0.1 * math.log(max(scaling["factor"], 1.0)) + 1.0)
    return {"rope_scaling": scaling}


def _unread(file: GGUFFile, what: str) -> Damaged:
    return Damaged(
        tr("{name} contains {what}, which glmchat does not read from GGUF", name=one_line(file.path.name), what=what),
        hint=tr("use the Hugging Face folder of this model"),
        code="gguf.unread",
    )


def checkpoint_name(name: str) -> str:
    """ "blk.3.attn_q.weight" -> "model.layers.3.self_attn.q_proj.weight"; unknown names come back as they are."""
    if name in _OUTER:
        return _OUTER[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return name
