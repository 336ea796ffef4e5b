"""ChatGLM's four generations as THUDM published them, drawn at random, and what others make of such a folder.

transformers runs none of their code. ChatGLM2, ChatGLM3 and GLM-4 are its Glm under other names, and their tensors come
into it as its own conversion puts them there; ChatGLM-6B is computed by its specification. Ids of texts come from
sentencepiece and tiktoken, conversations are put together as the specification says (shared/reference/chatglm).
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken
import torch
from sentencepiece import sentencepiece_model_pb2 as proto
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
sys.path.append(str(ROOT / "benchmarks"))

import random_checkpoints  # noqa: E402

Tensors = dict[str, torch.Tensor]
_V1 = {"hidden_size": 64, "inner_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4}
_V2 = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 2, "num_attention_heads": 4, "kv_channels": 16}
# Name -> the published configuration, what is another size here, and whose vocabulary it has.
ORIGINALS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "ChatGLM-6B, early": ("chatglm-6b-early", _V1, "chatglm-6b-early"),
    "ChatGLM-6B": ("chatglm-6b", _V1, "chatglm-6b"),
    "ChatGLM2": ("chatglm2-6b", _V2, "chatglm2"),
    "ChatGLM2, one group": ("chatglm2-6b", {**_V2, "multi_query_group_num": 1}, "chatglm2"),
    "ChatGLM2, 32k": ("chatglm2-6b", {**_V2, "rope_ratio": 16}, "chatglm2"),
    "ChatGLM3": ("chatglm3-6b", {**_V2, "kv_channels": 32}, "chatglm3"),
    "ChatGLM3, 32k": ("chatglm3-6b", {**_V2, "rope_ratio": 50}, "chatglm3"),
    "GLM-4 of THUDM": ("glm-4-9b-chat", _V2, "glm4"),
}


def configuration(family: str) -> dict[str, Any]:
    name, sizes, _ = ORIGINALS[family]
    return random_checkpoints.tiny(name, **sizes)


def write_words(family: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in sorted((SHARED / "tokenizers" / ORIGINALS[family][2]).iterdir()):
        if path.name in ("ice_text.model", "tokenizer.model", "tokenizer_config.json"):
            shutil.copyfile(path, folder / path.name)


def weights(family: str, seed: int, dtype: torch.dtype) -> Tensors:
    """Under the published names; a head that the network ties is stored beside its embedding, as in the files."""
    tensors = Tensors()
    for name, shape in random_checkpoints.stored_tensors(configuration(family)):
        source = "transformer.word_embeddings.weight" if name == "lm_head.weight" else name
        noise = torch.Generator().manual_seed(seed + zlib.crc32(source.encode()))
        values = torch.randn(shape, generator=noise)
        tensors[name] = (1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.15 * values).to(dtype)
    return tensors


def pack(tensors: Tensors, bits: int) -> tuple[Tensors, Tensors]:
    """As `.half().quantize(bits)` of the originals: what is stored, and scale times code."""
    stored, dense = Tensors(), Tensors()
    for name, tensor in tensors.items():
        stored[name] = dense[name] = tensor.half()
        if not name.endswith("weight") or not any(part in name for part in ("query_key_value", ".dense", "_to_")):
            continue
        half = tensor.half()
        scale = (half.abs().amax(1).float() / (2 ** (bits - 1) - 1)).half()
        code = (half / scale[:, None]).round().to(torch.int8)
        dense[name] = code.float() * scale.float()[:, None]
        pairs = (code[:, 0::2].int() << 4) | (code[:, 1::2].int() & 15)
        stored[name] = code if bits == 8 else pairs.to(torch.uint8).view(torch.int8)
        stored[f"{name}_scale"] = scale
    return stored, dense


class Words:
    """A published vocabulary: texts, conversations and completions as ids."""

    def __init__(self, family: str) -> None:
        self.name = ORIGINALS[family][2]
        folder = SHARED / "tokenizers" / self.name
        self.first, self.early = self.name.startswith("chatglm-6b"), self.name.endswith("early")
        self.offset = 20000 if self.early else 0
        if self.name == "glm4":
            self.ranks = _ranks(folder / "tokenizer.model")
            self.special = {f"<|{role}|>": 151335 + n for n, role in enumerate(_ROLES)} | {"<|endoftext|>": 151329}
            self.head, self.ends = [151331, 151333], {151329, 151336, 151338}
            return
        self.pieces = _pieces(folder / ("ice_text.model" if self.first else "tokenizer.model"), self.early)
        at = 130000 + self.offset
        if self.first:
            self.head, self.ends = [at + 1, at + 4], {at + 5}
            self.special = {
                "<sop>": at + 4,
                "</s>" if self.early else "<eop>": 2 + self.offset if self.early else at + 5,
            }
            self.special |= {"[MASK]": at, "<unk>": self.offset, "<pad>": 3 + self.offset}
        else:
            roles = {f"<|{role}|>": 64794 + n for n, role in enumerate(_ROLES)}
            self.special = roles if self.name == "chatglm3" else {}
            self.head = [64790, 64792]
            self.ends = {2, 64795, 64797} if self.name == "chatglm3" else {2}

    def encode(self, text: str) -> list[int]:
        if self.name == "glm4":
            return self.ranks.encode_ordinary(text)
        if self.first:
            text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
            for count in range(80, 1, -1):
                text = text.replace(" " * count, f"<|blank_{count}|>")
        return [token + self.offset for token in self.pieces.encode(text)]

    def decode(self, ids: Sequence[int]) -> str | None:
        """None where some are no words of a text."""
        if self.name == "glm4":
            return self.ranks.decode(list(ids)) if max(ids) < 151329 else None
        ids = [token - self.offset for token in ids]
        if min(ids) < 5 or max(ids) >= self.pieces.get_piece_size() or any(self.pieces.is_control(n) for n in ids):
            return None
        text = str(self.pieces.decode(ids))
        if not self.first:
            return text
        text = re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text.replace("<|tab|>", "\t"))
        return text.replace("<n>", "\n")

    def completion(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = re.split("(" + "|".join(map(re.escape, self.special)) + ")", text) if self.special else [text]
        for number, part in enumerate(parts):
            if number % 2:
                ids.append(self.special[part])
                continue
            if self.first:  # blanks beside a special word go
                part = part.lstrip() if number else part
                part = part.rstrip() if number < len(parts) - 1 else part
            ids += self.encode(part) if part else []
        if not self.first:
            return [*self.head, *ids]
        return [*ids, *self.head]

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        if self.name in ("chatglm3", "glm4"):
            ids = list(self.head)
            for message in messages:
                role, text = self.special[f"<|{message['role']}|>"], message["content"]
                if self.name == "chatglm3":
                    ids += [role, *self.encode("\n"), *self.encode(text)]
                elif text:
                    ids += [role, *self.encode("\n" + text)]
            return [*ids, self.special["<|assistant|>"]]
        said = [message["content"] for message in messages if message["role"] != "system"]
        if messages[0]["role"] == "system":  # neither has a place for one
            said[0] = f"{messages[0]['content']}\n\n{said[0]}"
        pairs, question = list(zip(said[::2], said[1::2], strict=False)), said[-1]
        if self.first:
            if not pairs:
                return [*self.encode(question), *self.head]
            rounds = "".join(f"[Round {n}]\n问：{q}\n答：{a}\n" for n, (q, a) in enumerate(pairs))
            return [*self.encode(f"{rounds}[Round {len(pairs)}]\n问：{question}\n答："), *self.head]
        rounds = "".join(f"[Round {n}]\n\n问：{q}\n\n答：{a}\n\n" for n, (q, a) in enumerate(pairs, 1))
        return [*self.head, *self.encode(f"{rounds}[Round {len(pairs) + 1}]\n\n问：{question}\n\n答：")]


_ROLES = ("system", "user", "assistant", "observation")
# The expression in tokenization_chatglm.py of glm-4-9b-chat.
_CUT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@cache
def _ranks(path: Path) -> tiktoken.Encoding:
    pairs = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding("reference", pat_str=_CUT, mergeable_ranks=ranks, special_tokens={})


@cache
def _pieces(path: Path, early: bool) -> sentencepiece.SentencePieceProcessor:
    if not early:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    model = proto.ModelProto()
    model.ParseFromString(path.read_bytes())
    control = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
    blanks = ("<|tab|>", *(f"<|blank_{count}|>" for count in range(2, 81)))
    for names, kind in ((control, 3), (blanks, 4), ([f"<0x{value:02X}>" for value in range(256)], 6)):
        for name in names:
            model.pieces.add(piece=name, score=0.0, type=kind)
    model.trainer_spec.byte_fallback = True
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def glm_of(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Any:
    """transformers' Glm with these weights, for ChatGLM2 and later."""
    from transformers import GlmConfig, GlmForCausalLM

    heads, groups, width = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    ratio = float(config.get("rope_ratio", 1))
    rope = {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
    if "chatglm2" in config["_name_or_path"] and ratio != 1:  # ChatGLM2-6B-32k interpolates positions instead
        rope |= {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0}
    model = GlmForCausalLM(
        GlmConfig(
            vocab_size=config["padded_vocab_size"], hidden_size=config["hidden_size"], head_dim=width,
            intermediate_size=config["ffn_hidden_size"], num_hidden_layers=config["num_layers"],
            num_attention_heads=heads, num_key_value_heads=groups, attention_bias=config["add_qkv_bias"],
            rms_norm_eps=config["layernorm_epsilon"], max_position_embeddings=config["seq_length"],
            rope_parameters=rope, tie_word_embeddings=False, pad_token_id=0, eos_token_id=None,
            attn_implementation="eager",
        )
    )  # fmt: skip
    named = Tensors()
    for name, tensor in tensors.items():
        if name.endswith("inv_freq"):
            continue
        name = name.removeprefix("transformer.").replace("embedding.word_embeddings", "model.embed_tokens")
        name = name.replace("output_layer", "lm_head").replace("encoder.final_layernorm", "model.norm")
        name = name.replace("encoder.layers", "model.layers").replace("self_attention.dense", "self_attn.o_proj")
        name = name.replace("dense_h_to_4h", "gate_up_proj").replace("dense_4h_to_h", "down_proj")
        if "query_key_value" not in name:
            named[name] = tensor.float()
            continue
        parts = torch.split(tensor.float(), [heads * width, groups * width, groups * width])
        for letter, part in zip("qkv", parts, strict=True):
            named[name.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
    model.load_state_dict(named)
    return model.eval()


class FirstGLM:
    """ChatGLM-6B by its specification; `early` counts positions as the code of March 2023 did."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], *, early: bool) -> None:
        self.tensors = {name.removeprefix("transformer."): tensor.float() for name, tensor in tensors.items()}
        self.heads, self.layers, self.early = config["num_attention_heads"], config["num_layers"], early
        self.bos = int(config["bos_token_id"])
        self.gmask, self.mask = int(config.get("gmask_token_id", 150001)), int(config.get("mask_token_id", 150000))

    def positions(self, ids: Sequence[int], prompt: int) -> torch.Tensor:
        """[2, length]. prompt: how many of the ids one pass read; the others came one by one."""
        begin = ids.index(self.bos)
        order = (self.mask, self.gmask) if self.early else (self.gmask, self.mask)
        place = next(ids.index(mark) for mark in order if mark in ids)
        counted = self.early and self.mask not in ids
        first = [n if n < begin or (counted and n < prompt) else place for n in range(len(ids))]
        return torch.tensor([first, [max(0, n - begin + 1) for n in range(len(ids))]])

    @torch.inference_mode()
    def logits(self, ids: list[int], prompt: int | None = None) -> torch.Tensor:
        length, begin = len(ids), ids.index(self.bos)
        positions = self.positions(ids, length if prompt is None else prompt)
        rows, columns = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
        hidden = (columns > rows) & (columns >= begin)
        x = self.tensors["word_embeddings.weight"][ids]
        for layer in range(self.layers):
            stem = f"layers.{layer}."
            a = self._norm(x, f"{stem}input_layernorm")
            fused = self._linear(a, f"{stem}attention.query_key_value").view(length, self.heads, -1)
            q, k, v = fused.chunk(3, -1)
            q, k = _turn(q, positions), _turn(k, positions)
            scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[-1] ** 0.5
            mixed = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -1e30).softmax(-1), v)
            o = self._linear(mixed.reshape(length, -1), f"{stem}attention.dense")
            m = self._norm(a * 56**0.5 + o, f"{stem}post_attention_layernorm")
            up = F.gelu(self._linear(m, f"{stem}mlp.dense_h_to_4h"), approximate="tanh")
            x = m * 56**0.5 + self._linear(up, f"{stem}mlp.dense_4h_to_h")
        return self._norm(x, "final_layernorm") @ self.tensors["word_embeddings.weight"].T

    def answer(self, ids: list[int], count: int) -> list[int]:
        said: list[int] = []
        for _ in range(count):
            said.append(int(self.logits([*ids, *said], len(ids))[-1].argmax()))
        return said

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 1e-5)


def _turn(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """x [length, heads, width]: one half by the first row of positions, the other by the second."""
    halves = []
    for half, row in zip(x.chunk(2, -1), positions, strict=True):
        width = half.shape[-1]
        frequency = (1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)).half().float()
        angle = (row[:, None].float() * frequency).repeat(1, 2)[:, None]
        low, high = half.chunk(2, -1)
        halves.append(half * angle.cos() + torch.cat((-high, low), -1) * angle.sin())
    return torch.cat(halves, -1)


def set_ends(one_ends: str, folder: Path, words: Words, said: int) -> set[int]:
    """Write `said` as an end of a text beside the family's own where this draw has such a list; returns all ends."""
    config = json.loads((folder / "config.json").read_text())
    own = config.get("eos_token_id")
    listed = [*(own if isinstance(own, list) else [own]), said]
    if one_ends in ("list", "both lists"):
        (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": listed}))
    elif one_ends == "generation":
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": listed}))
    else:
        return words.ends
    return {*words.ends, said}
