"""The tokenizer beside a checkpoint's weights: whether there is one, of a kind that is read, and not another model's.

Judged without the libraries that read it, so that a model which could never take a word is refused before it is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmchat.checkpoints.gguf_file import GGUFFile
from glmchat.checkpoints.vocabularies import (
    WORDS_WITHOUT_ROWS,
    check_rows,
    count_pieces,
    damaged_vocabulary,
    read_vocabulary,
)
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.files import open_file, read_file, unreadable
from glmchat.core.language import tr
from glmchat.core.text import one_line

LARGEST = 16 * 2**20  # bytes of a tokenizer.json that is read whole
KINDS = ("BPE", "Unigram", "WordLevel", "WordPiece")  # what the tokenizers package calls its models
GGUF_KINDS = ("gpt2", "llama")
PAIR = ("vocab.json", "merges.txt")
PAIRED = ("GPT2Tokenizer", "Qwen2Tokenizer")  # the classes that are put together from them
_HEAD = 4 * 2**20  # bytes of a tokenizer.json in which its added words stand
_USUAL = ("tokenizer.json", "tokenizer.model")
_OF_GPT2 = ("chinese_vocab.model", "spiece.model", "tokenizer.json", "merges.txt")
_OF_OTHERS = (*_USUAL, "vocab.json", "vocab.txt")  # which transformers puts together


def no_tokenizer(folder: Path) -> Damaged:
    """The error for a folder that brings no vocabulary."""
    return Damaged(
        tr("{folder} contains no tokenizer", folder=one_line(str(folder))),
        hint=tr("expected tokenizer.json or tokenizer.model beside config.json: pull the model again"),
        code="tokenizer.missing",
    )


def check_tokenizer(folder: Path, config: Mapping[str, Any], natively: bool) -> None:
    """Raise Damaged for a folder whose tokenizer is missing, cannot be read, or has words that the network has no rows
    for. natively: glmchat computes the network itself."""
    kind = config.get("model_type")
    names = _OF_GPT2 if kind == "gpt2" else _USUAL if natively else _OF_OTHERS
    here = next((name for name in names if (folder / name).is_file()), None)
    if here is None:
        raise no_tokenizer(folder)
    inner = config.get("text_config")
    rows = config.get("vocab_size") or (inner.get("vocab_size") if isinstance(inner, Mapping) else None)
    words = None
    if here == "tokenizer.json":
        words = _words_in_json(folder / here)
    elif here == "tokenizer.model":
        words = count_pieces(folder / here, read_vocabulary(folder / here))
    if words is not None and isinstance(rows, int):
        check_rows(folder / here, words, rows, WORDS_WITHOUT_ROWS)


def check_gguf_tokenizer(file: GGUFFile) -> None:
    """Raise Damaged for a vocabulary of a kind that is not read from GGUF, or for none."""
    kind = file.metadata.get("tokenizer.ggml.model")
    if kind in GGUF_KINDS:
        return
    name = one_line(file.path.name)
    raise Damaged(
        tr("{name} contains no vocabulary", name=name)
        if kind is None
        else tr("{name} has a vocabulary of the kind {kind}, which cannot be read", name=name,
                kind=one_line(repr(kind), 40)),
        hint=tr("use the Hugging Face folder of this model"),
        code="tokenizer.kind",
    )  # fmt: skip


def _words_in_json(path: Path) -> int | None:
    """How many ids a tokenizer.json needs rows for; of a very long file only what its beginning tells.

    Raises Damaged for a file that is cut off, no JSON, or of a kind that nobody knows.
    """
    refuse_pointer(path)
    if path.stat().st_size > LARGEST:
        return _last_added(path)
    try:
        data = json.loads(read_file(path))
        model = data["model"]
        kind, words = model.get("type", "BPE"), model["vocab"]
        added = data.get("added_tokens") or []
        inside = words if isinstance(words, dict) else {piece[0] for piece in words}
        more = {word["content"] for word in added}.difference(inside)
    except OSError as error:
        raise unreadable(path, error, is_vocabulary=True) from None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = one_line(f"{type(error).__name__}: {error}", 80)
        raise damaged_vocabulary(
            tr("{name} is no tokenizer: {reason}", name=one_line(path.name), reason=reason),
            tr("the download was interrupted, or this is a different file: pull it again"),
        ) from None
    if kind not in KINDS:
        raise damaged_vocabulary(
            tr("{name} has a vocabulary of the kind {kind}, which cannot be read", name=one_line(path.name),
               kind=one_line(repr(kind), 40)),
            tr("known kinds: {kinds}", kinds=", ".join(KINDS)),
        )  # fmt: skip
    unknown = model.get("unk_token")
    if kind == "WordPiece" and unknown not in inside:
        raise damaged_vocabulary(
            tr("{name} has no word for what it does not know: {token} is not in it", name=one_line(path.name),
               token=one_line(repr(unknown), 40)),
            tr("the download was interrupted, or this is a different file: pull it again"),
        )  # fmt: skip
    return len(inside) + len(more)


def _last_added(path: Path) -> int | None:
    """The rows that the words need which were added: the file tells them at its beginning; None where it does not."""
    with open_file(path) as file:
        head = file.read(_HEAD).decode("utf-8", "replace")
    at = re.search(r'"added_tokens"\s*:\s*(?=\[)', head)
    try:
        words = json.JSONDecoder().raw_decode(head, at.end())[0] if at else []
    except (ValueError, RecursionError):  # longer than what was read, or damaged; the engine reads all of it
        return None
    ids = [word.get("id") for word in words if isinstance(word, dict)]
    return max((number + 1 for number in ids if isinstance(number, int)), default=None)
