"""Readers of what lies on a disk: models, adapters, and what glmchat wrote itself."""

from __future__ import annotations

import contextlib
import os
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import good_inputs as good
from good_inputs import QUESTION, TINY, as_json
from trials import Target

TEXT = "Hello  你好\n\t<|im_start|>user 123 \U0001f600"
_TENSORS = 20  # of a file are read


def _model(folder: Path, name: str, data: bytes, **beside: Any) -> Path:
    """A folder with a config.json, one file that is tried, and others."""
    (folder / "config.json").write_bytes(as_json(TINY)[0])
    for other, content in beside.items():
        (folder / other.replace("__", ".")).write_bytes(content)
    (folder / name).write_bytes(data)
    return folder


def read_gguf(data: bytes, folder: Path) -> None:
    from glmchat.checkpoints.fit import check_folder, fit_table
    from glmchat.checkpoints.gguf_file import open_gguf
    from glmchat.core.errors import GlmchatError
    from glmchat.engine.adapters.files import read_adapter
    from glmchat.engine.formats.gguf import decode

    path = folder / "model.gguf"
    path.write_bytes(data)
    file = open_gguf(path)
    for tensor in islice(file.tensors.values(), _TENSORS):
        decode(file, tensor)
    try:
        check_folder(path)
    except GlmchatError:
        read_adapter(path)
        return
    fit_table(path)
    _speak(path)


def _speak(path: Path) -> None:
    """Load a vocabulary and use it as an answer does."""
    from glmchat.engine import load_tokenizer

    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    tokenizer.decode(ids)
    for token in (*ids[:5], 0, tokenizer.vocab_size - 1):
        tokenizer.token_bytes(token)
        tokenizer.piece_bytes(token)
    if encode := getattr(tokenizer, "encode_completion", None):
        encode(TEXT)


def read_weights(data: bytes, folder: Path) -> None:
    from glmchat.checkpoints.fit import check_folder, fit_table
    from glmchat.core.errors import GlmchatError
    from glmchat.engine.formats.weights import open_folder

    _model(folder, "pytorch_model.bin" if data[:2] in (b"PK", b"\x80\x02") else "model.safetensors", data)
    fit_table(folder)
    with contextlib.suppress(GlmchatError):
        check_folder(folder)
    source = open_folder(folder)
    for name in islice(source.shapes(), _TENSORS):
        source.read(name)


def read_pickle(data: bytes, folder: Path) -> None:
    from glmchat.checkpoints.fit import check_folder
    from glmchat.core.errors import GlmchatError
    from glmchat.engine.formats.weights import load_bin

    _model(folder, "pytorch_model.bin", data)
    with contextlib.suppress(GlmchatError):
        check_folder(folder)
    load_bin(folder / "pytorch_model.bin")  # the engine reads it on its own, too


def frame_safetensors(data: bytes) -> bytes:
    """The length in front of the header as the header is now; one time in four it lies."""
    end = data.rfind(b"}}", 8)
    if end < 0 or zlib.crc32(data) % 4 == 0:
        return data
    return (end + 2 - 8).to_bytes(8, "little") + data[8:]


