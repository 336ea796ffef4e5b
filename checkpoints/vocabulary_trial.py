"""Whether a vocabulary can be read without harm: found out once, in a process of its own, and known by its hash after.

Who reads it there is engine/tokenizers/trial.py, by the libraries that the engine reads it by.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.vocabularies import damaged_vocabulary, is_tiktoken
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core import locations
from glmchat.core.errors import Damaged, Failed, GlmchatError
from glmchat.core.files import open_file
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.sandbox import Sandbox
from glmchat.core.text import human_bytes, one_line

_READER = "glmchat.engine.tokenizers.trial"
_FORM = 1  # of what is tried; a number that moves makes every verdict be found anew
_LIBRARIES = ("tokenizers", "sentencepiece")
_KEPT = 400  # verdicts
# What reading may take, for itself and for each byte of the files: 30 MB with 280,000 pieces take 1.7 s and 300 MB on a
# busy machine; addresses are bounded, of which there are more than memory is taken.
_SECONDS, _BYTES_A_SECOND = 0.7, 4 * 2**20
_MEMORY, _MEMORY_EACH = 320 * 2**20, 48
_PATIENCE = 12  # times the seconds, on a busy machine
_PIECES = ("ice_text.model", "chinese_vocab.model", "spiece.model")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    reader: str
    path: Path  # what the reader is given
    files: tuple[Path, ...]  # whose bytes the verdict is about


def try_vocabulary(path: Path) -> None:
    """Raise Damaged for the vocabulary of a folder or a GGUF file that its reader does not survive, or that takes more
    time or memory than any honest one. One that was tried before costs its hash."""
    for vocabulary in _vocabularies(path):
        stamps = tuple((str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in vocabulary.files)
        _try(vocabulary, stamps)


def _vocabularies(path: Path) -> list[_Vocabulary]:
    """What of it other people's code will read."""
    if path.is_file():
        return [_Vocabulary("gguf", path, (path,))]
    found = [_Vocabulary("pieces", path / name, (path / name,)) for name in _PIECES if (path / name).is_file()]
    if found:
        return found
    beside = tuple(path / name for name in _BESIDE if (path / name).is_file())
    model = path / "tokenizer.model"
    is_chatglm = small_json(path / "config.json").get("model_type") == "chatglm"
    if (path / "tokenizer.json").is_file() and not is_chatglm:
        return [_Vocabulary("tokenizer.json", path, (path / "tokenizer.json", *beside))]
    if model.is_file():
        if is_tiktoken(model):  # which we read ourselves
            return []
        if is_chatglm:
            return [_Vocabulary("pieces", model, (model,))]
        return [_Vocabulary("tokenizer.model", path, (model, *beside))]
    pair = (path / "vocab.json", path / "merges.txt")
    return [_Vocabulary("merges", path, pair)] if all(file.is_file() for file in pair) else []


@lru_cache(maxsize=64)
def _try(vocabulary: _Vocabulary, stamps: tuple[tuple[str, int, int], ...]) -> None:
    if vocabulary.reader != "gguf":
        for file in vocabulary.files:
            refuse_pointer(file)
    size, digest = _digest(vocabulary)
    known = small_json(_notes()).get("good")
    good = [word for word in known if isinstance(word, str)] if isinstance(known, list) else []
    if digest in good:
        return
    _read_apart(vocabulary, size)
    _keep([*good, digest])


def _digest(vocabulary: _Vocabulary) -> tuple[int, str]:
    """Bytes that are read of it, and their hash with what is installed to read them."""
    digest, size = hashlib.sha256(f"{_FORM} {vocabulary.reader} {_installed()}".encode()), 0
    for file in vocabulary.files:
        digest.update(f"\n{file.name}\n".encode())
        with open_file(file) as opened:
            left = open_gguf(file).header_bytes if vocabulary.reader == "gguf" else file.stat().st_size
            while left > 0 and (piece := opened.read(min(left, 2**20))):
                digest.update(piece)
                size, left = size + len(piece), left - len(piece)
    return size, digest.hexdigest()


@lru_cache(maxsize=1)
def _installed() -> str:
    """Changes when a library is exchanged. Their versions would say it too, and take longer to read than a hash."""
    places = [spec.origin for name in _LIBRARIES if (spec := find_spec(name)) is not None and spec.origin]
    return ", ".join(f"{place} {Path(place).stat().st_mtime_ns}" for place in places)


def _read_apart(vocabulary: _Vocabulary, size: int) -> None:
    seconds, memory = _SECONDS + size / _BYTES_A_SECOND, _MEMORY + _MEMORY_EACH * size
    sandbox = Sandbox(_READER)
    try:
        if (words := sandbox.obstacle()) is not None:
            raise Failed(
                tr("the process that tries the vocabulary did not start: {words}", words=words or "?"),
                hint=tr("usually the system is out of memory: try again"),
                code="tokenizer.start",
            )
        sandbox.send({"path": str(vocabulary.path), "reader": vocabulary.reader, "seconds": seconds, "memory": memory})
        reply = sandbox.reply(_PATIENCE * (1 + seconds))
        if reply.get("ok"):
            return
        if isinstance(error := reply.get("error"), dict):
            raise GlmchatError.from_json(error)
        if "refused" in reply:
            reason = str(reply["refused"])
        elif "late" in reply:
            reason = str(reply["late"])
        else:
            reason = tr(
                "its reader crashed, or took more than {seconds} s or {memory}",
                seconds=f"{seconds:.1f}",
                memory=human_bytes(memory),
            )
    finally:
        sandbox.stop()
    raise _damaged(vocabulary, reason)


def _damaged(vocabulary: _Vocabulary, reason: str) -> Damaged:
    return damaged_vocabulary(
        tr(
            "the vocabulary {where} cannot be read: {error}",
            where=one_line(str(vocabulary.files[0])),
            error=one_line(reason, 200),
        ),
        tr("pull the model again, or verify it"),
    )


def _notes() -> Path:
    return locations.cache_dir() / "vocabularies.json"


def _keep(good: list[str]) -> None:
    with suppress(OSError, Failed):  # a home that takes no files costs another trial, nothing else
        folder = locations.private_dir(_notes().parent)
        temporary = folder / f".vocabularies.{os.getpid()}.tmp"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({"good": good[-_KEPT:]}, file)
            temporary.replace(_notes())
        finally:
            temporary.unlink(missing_ok=True)
