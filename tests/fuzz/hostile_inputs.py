"""A hundred inputs that no honest program makes: what each is, how it is met, and what is to be said of it.

Folders and files of models and adapters, what glmchat wrote itself, replies of hubs and servers, lines of a shell.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import good_inputs as good
from good_inputs import BLOB, COMMIT, SHA, TINY

ESCAPE = "\x1b]0;owned\x07\x1b[2Jx"
HUGE = 10**400
ENGINE_SECONDS = 20.0  # of the processor, where an engine starts first


class Place:
    """Where one case lies: a folder, a home, and servers that answer with what they were given."""

    def __init__(self, folder: Path, serve: Callable[[bytes, bytes], str]) -> None:
        self.folder, self._serve = folder, serve
        self.home = folder / "home"
        self.model = folder / "model"

    def serves(self, reply: bytes, forever: bytes = b"") -> str:
        """The address of a server that says `reply`, then `forever` again and again."""
        return self._serve(reply, forever)


Build = Callable[[Place], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Case:
    """build: makes it, and returns the command line. words: what must stand in what is said.

    window: it can come there, as the model that is chosen. starts_engine: only what loads torch can tell.
    is_answer: what stands on stdout is what a model said, which a pipe gets as it is.
    """

    name: str
    build: Build
    exit: int
    words: str
    window: bool = False
    starts_engine: bool = False
    is_answer: bool = False


# Models.


def folder(command: Sequence[str] = ("run", "{model}", "hi"), **files: Any) -> Build:
    """A tiny model with these files in it (`__` is a dot): bytes, JSON, what makes the path, or None for none."""

    def build(place: Place) -> list[str]:
        place.model.mkdir()
        whole = {"config.json": TINY, "model.safetensors": good.safetensors()[0]}
        for name, content in {**whole, **{n.replace("__", "."): c for n, c in files.items()}}.items():
            path = place.model / name
            if callable(content):
                content(path)
            elif content is not None:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return [word.format(model=place.model) for word in command]

    return build


def config(**changes: Any) -> Build:
    return folder(config__json={**TINY, **changes})


def weights(data: bytes) -> Build:
    return folder(model__safetensors=data)


def bin_file(data: bytes) -> Build:
    return folder(model__safetensors=None, pytorch_model__bin=data)


def gguf(data: bytes) -> Build:
    def build(place: Place) -> list[str]:
        file = place.folder / "model.gguf"
        file.write_bytes(data)
        return ["run", str(file), "hi"]

    return build


def pipe(path: Path) -> None:
    os.mkfifo(path)


def piped(place: Place) -> list[str]:
    pipe(place.model)
    return ["run", str(place.model), "hi"]


def link(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def headed(header: bytes | Mapping[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def one(**changes: Any) -> dict[str, Any]:
    return {"lm_head.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128], **changes}}


def found(name: str) -> bytes:
    return (Path(__file__).parent / "found" / f"{name}.bin").read_bytes()


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/glmchat-owned",)


def zipped(data: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive as torch writes it, with this data.pkl."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def broken_deflate() -> bytes:
    data = bytearray(zipped(pickle.dumps({"a": "x" * 5000}), zipfile.ZIP_DEFLATED))
    data[50:60] = b"\xff" * 10
    return bytes(data)


def ggufs(fields: int = 0, tensors: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields) + rest


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


DEEP = b"[" * 100_000
INDEX = {"metadata": {}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}
MODELS = (
    Case("an empty folder", folder(config__json=None, model__safetensors=None), 3, "has no config.json", True),
    Case("a config.json that is a pipe", folder(config__json=pipe), 3, "config.json", True),
    Case("a config.json that never ends", folder(config__json=link("/dev/zero")), 3, "config.json", True),
    Case("a config.json that links to nothing", folder(config__json=link("nowhere")), 3, "config.json", True),
    Case("a config.json that links to itself", folder(config__json=link("config.json")), 3, "config.json", True),
    Case("a config.json that is a folder", folder(config__json=Path.mkdir), 3, "config.json", True),
    Case("a config.json of 17 MB", folder(config__json=b" " * (17 << 20) + b"{}"), 3, "it is larger than", True),
    Case("a config.json of brackets", folder(config__json=DEEP), 3, "is not JSON", True),
    Case("a config.json of NUL bytes", folder(config__json=bytes(1000)), 3, "is not JSON", True),
    Case("a config.json that is no text", folder(config__json=b'{"model_type": "\xff\xfe"}'), 3, "is not JSON", True),
    Case("a config.json that is a list", folder(config__json=[TINY]), 3, "JSON object", True),
    Case("a config.json that is a web page", folder(config__json=b"<html>log in</html>"), 3, "is not JSON", True),
    Case("an integer of 5,000 digits",
         folder(config__json=b'{"hidden_size": ' + b"9" * 5000 + b"}"), 3, "is not JSON", True),
    Case("layers beyond all numbers", config(num_hidden_layers=HUGE), 3, "num_hidden_layers", True),
    Case("a width below zero", config(hidden_size=-64), 3, "hidden_size", True),
    Case("no heads", config(num_attention_heads=0), 3, "num_attention_heads", True),
    Case("a vocabulary that is a text", config(vocab_size="many"), 3, "vocab_size", True),
    Case("a width that is not a number", config(hidden_size=float("nan")), 3, "hidden_size", True),
    Case("a width of 2 to the 62nd", config(hidden_size=2**62), 3, "hidden_size", True),
    Case("a type that is a list", config(model_type=["llama"]), 3, "model_type is", True),
    Case("a type with control sequences", config(model_type=ESCAPE, architectures=[ESCAPE]), 3, "does not know",
         starts_engine=True),
    Case("quantisation of an unknown kind",
         config(quantization_config={"quant_method": ESCAPE}), 2, "quantised with", True),
    Case("code that is to be run", config(model_type="evil", auto_map={"AutoModel": "evil.Evil"}), 3, "never run",
         starts_engine=True),
    Case("an index that leaves the folder", folder(
        model__safetensors=None, model__safetensors__index__json={"weight_map": {"a": "../../etc/passwd"}}), 3,
        "names the file", True),
    Case("an index of an absolute path", folder(
        model__safetensors=None, model__safetensors__index__json={"weight_map": {"a": "/etc/passwd"}}), 3,
        "names the file", True),
    Case("an index that is a list", folder(
        model__safetensors=None, model__safetensors__index__json=[1]), 3, "JSON object", True),
    Case("an index of shards that are not there", folder(
        model__safetensors=None, model__safetensors__index__json=INDEX), 3, "missing", True),
    Case("an index of 200,000 names", folder(model__safetensors=None, model__safetensors__index__json={
        "weight_map": {f"w{i}": f"model-{i}.safetensors" for i in range(200_000)}}), 3, "missing", True),
    Case("weights that are a pipe", folder(model__safetensors=pipe), 3, "it is a named pipe", True),
    Case("weights of nothing", weights(b""), 3, "is empty", True),
    Case("weights that are a web page", weights(b"<!doctype html><html>x</html>" * 9), 3, "truncated or damaged", True),
    Case("weights that are a pointer of git-lfs", weights(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 5\n" % SHA.encode()), 3, "git-lfs", True),
    Case("weights cut in two", weights(good.large_weights()[:1000]), 3, "truncated", True),
    Case("a header that claims to be longer than the file",
         weights(headed(one(), bytes(128), 2**60)), 3, "truncated or damaged", True),
    Case("a header of a million brackets", weights(headed(b"[]" * 1_000_000)), 3, "truncated or damaged", True),
    Case("a header of deep brackets", weights(headed(DEEP)), 3, "truncated or damaged", True),
    Case("200,000 tensors of nothing", weights(headed({
        f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)})), 3, "", True),
    Case("a tensor that ends before it begins",
         weights(headed(one(data_offsets=[128, 0]), bytes(128))), 3, "truncated or damaged", True),
    Case("a tensor with offsets of 400 digits",
         weights(headed(one(data_offsets=[0, HUGE]), bytes(128))), 3, "truncated or damaged", True),
    Case("a tensor of an unknown type", weights(headed(one(dtype=ESCAPE), bytes(128))), 3, "", False),
    Case("a pickle that starts a program", bin_file(zipped(pickle.dumps(_Evil(), 2))), 3, "more than tensors", False),
    Case("an old pickle that starts a program", bin_file(pickle.dumps(_Evil(), 2)), 3, "", False),
    Case("a pickle of 20 million marks", bin_file(zipped(b"\x80\x02" + b"(" * 20_000_000, zipfile.ZIP_DEFLATED)), 3, "",
         False),
    Case("a pickle that unfolds a thousandfold", bin_file(zipped(
        b"\x80\x02" + b"Nq\x00" * 40_000_000, zipfile.ZIP_DEFLATED)), 3, "", False),
    Case("a pickle whose packing is broken", bin_file(broken_deflate()), 3, "", False),
    Case("an archive with nothing in it", bin_file(b"PK\x05\x06" + bytes(18)), 3, "", False),
    Case("a pickle that is a text", bin_file(b"hello"), 3, "truncated or damaged", True),
    Case("a vocabulary of pieces without one for the unknown",
         folder(tokenizer__json=found("tokenizer-2-1")), 3, "'[UNK]' is not in it", True),
    Case("a GGUF file whose scales are no numbers", gguf(found("gguf-1-1")), 3, "a scale is not a finite number", True),
    Case("a GGUF file of four letters", gguf(b"GGUF"), 3, "in the middle of its header", True),
    Case("a GGUF file of version 99", gguf(ggufs(version=99) + bytes(100)), 3, "version", True),
    Case("a GGUF file of 2 to the 62nd fields", gguf(ggufs(fields=2**62)), 3, "impossible header", True),
    Case("a GGUF file with a text of a terabyte",
         gguf(ggufs(1, 0, text(b"a", 2**40) + bytes(100))), 3, "impossible header", True),
    Case("a GGUF file of lists in lists", gguf(
        ggufs(1, 0, text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10_000)), 3, "impossible",
        True),
    Case("a GGUF file with an alignment of 0", gguf(
        ggufs(1, 0, text(b"general.alignment") + struct.pack("<II", 4, 0)) + bytes(64)), 3, "its alignment is 0", True),
    Case("a GGUF tensor of 2 to the 63rd rows", gguf(
        ggufs(0, 1, text(ESCAPE.encode()) + struct.pack("<IQQIQ", 2, 2**63, 2, 0, 0)) + bytes(64)), 3,
        "impossible header", True),
    Case("a GGUF file cut in two", gguf(good.gguf()[0][:5000]), 3, "is truncated", True),
    Case("a GGUF file without a word of its network", gguf(ggufs() + bytes(64)), 3, "which architecture", True),
    Case("a model that is a pipe",
         piped, 1, "cannot be opened", True),
    Case("show: a config.json that never ends", folder(("show", "{model}"), config__json=link("/dev/zero")), 0,
         "does not run"),
    Case("show: a type with control sequences", folder(
        ("show", "{model}"), config__json={**TINY, "model_type": ESCAPE}),
         0, "family: ␛]0;owned"),
    Case("show: a pickle whose packing is broken", folder(
        ("show", "{model}"), model__safetensors=None, pytorch_model__bin=broken_deflate()), 0, "does not run"),
    Case("show: sizes of 400 digits", folder(
        ("show", "--fit", "{model}"), config__json={**TINY, "hidden_size": HUGE}), 0, "free"),
    Case("add: a config.json of brackets", folder(("add", "{model}", "--name", "x"), config__json=DEEP), 3,
         "is not JSON"),
    Case("add: an index that leaves the folder", folder(
        ("add", "{model}", "--name", "x"), model__safetensors=None,
        model__safetensors__index__json={"weight_map": {"a": "../../etc/passwd"}}), 3, "names the file"),
    Case("verify: a manifest beside it that lies", folder(
        ("verify", "{model}"), glmchat__json={"name": ESCAPE, "files": [{"path": "../../etc/passwd", "size": 5}]}), 0,
        "could not be checked"),
    Case("quantize: a pickle that starts a program", folder(
        ("quantize", "{model}", "--bits", "4", "--dry-run"), model__safetensors=None,
        pytorch_model__bin=zipped(pickle.dumps(_Evil(), 2))), 3, ""),
)  # fmt: skip


# Adapters.


def adapter(config: Any, weights: bytes | None = None, name: str = "adapter_model.safetensors", *more: str) -> Build:
    def build(place: Place) -> list[str]:
        place.model.mkdir()
        data = config if isinstance(config, bytes) else json.dumps(config).encode()
        (place.model / "adapter_config.json").write_bytes(data)
        if weights is not None:
            (place.model / name).write_bytes(weights)
        return ["adapters", "add", str(place.model), *more]

    return build


def lora(**changes: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}


def pair() -> bytes:
    return good.adapters()[0].partition(b"\n")[2]


ADAPTERS = (
    Case("an adapter without weights", adapter(lora()), 2, "there are no weights"),
    Case("an adapter whose settings are a list", adapter([1], pair()), 3, "JSON object"),
    Case("an adapter whose settings are brackets", adapter(DEEP, pair()), 3, "is not JSON"),
    Case("an adapter of a kind with control sequences", adapter(lora(peft_type=ESCAPE), pair()), 2, "does not support"),
    Case("an adapter of a base with control sequences", adapter(
        lora(base_model_name_or_path=ESCAPE), pair()), 0, "is ready", starts_engine=True),
    Case("an adapter that starts a program", adapter(
        lora(), zipped(pickle.dumps(_Evil(), 2)), "adapter_model.bin"), 3, "more than tensors"),
    Case("an adapter of 300,000 names", adapter(lora(), headed({
        f"l{i}.lora_A.weight": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(300_000)})), 3,
        ""),
    Case("an adapter with a name that is a path", adapter(
        lora(), pair(), "adapter_model.safetensors", "--name", "../../x"), 2, "cannot be the name of an adapter"),
)  # fmt: skip


# What glmchat wrote itself, and files to import.


def home(command: Sequence[str], **files: Any) -> Build:
    """Files in the home (`__` is a slash), then a command."""

    def build(place: Place) -> list[str]:
        for name, content in files.items():
            stem, _, suffix = name.replace("__", "/").rpartition("_")
            path = place.home / f"{stem}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(content):
                content(path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return list(command)

    return build


def imported(content: Any) -> Build:
    def build(place: Place) -> list[str]:
        path = place.folder / "export.json"
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return ["history", "import", str(path)]

    return build


RANDOM = bytes(range(256)) * 40
RING = {"title": "T", "mapping": {
    a: {"parent": b, "children": [b], "message": {"author": {"role": "user"}, "content": {"parts": ["x"]}}}
    for a, b in (("a", "b"), ("b", "a"))}}  # fmt: skip
LIST, HISTORY, ASK = ("list",), ("history", "list"), ("run", "smollm2", "hi")
KEPT = (
    Case("a config.toml of random bytes", home(ASK, config__config_toml=RANDOM), 2, "config.toml"),
    Case("a config.toml of brackets", home(ASK, config__config_toml=b"a = " + DEEP), 2, "config.toml"),
    Case("a config.toml that is a pipe", home(ASK, config__config_toml=pipe), 2, "config.toml"),
    Case("a config.toml that never ends", home(ASK, config__config_toml=link("/dev/zero")), 2, "config.toml"),
    Case("a models.toml of random bytes", home(LIST, config__models_toml=RANDOM), 2, "models.toml"),
    Case("a models.toml that leaves its folder", home(
        LIST, config__models_toml=good.tomls()[1].replace(b'path = "config.json"', b'path = "../../x"')), 2,
        "models.toml"),
    Case("a manifest of random bytes", home(LIST, data__manifests__x_json=RANDOM), 0, "there are no models"),
    Case("a manifest whose root is the whole disk", home(LIST, data__manifests__x_json={
        "format": 1, "name": "disk", "kind": "model", "source": "hf", "root": "/", "repo": "a/b", "revision": COMMIT,
        "files": [{"path": "etc/passwd", "size": 1}]}), 0, "incomplete"),
    Case("a manifest that names control sequences", home(
        LIST, data__manifests__x_json={**json.loads(good.manifests()[0]), "name": ESCAPE}), 0, ""),
    Case("a history of random bytes", home(HISTORY, data__history_db=RANDOM), 0, "The history was damaged"),
    Case("a history that is a pipe", home(HISTORY, data__history_db=pipe), 0, "a named pipe"),
    Case("a lock of random bytes", home(("pull", "--locked", "{home}/x.lock"), x_lock=RANDOM), 3, "x.lock"),
    Case("a lock that never ends", home(("pull", "--locked", "{home}/x.lock"), x_lock=link("/dev/zero")), 3, "x.lock"),
    Case("a lock that leaves its folder", home(("pull", "--locked", "{home}/x.lock"), x_lock=good.locks()[0].replace(
        b'"path": "config.json"', b'"path": "../../x"')), 3, "outside its folder"),
    Case("an import of random bytes", imported(RANDOM), 3, "export.json"),
    Case("an import of brackets", imported(DEEP), 3, "export.json"),
    Case("an import of an archive", imported(zipped(b"x")), 3, "unpack"),
    Case("an import that is a pipe", imported(pipe), 2, "export.json"),
    Case("an import that never ends", imported(link("/dev/zero")), 2, "export.json"),
    Case("an import whose messages hang in a ring", imported(RING), 3, "ring"),
    Case("an import whose roles are objects", imported([{"role": {"a": 1}, "content": "x"}]), 3, ""),
    Case("an import with half a character in it", imported(
        {"messages": good.QUESTION, "system": "\ud800", "title": "\ud800"}), 0, ""),
    Case("an import of numbers beyond all", imported(good.conversations()[0].replace(b'"seed": 1', b'"seed": 1e999')),
         0, "1  T"),
    Case("a title with control sequences", imported({"messages": good.QUESTION, "title": ESCAPE}), 0, "␛]0;owned"),
)  # fmt: skip


# Hubs and servers.


def reply(body: Any, *headers: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = (b"HTTP/1.1 " + status, b"Content-Type: " + kind, b"Connection: close", *headers)
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def hub(data: bytes, forever: bytes = b"") -> Build:
    return lambda place: ["pull", "a/b", "--endpoint", place.serves(data, forever)]


def server(data: bytes, forever: bytes = b"") -> Build:
    return lambda place: ["run", "m", "hi", "--server", place.serves(data, forever)]


def listing(path: Any = "config.json", size: Any = 5, **changes: Any) -> dict[str, Any]:
    return {"id": "a/b", "sha": COMMIT, "siblings": [{"rfilename": path, "size": size, "blobId": BLOB}], **changes}


def stream(*events: Any) -> bytes:
    lines = (event if isinstance(event, bytes) else json.dumps(event).encode() for event in events)
    return reply(b"".join(b"data: " + line + b"\n\n" for line in lines), kind=b"text/event-stream")


def said(words: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": words}, "finish_reason": None}], **more}


BOMB = gzip.compress(bytes(200 << 20), 9)
STOP = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
REMOTE = (
    Case("a hub of random bytes", hub(RANDOM), 1, "was lost"),
    Case("a hub that is a web page", hub(reply(b"<html>log in</html>", kind=b"text/html")), 3, "not"),
    Case("a hub of brackets", hub(reply(DEEP)), 3, "did not answer with a list"),
    Case("a hub that sends round in circles", hub(reply(b"", b"Location: /", status=b"302 Found")), 1, "redirects"),
    Case("a hub whose headers never end", hub(b"HTTP/1.1 200 OK\r\n", b"X: " + b"y" * 60_000 + b"\r\n"), 1, "was lost"),
    Case("a hub with a file that leaves its folder", hub(reply(listing("../../x"))), 3, "outside its folder"),
    Case("a hub with a file of control sequences", hub(reply(listing(ESCAPE))), 3, "control characters"),
    Case("a hub with a file of 400 digits", hub(reply(listing(size=HUGE))), 3, ""),
    Case("a hub whose commit is a path", hub(reply(listing(sha="../../../etc"))), 3, "commit"),
    Case("a hub that hangs up", hub(b""), 1, "was lost"),
    Case("a server of random bytes", server(RANDOM), 1, "was lost"),
    Case("a server that is a web page",
         server(reply(b"<html>log in</html>", kind=b"text/html")), 1, "returned a web page"),
    Case("a server whose line never ends", server(stream() + b"data: ", b"x" * 65_536), 1, "does not end"),
    Case("a server whose events are not JSON", server(stream(b"{nonsense")), 1, "not JSON"),
    Case("a server whose events are brackets", server(stream(DEEP)), 1, "not JSON"),
    Case("a server whose error has control sequences", server(
        reply({"error": {"message": ESCAPE, "code": ESCAPE}}, status=b"400 Bad Request")), 1, "refused the request"),
    Case("a server whose answer has control sequences", server(
        stream(said(ESCAPE), STOP, b"[DONE]")), 0, "", is_answer=True),
    Case("a server with half a character in its facts", server(
        stream(said("a", glmchat={"passes": "\ud800"}), STOP)), 0, "a\n"),
    Case("a server that hangs up in its answer", server(stream(said("a"))), 1, "before the answer was complete"),
    Case("a server whose answer unfolds a thousandfold", server(
        reply(BOMB, b"Content-Encoding: gzip", kind=b"text/event-stream")), 1, "compressed"),
)  # fmt: skip


# Lines of a shell.


def line(*words: str) -> Build:
    return lambda place: [word.format(folder=place.folder) for word in words]


LONG = "x" * 70_000
LINES = (
    Case("an address that is none", line("run", "https://[", "hi"), 2, "is not the address of a model"),
    Case("a name of 70,000 letters", line("show", LONG), 2, "is not a model name"),
    Case("a path of 70,000 letters", line("show", f"./{LONG}"), 2, "is not a path"),
    Case("a name with control sequences", line("show", ESCAPE), 2, "is not a model name"),
    Case("a folder in the home of nobody", line("add", "~nobody-is-called-so/x"), 2, "is not a path"),
    Case("an adapter in the home of nobody", line("adapters", "add", "~nobody-is-called-so/x"), 2, "is not a path"),
    Case("a mirror in the home of nobody",
         line("pull", "a/b", "--endpoint", "~nobody-is-called-so"), 2, "is not a path"),
    Case("a place in the home of nobody", line("pull", "a/b", "--into", "~nobody-is-called-so/x"), 2, "is not a path"),
    Case("a name that leaves the store", line("rm", "../../x", "--yes"), 2, "there is no"),
    Case("an alias that is a path", line("alias", "../x", "smollm2"), 2, "cannot be an alias"),
    Case("a mirror of nothing", line("mirror", "serve", "{folder}"), 2, "is not a mirror folder"),
    Case("a seed of 400 digits", line("run", "smollm2", "hi", "--seed", "9" * 400), 2, "seed is 999"),
    Case("a temperature that is not a number", line("run", "smollm2", "hi", "--temp", "nan"), 2, "temperature is nan"),
    Case("an option with control sequences", line("run", f"--{ESCAPE}"), 2, "No such option"),
)  # fmt: skip

CASES = (*MODELS, *ADAPTERS, *KEPT, *REMOTE, *LINES)
