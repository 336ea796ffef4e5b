"""What people give as a model or as an adapter that is none: builders of folders and files."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fakes import stored_shapes
from gguf import GGUFWriter

Build = Callable[[Path], Path]  # an empty folder -> what is given as the model or the adapter

LLAMA: Mapping[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 272, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TOKENIZER: Mapping[str, Any] = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {chr(33 + n): n for n in range(90)}, "merges": []},
}  # fmt: skip
LAYER = "model.layers.0.self_attn.q_proj"


def tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A safetensors file of zeros in float32."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(at))
    return path


def saved_by_torch(path: Path, names: tuple[str, ...] = ("model.embed_tokens.weight",)) -> Path:
    torch.save({name: torch.zeros(1000, 50) for name in names}, path)
    return path


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Files by name: bytes, text, or what is written as JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def llama(folder: Path, *, weights: bool = True, **changes: Any) -> Path:
    """A Llama of two layers as far as names and sizes tell."""
    write(folder, {"config.json": {**LLAMA, **changes}, "tokenizer.json": TOKENIZER, "tokenizer_config.json": {}})
    if weights:
        tensors(folder / "model.safetensors", stored_shapes(LLAMA))
    return folder


def gguf(path: Path, architecture: str = "llama", *, count: int = 1, fields: Mapping[str, Any] | None = None) -> Path:
    """A GGUF file of a Llama's measures with `count` tensors."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(256)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(33 + n) for n in range(90)])
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in (fields or {}).items():
        add[type(value)](key, value)
    for number in range(count):
        name = "token_embd.weight" if number == 0 else f"blk.{number}.attn_q.weight"
        writer.add_tensor(name, np.zeros((90, 64) if number == 0 else (64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_parts(folder: Path) -> Path:
    """The first of three files."""
    writer = GGUFWriter(folder / "x.gguf", "llama", split_max_tensors=1)
    writer.add_context_length(256)
    writer.add_block_count(2)
    for number in range(3):
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "x-00001-of-00003.gguf"


def lora(folder: Path, shapes: Mapping[str, tuple[int, ...]] | None = None, **settings: Any) -> Path:
    """An adapter as PEFT saves it, for a layer of the tiny Llama."""
    stem = f"base_model.model.{LAYER}"
    pair = {f"{stem}.lora_A.weight": (4, 64), f"{stem}.lora_B.weight": (64, 4)}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings}
    write(folder, {"adapter_config.json": config})
    tensors(folder / "adapter_model.safetensors", pair if shapes is None else shapes)
    return folder


def _swap(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def _cut(path: Path, left: int) -> Path:
    return _swap(path, path.read_bytes()[:left])


def _sharded(folder: Path, *, missing: bool = False, cut: bool = False) -> Path:
    llama(folder, weights=False)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for number, name in enumerate(names):
        tensors(folder / name, {f"part{number}.weight": (1000, 64)})
    write(folder, {"model.safetensors.index.json": {"weight_map": {f"part{n}.weight": s for n, s in enumerate(names)}}})
    if missing:
        (folder / names[1]).unlink()
    if cut:
        _cut(folder / names[1], 5000)
    return folder


def _without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def _gone(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


def _running_code() -> bytes:
    """A file of torch whose pickle calls a function of the system."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
        archive.writestr("archive/version", b"3\n")
    return packed.getvalue()


def _linked(path: Path) -> Path:
    path.symlink_to(path.parent / "nowhere")
    return path


def _quantised(**said: Any) -> Build:
    return lambda folder: llama(folder, quantization_config=said)


def _archive(path: Path, kind: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/config.json", "{}")
    else:
        with tarfile.open(path, "w:gz" if kind == "gz" else "w") as tar:
            info = tarfile.TarInfo("model/config.json")
            info.size = 2
            tar.addfile(info, io.BytesIO(b"{}"))
    return path


def _one_weight(name: str, **config: Any) -> Build:
    return lambda folder: write(llama(folder, weights=False, **config), {name: bytes(200_000)})


def _pointer(folder: Path) -> Path:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 13400000000\n"
    return write(llama(folder, weights=False), {"model.safetensors": text})


def _text_model(kind: str, **changes: Any) -> Build:
    """A configuration of another kind of network beside weights and a tokenizer."""
    return lambda folder: llama(folder, model_type=kind, architectures=[f"{kind.title()}Model"], **changes)


def _training_output(folder: Path) -> Path:
    lora(folder / "checkpoint-20", base_model_name_or_path="acme/base")
    return folder


def _prefix_only(folder: Path) -> Path:
    chatglm = {"model_type": "chatglm", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
               "vocab_size": 130528, "pre_seq_len": 8, "_name_or_path": "THUDM/chatglm-6b"}  # fmt: skip
    write(folder, {"config.json": chatglm})
    saved_by_torch(folder / "pytorch_model.bin", ("transformer.prefix_encoder.embedding.weight",))
    return folder


def _diffusion(folder: Path) -> Path:
    write(folder, {"model_index.json": {"_class_name": "StableDiffusionPipeline"}, "unet/config.json": {"x": 1}})
    tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", {"conv.weight": (64, 64)})
    return folder


def _sentence_transformers(folder: Path) -> Path:
    _text_model("bert")(folder)
    return write(folder, {"modules.json": "[]", "config_sentence_transformers.json": {}})


def _parts(folder: Path, given: int, missing: int = 0) -> Path:
    first = gguf_parts(folder)
    paths = [first.with_name(f"x-0000{n}-of-00003.gguf") for n in (1, 2, 3)]
    if missing:
        paths[missing - 1].unlink()
    return paths[given - 1]


def _joined(folder: Path) -> Path:
    first = gguf_parts(folder)
    parts = [first.with_name(f"x-0000{n}-of-00003.gguf").read_bytes() for n in (1, 2, 3)]
    return _swap(folder / "one.gguf", b"".join(parts))


def _gguf_lora(folder: Path, architecture: str = "llama", kind: str = "lora") -> Path:
    fields = {"general.type": "adapter", "adapter.type": kind, "adapter.lora.alpha": 16.0}
    return gguf(folder / "lora.gguf", architecture, fields=fields)


_PNG = b"\x89PNG\r\n\x1a\n" + bytes(600)
_PAGE = b"<!DOCTYPE html><html><body>404</body></html>"
_NO_KEY = {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 272, "num_attention_heads": 4}

# name -> (builder, code, exit code)
MODELS: Mapping[str, tuple[Build, str, int]] = {
    "an empty folder": (lambda f: f, "model.no_config", 3),
    "config without weights": (lambda f: llama(f, weights=False), "weights.none", 3),
    "weights without config": (lambda f: _without(llama(f), "config.json"), "model.no_config", 3),
    "an encoder": (_text_model("bert"), "model.encoder", 2),
    "a newer encoder": (_text_model("modernbert"), "model.encoder", 2),
    "encoder and decoder": (_text_model("t5", is_encoder_decoder=True), "model.kind", 2),
    "encoder and decoder, without its flag": (
        lambda f: llama(f, model_type="bart", architectures=["BartForConditionalGeneration"]), "model.kind", 2),
    "vision alone": (_text_model("vit"), "model.kind", 2),
    "text and pictures compared": (_text_model("clip"), "model.kind", 2),
    "speech to text": (_text_model("whisper", is_encoder_decoder=True), "model.kind", 2),
    "sounds alone": (_text_model("wav2vec2"), "model.kind", 2),
    "a diffusion pipeline": (_diffusion, "model.kind", 2),
    "a sentence transformer": (_sentence_transformers, "model.encoder", 2),
    "a type that only its own code knows": (
        _text_model("acme_custom", auto_map={"AutoModelForCausalLM": "modeling_acme.X"}), "model.unknown_family", 3),
    "a type nobody knows": (_text_model("acme_unheard_of"), "model.unknown_family", 3),
    "a classifier": (lambda f: llama(f, architectures=["LlamaForSequenceClassification"]), "model.kind", 2),
    "Meta's own download": (
        lambda f: write(f, {"consolidated.00.pth": b"PK", "params.json": {}, "tokenizer.model": b"x"}),
        "weights.layout", 3),
    "Mistral's own download": (
        lambda f: write(f, {"consolidated.safetensors": b"x", "params.json": {}, "tekken.json": {}}),
        "weights.layout", 3),
    "ONNX": (_one_weight("model.onnx"), "weights.unread", 3),
    "ONNX in its own folder": (_one_weight("onnx/model.onnx"), "weights.unread", 3),
    "TensorFlow": (_one_weight("tf_model.h5"), "weights.unread", 3),
    "Flax": (_one_weight("flax_model.msgpack"), "weights.unread", 3),
    "OpenVINO": (_one_weight("openvino_model.bin"), "weights.unread", 3),
    "a .pth": (_one_weight("model.pth"), "weights.unread", 3),
    "a variant": (_one_weight("model.fp16.safetensors"), "weights.unread", 3),
    "weights in a sub-folder": (_one_weight("weights/model.safetensors"), "weights.unread", 3),
    "a missing shard": (lambda f: _sharded(f, missing=True), "weights.missing_shard", 3),
    "a shard cut off": (lambda f: _sharded(f, cut=True), "weights.damaged", 3),
    "a file of torch cut off": (
        lambda f: _cut(saved_by_torch(llama(f, weights=False) / "pytorch_model.bin"), 9000).parent,
        "weights.damaged", 3),
    "a pointer of git-lfs": (_pointer, "file.lfs_pointer", 3),
    "an empty file of weights": (
        lambda f: write(llama(f, weights=False), {"model.safetensors": b""}), "file.empty", 3),
    "a page in place of the weights": (
        lambda f: write(llama(f, weights=False), {"model.safetensors": _PAGE}), "weights.damaged", 3),
    "weights that are a dangling link": (
        lambda f: _linked(llama(f, weights=False) / "model.safetensors").parent, "config.unreadable", 3),
    "an index that leads elsewhere": (
        lambda f: write(llama(f, weights=False), {"model.safetensors.index.json": {"weight_map": {"a": "../x"}}}),
        "weights.path", 3),
    "a config that is a list": (lambda f: write(llama(f), {"config.json": "[1]"}), "config.damaged", 3),
    "a config cut off": (lambda f: write(llama(f), {"config.json": '{"model_ty'}), "config.damaged", 3),
    "a config in another encoding": (
        lambda f: write(llama(f), {"config.json": '{"model_type": "lläma"}'.encode("latin-1")}), "config.damaged", 3),
    "a config that is a pointer": (lambda f: write(llama(f), {
        "config.json": (_pointer(f / "x") / "model.safetensors").read_bytes()}), "file.lfs_pointer", 3),
    "a config of huge numbers": (lambda f: llama(f, hidden_size=10**12), "config.absurd", 3),
    "a config of negative numbers": (lambda f: llama(f, num_hidden_layers=-2), "config.absurd", 3),
    "a config of words for numbers": (lambda f: llama(f, vocab_size="many"), "config.absurd", 3),
    "a config without a type": (lambda f: llama(f, model_type=None), "model.unknown_family", 3),
    "a config without a width": (lambda f: write(llama(f), {"config.json": _NO_KEY}), "config.missing", 3),
    "an activation nobody knows": (lambda f: llama(f, hidden_act="nonsense"), "config.absurd", 3),
    "a type of weights nobody knows": (lambda f: llama(f, torch_dtype="bf17"), "config.absurd", 3),
    "kinds of layers nobody knows": (lambda f: llama(f, layer_types=["odd", "odd"]), "config.absurd", 3),
    "one kind of layer too few": (lambda f: llama(f, layer_types=["full_attention"]), "config.absurd", 3),
    "a window in words": (lambda f: llama(f, sliding_window="wide"), "config.absurd", 3),
    "a window of no tokens": (lambda f: llama(f, model_type="mistral", sliding_window=0), "config.absurd", 3),
    "a begin token in words": (lambda f: llama(f, bos_token_id="<s>"), "config.absurd", 3),
    "an end token that is none": (lambda f: llama(f, eos_token_id=[None]), "config.absurd", 3),
    "a padding token without a row": (lambda f: llama(f, pad_token_id=272), "config.absurd", 3),
    "an epsilon in words": (lambda f: llama(f, rms_norm_eps="1e-5"), "config.absurd", 3),
    "a scaling of positions nobody knows": (
        lambda f: llama(f, rope_scaling={"rope_type": "odd", "factor": 2.0}), "config.absurd", 3),
    "a table of settings in place of a number": (
        lambda f: llama(f, model_type="phi3", original_max_position_embeddings={}), "config.absurd", 3),
    **{
        f"{name} that links to nothing": (
            lambda f, name=name: _linked(_gone(llama(f) / name)).parent, "config.unreadable", 3)  # type: ignore[misc]
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json",
                     "chat_template.jinja", "model.safetensors", "added_tokens.json")
    },
    "shards of which one links to nothing": (
        lambda f: _linked(_sharded(f, missing=True) / "model-00002-of-00002.safetensors").parent,
        "config.unreadable", 3),
    "a quantised copy that lost its zero points": (
        lambda f: write(llama(f), {"glmchat.json": {"files": [{"path": "offsets-00001.safetensors"}]}}),
        "weights.missing_shard", 3),
    "zero points that link to nothing": (
        lambda f: _linked(llama(f) / "offsets-00001.safetensors").parent, "config.unreadable", 3),
    "a pickle that runs code": (
        lambda f: write(llama(f, weights=False), {"pytorch_model.bin": _running_code()}), "weights.pickle", 3),
    "a config of a larger network": (lambda f: llama(f, hidden_size=4096, num_hidden_layers=32), "config.absurd", 3),
    "heads of another width than the tensors'": (lambda f: llama(f, head_dim=64), "weights.names", 3),
    "more layers than the tensors have": (lambda f: llama(f, num_hidden_layers=3), "weights.names", 3),
    "fewer layers than the tensors have": (lambda f: llama(f, num_hidden_layers=1), "weights.names", 3),
    "fewer words than the embedding has": (lambda f: llama(f, vocab_size=200), "weights.names", 3),
    "another width in a model of transformers": (
        lambda f: llama(f, model_type="gemma", head_dim=16, intermediate_size=48), "weights.names", 3),
    "a tensor missing": (
        lambda f: tensors(llama(f) / "model.safetensors",
                          {k: v for k, v in stored_shapes(LLAMA).items() if "1.mlp.up" not in k}).parent,
        "weights.names", 3),
    "GGUF without most of its tensors": (lambda f: gguf(f / "x.gguf"), "weights.names", 3),
    "no tokenizer": (lambda f: _without(llama(f), "tokenizer.json", "tokenizer_config.json"), "tokenizer.missing", 3),
    "a tokenizer of an unknown model": (
        lambda f: write(llama(f), {"tokenizer.json": {**TOKENIZER, "model": {"type": "Acme", "vocab": {}}}}),
        "tokenizer.damaged", 3),
    "a tokenizer cut off": (
        lambda f: write(llama(f), {"tokenizer.json": json.dumps(TOKENIZER)[:300]}), "tokenizer.damaged", 3),
    "a tokenizer of another model": (
        lambda f: write(llama(f), {"tokenizer.json": {
            **TOKENIZER, "model": {"type": "BPE", "vocab": {f"w{n}": n for n in range(500)}, "merges": []}}}),
        "tokenizer.generation", 3),
    "a tokenizer.model that is none": (
        lambda f: write(_without(llama(f), "tokenizer.json"), {"tokenizer.model": b"<html>no</html>"}),
        "tokenizer.damaged", 3),
    "a template that cannot be parsed": (
        lambda f: write(llama(f), {"tokenizer_config.json": {"chat_template": "{% for m in messages %}{{ m. }}"}}),
        "template.broken", 3),
    "only an adapter": (lambda f: lora(f, base_model_name_or_path="acme/base"), "model.only_adapter", 2),
    "only a prefix": (_prefix_only, "model.only_adapter", 2),
    "the output of a training": (_training_output, "model.only_adapter", 2),
    "ExLlamaV2": (_quantised(quant_method="exl2", bits=4.0), "quant.method", 2),
    "ExLlamaV3": (_quantised(quant_method="exl3", bits=4.0), "quant.method", 2),
    "FP-Quant": (_quantised(quant_method="fp_quant", quant_config={}), "quant.method", 2),
    "Quanto": (_quantised(quant_method="quanto", weights="int8"), "quant.method", 2),
    "torchao": (_quantised(quant_method="torchao", quant_type={}), "quant.method", 2),
    "AQLM": (_quantised(quant_method="aqlm"), "quant.method", 2),
    "SpQR": (_quantised(quant_method="spqr"), "quant.method", 2),
    "VPTQ": (_quantised(quant_method="vptq"), "quant.method", 2),
    "HIGGS": (_quantised(quant_method="higgs"), "quant.method", 2),
    "EETQ": (_quantised(quant_method="eetq"), "quant.method", 2),
    "FBGEMM": (_quantised(quant_method="fbgemm_fp8"), "quant.method", 2),
    "GPTQ of three bits": (_quantised(quant_method="gptq", bits=3, group_size=128), "quant.method", 2),
    "AWQ in another order": (_quantised(quant_method="awq", bits=4, group_size=128, version="gemv"), "quant.method", 2),
    "MLX of three bits": (lambda f: llama(f, quantization={"bits": 3, "group_size": 64}), "quant.method", 2),
    "FP8 of compressed-tensors": (
        _quantised(quant_method="compressed-tensors", format="float-quantized"), "quant.method", 2),
    "a method nobody knows": (_quantised(quant_method="acme-quant"), "quant.method", 2),
    "a picture": (lambda f: _swap(f / "cat.png", _PNG), "file.kind", 2),
    "a picture called a model": (lambda f: _swap(f / "model.safetensors", _PNG), "file.kind", 2),
    "a zip archive": (lambda f: _archive(f / "model.zip", "zip"), "file.kind", 2),
    "a tar archive": (lambda f: _archive(f / "model.tar", "tar"), "file.kind", 2),
    "a compressed archive": (lambda f: _archive(f / "model.tar.gz", "gz"), "file.kind", 2),
    "a page": (lambda f: _swap(f / "model.gguf", _PAGE), "file.kind", 2),
    "a text": (lambda f: _swap(f / "notes.txt", b"take the model from there\n"), "file.kind", 2),
    "the config itself": (lambda f: llama(f) / "config.json", "file.kind", 2),
    "the weights themselves": (lambda f: llama(f) / "model.safetensors", "file.kind", 2),
    "RWKV's own .pth": (lambda f: saved_by_torch(f / "RWKV-x070.pth"), "file.kind", 2),
    "an empty file": (lambda f: _swap(f / "model.gguf", b""), "file.empty", 3),
    "a dangling link": (lambda f: _linked(f / "model.gguf"), "model.path", 2),
    "nothing": (lambda f: f / "nothing", "model.path", 2),
    "a device": (lambda f: Path("/dev/zero"), "file.gone", 1),
    "GGUF cut off in its header": (lambda f: _cut(gguf(f / "x.gguf"), 200), "gguf.truncated", 3),
    "GGUF cut off in its tensors": (lambda f: _cut(gguf(f / "x.gguf", count=2), 20_000), "gguf.truncated", 3),
    "GGUF with a vocabulary alone": (lambda f: gguf(f / "vocab.gguf", count=0), "gguf.no_tensors", 3),
    "GGUF, part 2": (lambda f: _parts(f, 2), "gguf.not_first", 2),
    "GGUF, part 2 alone": (lambda f: _parts(f, 2, missing=1), "gguf.part", 3),
    "GGUF, a part missing": (lambda f: _parts(f, 1, missing=3), "gguf.part", 3),
    "GGUF, parts joined by cat": (_joined, "gguf.part", 3),
    "GGUF of an architecture not read": (lambda f: gguf(f / "x.gguf", "falcon"), "gguf.architecture", 3),
    "GGUF of a projector of pictures": (lambda f: gguf(f / "mmproj-f16.gguf", "clip"), "model.kind", 2),
    "GGUF of an encoder": (lambda f: gguf(f / "x.gguf", "nomic-bert"), "model.encoder", 2),
    "GGUF of encoder and decoder": (lambda f: gguf(f / "x.gguf", "t5"), "gguf.architecture", 3),
    "GGUF of a mixture": (
        lambda f: gguf(f / "x.gguf", fields={"llama.expert_count": 8}), "gguf.unread", 3),
    "GGUF with another scaling": (
        lambda f: gguf(f / "x.gguf", fields={"llama.rope.scaling.type": "longrope"}), "gguf.unread", 3),
    "GGUF of version 1": (
        lambda f: _swap(f / "x.gguf", b"GGUF" + struct.pack("<IQQ", 1, 0, 0) + bytes(64)), "gguf.version", 3),
    "GGUF that is big-endian": (
        lambda f: _swap(f / "x.gguf", b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64)), "gguf.version", 3),
    "GGUF that is a LoRA": (_gguf_lora, "model.only_adapter", 2),
    "a folder of several GGUF": (
        lambda f: gguf(gguf(f / "x.Q4_0.gguf").with_name("x.Q8_0.gguf")).parent, "model.no_config", 3),
    "a folder of models": (lambda f: llama(f / "one").parent, "model.no_config", 3),
}  # fmt: skip

_OTHER = f"base_model.model.{LAYER}"
ADAPTERS: Mapping[str, tuple[Build, str, int]] = {
    "a model": (llama, "adapter.kind", 2),
    "a model in GGUF": (lambda f: gguf(f / "x.gguf"), "adapter.kind", 2),
    "an empty folder": (lambda f: f, "adapter.empty", 2),
    "nothing": (lambda f: f / "nothing", "adapter.no_path", 1),
    "settings without weights": (lambda f: _without(lora(f), "adapter_model.safetensors"), "adapter.empty", 2),
    "a link to nothing": (lambda f: _linked(f / "poet"), "config.unreadable", 3),
    "pickled weights that link to nothing": (
        lambda f: _linked(_without(lora(f), "adapter_model.safetensors") / "adapter_model.bin").parent,
        "config.unreadable", 3),
    **{
        f"{name} that links to nothing": (
            lambda f, name=name: _linked(_gone(lora(f) / name)).parent, "config.unreadable", 3)  # type: ignore[misc]
        for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja")
    },
    "weights cut off": (
        lambda f: _cut(lora(f) / "adapter_model.safetensors", 900).parent, "adapter.damaged", 3),
    "settings that are a list": (lambda f: write(lora(f), {"adapter_config.json": "[]"}), "config.damaged", 3),
    "another family": (
        lambda f: lora(f, {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": (4, 64),
                           "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight": (192, 4)}),
        "adapter.misfit", 2),
    "another width": (
        lambda f: lora(f, {f"{_OTHER}.lora_A.weight": (4, 128), f"{_OTHER}.lora_B.weight": (128, 4)}),
        "adapter.misfit", 2),
    "another depth": (
        lambda f: lora(f, {f"{_OTHER.replace('layers.0', 'layers.9')}.lora_A.weight": (4, 64),
                           f"{_OTHER.replace('layers.0', 'layers.9')}.lora_B.weight": (64, 4)}),
        "adapter.misfit", 2),
    "another base by name": (
        lambda f: lora(f, base_model_name_or_path="acme/other-7b"), "adapter.other_base", 2),
    "more words": (
        lambda f: lora(f, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 280),
                           "base_model.model.model.embed_tokens.lora_embedding_B": (64, 4)}),
        "adapter.misfit", 2),
    "half a pair": (lambda f: lora(f, {f"{_OTHER}.lora_A.weight": (4, 64)}), "adapter.incomplete", 3),
    "two ranks": (lambda f: lora(f, r=8), "adapter.rank", 3),
    "a rank that is a word": (lambda f: lora(f, r="eight"), "config.absurd", 3),
    "an activated LoRA": (lambda f: lora(f, alora_invocation_tokens=[1, 2]), "adapter.variant", 2),
    "PiSSA": (lambda f: lora(f, init_lora_weights="pissa"), "adapter.variant", 2),
    "replicated layers": (lambda f: lora(f, layer_replication=[[0, 2]]), "adapter.variant", 2),
    "X-LoRA": (lambda f: lora(f, peft_type="XLORA"), "adapter.type", 2),
    "Poly": (lambda f: lora(f, peft_type="POLY"), "adapter.type", 2),
    "a prompt for LLaMA-Adapter": (lambda f: lora(f, peft_type="ADAPTION_PROMPT"), "adapter.type", 2),
    "a kind nobody knows": (lambda f: lora(f, peft_type="ACME"), "adapter.type", 2),
    "LoHa on a model computed here": (
        lambda f: lora(f, {f"{_OTHER}.hada_w1_a": (64, 4), f"{_OTHER}.hada_w1_b": (4, 64),
                           f"{_OTHER}.hada_w2_a": (64, 4), f"{_OTHER}.hada_w2_b": (4, 64)}, peft_type="LOHA"),
        "adapter.misfit", 2),
    "mlx_lm's": (
        lambda f: tensors(write(f, {"adapter_config.json": {"lora_parameters": {"rank": 8}}})
                          / "adapters.safetensors", {"model.layers.0.self_attn.q_proj.lora_a": (64, 8)}).parent,
        "adapter.type", 2),
    "a LoRA in GGUF for an architecture not read": (lambda f: _gguf_lora(f, "falcon"), "adapter.type", 2),
    "a text": (lambda f: _swap(f / "notes.txt", b"take it from there\n"), "file.kind", 2),
    "a picture": (lambda f: _swap(f / "adapter.safetensors", _PNG), "file.kind", 2),
    "an archive": (lambda f: _archive(f / "adapter.zip", "zip"), "file.kind", 2),
    "its settings": (lambda f: lora(f) / "adapter_config.json", "file.kind", 2),
    "several files": (
        lambda f: tensors(tensors(f / "a.safetensors", {"x": (2, 2)}).with_name("b.safetensors"), {"x": (2, 2)}).parent,
        "adapter.several", 2),
    "the output of a training": (_training_output, "adapter.several", 2),
}  # fmt: skip