def read_tokenizer(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    _speak(folder)


def read_vocabulary(data: bytes, folder: Path) -> None:
    name, settings = (
        ("tokenizer.model", {}),
        ("ice_text.model", {}),
        ("tokenizer.model", {"tokenizer_class": "ChatGLM4Tokenizer"}),
        ("tokenizer.model", {"tokenizer_class": "ChatGLMTokenizer"}),
    )[zlib.crc32(data) % 4]
    (folder / name).write_bytes(data)
    (folder / "tokenizer_config.json").write_bytes(as_json(settings)[0])
    _speak(folder)


def read_adapter_folder(data: bytes, folder: Path) -> None:
    from glmchat.checkpoints.adapter_files import find_weights
    from glmchat.checkpoints.adapter_fit import Base
    from glmchat.engine.adapters.files import read_adapter

    config, _, weights = data.partition(b"\n")
    thudm = b"pre_seq_len" in config
    own = folder / "adapter"
    own.mkdir()
    (own / ("config.json" if thudm else "adapter_config.json")).write_bytes(config)
    bin_name = "pytorch_model.bin" if thudm else "adapter_model.bin"
    (own / (bin_name if weights[:2] == b"PK" else "adapter_model.safetensors")).write_bytes(weights)
    find_weights(own)
    adapter = read_adapter(own)
    for name in islice(adapter.tensors.shapes(), _TENSORS):
        adapter.tensors.read(name)
    base = folder / "base"
    base.mkdir()
    Base.of(_model(base, "model.safetensors", good.safetensors()[0]))


def read_config(data: bytes, folder: Path) -> None:
    import torch

    from glmchat.checkpoints.fit import check_folder, estimate, fit_table
    from glmchat.engine.families import identify
    from glmchat.hub.installed import family_at, quant_of_folder

    words = good.tokenizer_files()[1]
    _model(folder, "config.json", data, model__safetensors=good.large_weights(), tokenizer__json=words)
    fit_table(folder)
    estimate(folder, 4)
    family_at(folder)
    quant_of_folder(folder)
    check_folder(folder)
    checkpoint = identify(folder)
    if checkpoint.family.matrices is not None:  # transformers makes the network
        checkpoint.family.matrices(checkpoint, ())
        return
    with torch.device("meta"):
        checkpoint.family.build(checkpoint.spec)


def read_index(data: bytes, folder: Path) -> None:
    from glmchat.checkpoints.fit import check_folder, stored_bytes
    from glmchat.checkpoints.weight_files import folder_config, weight_files
    from glmchat.core.errors import GlmchatError

    _model(folder, "model.safetensors.index.json", data)
    for number in (1, 2):
        (folder / f"model-0000{number}-of-00002.safetensors").write_bytes(good.large_weights())
    folder_config(folder)
    stored_bytes(folder)
    with contextlib.suppress(GlmchatError):
        check_folder(folder)
    weight_files(folder)


def read_template(data: bytes, folder: Path) -> None:
    from glmchat.engine.prompts.chat_template import ChatTemplate, folder_template
    from glmchat.engine.tokenizers.words import words_of_folder

    if data.startswith(b"{") and not data.startswith((b"{{", b"{%", b"{#")):
        (folder / "tokenizer_config.json").write_bytes(data)
        folder_template(folder)
        words_of_folder(folder)
        return
    (folder / "chat_template.jinja").write_bytes(data)
    source, tokens = folder_template(folder)
    template = ChatTemplate(source or "", tokens)
    try:
        template.render(QUESTION)
    finally:
        template.close()


def read_manifest(data: bytes, folder: Path) -> None:
    from glmchat.core import locations
    from glmchat.hub import adapters, catalogue, installed, manifests

    os.environ["GLMCHAT_HOME"] = str(folder)
    entries = catalogue.load()
    for place in (locations.manifests_dir() / "x.json", locations.adapters_dir() / "x" / manifests.BESIDE):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    manifests.broken()
    rows = [installed.row_of_manifest(manifest, entries) for manifest in manifests.read_all()]
    for adapter in installed.adapter_folders():
        if (row := installed.row_of_adapter(adapter)) is not None:
            adapters.kind_words(adapters.facts_of(row))
            rows.append(row)
    for row in rows:
        adapters.to_json(row)
        installed.details(row, entries)


def read_lock(data: bytes, folder: Path) -> None:
    from glmchat.hub.lockfile import read_lock

    path = folder / "glmchat.lock"
    path.write_bytes(data)
    read_lock(path)


def read_toml(data: bytes, folder: Path) -> None:
    from glmchat.core.errors import GlmchatError
    from glmchat.core.settings import load_settings
    from glmchat.hub import aliases, catalogue
    from glmchat.hub.references import parse

    os.environ["GLMCHAT_HOME"] = str(folder)
    path = folder / "config" / "config.toml"
    path.parent.mkdir()
    path.write_bytes(data)
    (path.parent / "aliases.json").write_bytes(data)
    for read in (
        lambda: load_settings(path, {}),
        lambda: catalogue.load(path).find(parse("tiny")),
        lambda: aliases.expand(parse("fast")),
    ):
        with contextlib.suppress(GlmchatError):
            read()


def read_conversations(data: bytes, folder: Path) -> None:
    from glmchat.chat.history.history import History
    from glmchat.chat.history.transcript import add_to_history, answered_by, export, read_import

    conversations = read_import(data, "x")
    with History.open(folder / "history.db") as history:
        trees = add_to_history(history, conversations)
        for tree in trees[:3]:
            _use(history, tree.conversation.id)
            for message in tree.path()[:5]:
                answered_by(message)
            for form in ("markdown", "json", "text"):
                export(history.load(tree.conversation.id), form)


def _use(history: Any, conversation: int) -> None:
    """What the window and the commands do with a conversation that they open."""
    from speakers import LocalSpeaker

    from glmchat.chat.session import ChatSession

    history.search("Hello")
    history.conversations(limit=5)
    chat = ChatSession(history, LocalSpeaker("a"), conversation)
    for message in chat.tree.path()[:5]:
        chat.branches(message.id)
    list(chat.ask("and now?"))
    chat.undo()


def read_database(data: bytes, folder: Path) -> None:
    from glmchat.chat.history.history import History

    path = folder / "history.db"
    path.write_bytes(data)
    with History.open(path) as history:
        for conversation in history.conversations(limit=3):
            _use(history, conversation.id)
        tree = history.new("m")
        history.append(tree, "user", "hi")


_ENGINE = ("torch", "glmchat.engine.engine", "glmchat.engine.formats.gguf", "glmchat.engine.adapters.files")
# What torch and transformers import for the first network that they make: seconds, and 200 MB.
_NETWORKS = ("torch._dynamo", "transformers.models.opt.modeling_opt", "glmchat.hub.installed")
_HISTORY = ("glmchat.chat.session", "glmchat.chat.history.transcript", "speakers")
_HUB = ("glmchat.hub.installed", "glmchat.hub.adapters", "glmchat.hub.lockfile")
TARGETS = (
    Target("gguf", good.gguf, read_gguf, (b"GGUF", b"general.alignment", b"tokenizer.ggml.tokens", b"split.count"),
           modules=_ENGINE),
    Target("safetensors", good.safetensors, read_weights, (b'"F32"', b'"shape":['), frame_safetensors, _ENGINE),
    Target("pickle", good.pickles, read_pickle, (b"cos\nsystem\n", b"(", b"R", b"ctorch._utils\n_rebuild_tensor_v2\n"),
           modules=_ENGINE),
    Target("tokenizer", good.tokenizer_files, read_tokenizer, modules=_ENGINE),
    Target("vocabulary", good.tokenizer_models, read_vocabulary, (b"\x0a\x0e", b"<0x00>", b"=="), modules=_ENGINE),
    Target("adapter", good.adapters, read_adapter_folder, (b"lora_A", b"lora_B", b'"F32"'), modules=_ENGINE),
    Target("config", good.configs, read_config, modules=(*_ENGINE, *_NETWORKS)),
    Target("index", good.indexes, read_index, modules=_ENGINE),
    Target("template", good.templates, read_template, (b"{{", b"{%", b"%}", b"| tojson", b"range(10**9)", b"**9"),
           modules=_ENGINE),
    Target("manifest", good.manifests, read_manifest, modules=_HUB),
    Target("lock", good.locks, read_lock, modules=_HUB),
    Target("toml", good.tomls, read_toml, (b"[[", b"]]", b"= ", b"nan", b"inf", b"9" * 400, b"1979-05-27", b'"""'),
           modules=_HUB),
    Target("history", good.conversations, read_conversations, modules=_HISTORY),
    Target("database", good.databases, read_database, (b"SQLite format 3\0", b"CREATE TABLE", b"{}"), modules=_HISTORY),
)  # fmt: skip
