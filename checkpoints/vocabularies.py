"""Which generation of ChatGLM a configuration and a vocabulary are of, and whether the two belong together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.config import GENERATION, integer
from glmchat.checkpoints.weight_files import refuse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.files import TooLarge, open_file, read_file, unreadable
from glmchat.core.language import tr
from glmchat.core.text import one_line

FIRST_VOCABULARY = 150344  # tokens of the first generation (March 2023), 20,000 image tokens included
GLM4_ENDOFTEXT = 151329  # first special id of GLM-4; a vocabulary that reaches it is GLM-4's
WORDS = {
    "first": "first, March 2023, with image tokens",
    "slim": "slim, April 2023 and later",
    "chatglm2": "ChatGLM2",
    "chatglm3": "ChatGLM3",
    "glm4": "GLM-4",
    "cpm": "CPM, Chinese",
}
# Rows of the embedding by which a published model is known.
_MODELS = {
    150528: "ChatGLM-6B of the first generation (March 2023, revision 096f3de6)",
    130528: "ChatGLM-6B, slim (April 2023 and later)",
    65024: "ChatGLM2-6B or ChatGLM3-6B",
    151552: "GLM-4",
}
_LONG = {16.0: "chatglm2", 50.0: "chatglm3"}  # rope_ratio of chatglm2-6b-32k and of chatglm3-6b-32k, as published


def damaged_vocabulary(sentence: str, hint: str) -> Damaged:
    """The error for a file that is no vocabulary, or not all of one."""
    return Damaged(sentence, hint=hint, code="tokenizer.damaged")


def generation(config: Mapping[str, Any]) -> str:
    """A key of WORDS; "first" and "slim" are the two of ChatGLM-6B. Never raises.

    ChatGLM2 and 3 have the same tensors and the same vocabulary file. What tells them apart is what config.json says
    of itself: a name, the repository of its code (which a fine-tune keeps), the rope_ratio of the two published 32k
    models; else what the tokenizer's files say (`settle_generation`); else the library version it was written with
    (4.27 and 4.30).
    """
    if "multi_query_attention" not in config and "padded_vocab_size" not in config:
        vocabulary = _whole(config.get("vocab_size"))
        early = vocabulary is None or vocabulary >= FIRST_VOCABULARY or config.get("bos_token_id") == 150004
        return "first" if early else "slim"
    if (_whole(config.get("padded_vocab_size")) or _whole(config.get("vocab_size")) or 0) > GLM4_ENDOFTEXT:
        return "glm4"
    names = f"{config.get('_name_or_path', '')} {config.get('name_or_path', '')}", f"{config.get('auto_map', '')}"
    for named in map(str.lower, names):
        for family in ("chatglm3", "chatglm2"):
            if family in named:
                return family
    ratio = config.get("rope_ratio")
    if isinstance(ratio, int | float) and ratio in _LONG:
        return _LONG[ratio]
    if config.get(GENERATION) in ("chatglm2", "chatglm3"):
        return str(config[GENERATION])
    version = str(config.get("transformers_version", "")).split(".")
    early = len(version) > 1 and version[0] == "4" and version[1].isdigit() and int(version[1]) < 30
    return "chatglm2" if early else "chatglm3"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def is_cpm(config: Mapping[str, Any]) -> bool:
    """The Chinese GPT-2 of CPM, which is known by its 30,000 rows."""
    return config.get("model_type") == "gpt2" and config.get("vocab_size") == 30_000


def model_of_embedding(shape: tuple[int, ...]) -> str | None:
    """Which published model has an embedding of this shape, in words; None if none is known."""
    return _MODELS.get(shape[0]) if len(shape) == 2 else None


# So many words of a vocabulary may have no row in the matrix: marks of images and the like, which a model's sibling
# uses. Nothing produces them, and a prompt that held one would be refused. More is another model's vocabulary.
WORDS_WITHOUT_ROWS = 64
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/=]+ \d+\r?\n")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """One published file. pieces: entries in it; tokens: ids that its model's code makes of them."""

    name: str
    file: str
    pieces: int
    tokens: int
    size: int  # bytes
    model: str
    repo: str = ""  # one that has it; a fine-tune keeps the file of its base


_EARLY, _LATER = "ChatGLM-6B of March 2023 (150,528 rows)", "ChatGLM-6B of April 2023 and later (130,528 rows)"
_BOTH = "ChatGLM2-6B, ChatGLM3-6B"
KNOWN: Mapping[str, Vocabulary] = {
    v.name: v
    for v in (
        Vocabulary("first", "ice_text.model", 130_000, 150_344, 2_699_926, _EARLY, "THUDM/chatglm-6b@096f3de6"),
        Vocabulary("slim", "ice_text.model", 130_344, 130_344, 2_706_249, _LATER, "THUDM/chatglm-6b"),
        Vocabulary("chatglm2", "tokenizer.model", 64_789, 64_794, 1_018_370, _BOTH, "THUDM/chatglm3-6b"),
        Vocabulary("glm4", "tokenizer.model", 151_329, 151_343, 2_623_634, "GLM-4", "THUDM/glm-4-9b-chat"),
        Vocabulary("cpm", "chinese_vocab.model", 30_000, 30_000, 713_229, "CPM's Chinese GPT-2"),
    )
}
# Every name under which a vocabulary lies in a folder.
FILES = (
    "ice_text.model", "tokenizer.model", "chinese_vocab.model", "spiece.model", "tokenizer.json", "vocab.json",
    "merges.txt",
)  # fmt: skip


def read_vocabulary(path: Path) -> bytes:
    """The bytes of a vocabulary file. Raises Damaged for a pointer, an empty file, or one that is absurdly large."""
    try:
        refuse_pointer(path)
        return read_file(path)
    except TooLarge as error:
        raise Damaged(
            tr("{name} is larger than {most} MB", name=one_line(path.name), most=error.most >> 20),
            hint=tr("no vocabulary is that large: pull the model again"),
            code="tokenizer.size",
        ) from None
    except OSError as error:
        raise unreadable(path, error, is_vocabulary=True) from None


def is_tiktoken(path: Path) -> bool:
    """Whether a vocabulary file is lines of base64 and numbers, as GLM-4's is."""
    with open_file(path) as file:
        return _TIKTOKEN.match(file.read(1024)) is not None


def require_kind(path: Path, data: bytes, *wanted: str) -> Vocabulary:
    """The published vocabulary that `data` is, one of `wanted`. Raises Damaged that says whose it is instead."""
    expected = [KNOWN[name] for name in wanted]
    if _TIKTOKEN.match(data):
        pieces, kind = data.count(b"\n") + (not data.endswith(b"\n")), "tiktoken"
    else:
        pieces, kind = count_pieces(path, data), "SentencePiece"
    for one in expected:
        if pieces == one.pieces and (kind == "tiktoken") == (one.name == "glm4"):
            return one
    other = next((v for v in KNOWN.values() if v.pieces == pieces and (v.name == "glm4") == (kind == "tiktoken")), None)
    whose = tr("is the vocabulary of {model}", model=other.model) if other else tr("does not belong to any known model")
    raise Damaged(
        tr(
            "{name} ({kind}, {pieces} pieces) {whose}; {wanted} is needed",
            name=one_line(path.name),
            kind=kind,
            pieces=f"{pieces:,}",
            whose=whose,
            wanted=tr(" or ").join(tr("that of {model}", model=one.model) for one in expected),
        ),
        hint=tr(
            "fetch the {file} of {size} bytes, or the config.json and weights that belong to this one",
            file=expected[0].file,
            size=f"{expected[0].size:,}",
        ),
        code="tokenizer.generation",
    )


def vocabulary_file(folder: Path, name: str, model: str, known: Vocabulary | None = None) -> Path:
    """The path of `name` in `folder`. Raises Damaged if it is absent, and names a stranger's file that is there.

    known: the published file that it must be, for the hint.
    """
    path = folder / name
    if path.is_file():
        return path
    found = sorted(other for other in FILES if other != name and (folder / other).is_file())
    beside = tr(" (there is {names}, which belongs to other models)", names=", ".join(found)) if found else ""
    raise Damaged(
        tr("{folder} has no {name}, the vocabulary of {model}", folder=one_line(str(folder)), name=name, model=model)
        + beside,
        hint=tr("fetch {name} from the repository that the weights are from", name=name)
        if known is None or not known.repo
        else tr(
            "the base model's own {name} ({size} bytes) fits: glmchat pull {repo} --include {name}",
            name=name,
            size=f"{known.size:,}",
            repo=known.repo,
        ),
        code="tokenizer.missing",
    )


def check_rows(path: Path, tokens: int, rows: int, spare: int = 0) -> None:
    """Raise Damaged if the vocabulary holds ids that the network has no rows for, more than `spare` of them."""
    if tokens > rows + spare:
        raise Damaged(
            tr(
                "{name} has {tokens} tokens, but config.json gives the network {rows} rows",
                name=one_line(path.name),
                tokens=f"{tokens:,}",
                rows=f"{rows:,}",
            ),
            hint=tr("the vocabulary and the weights belong to different models: fetch both from the same repository"),
            code="tokenizer.generation",
        )


def published_vocabulary(folder: Path, name: str, rows: int) -> Path:
    """The path of that one of `KNOWN` in a folder whose network has `rows`. Raises Damaged for anything else there."""
    wanted = KNOWN[name]
    path = vocabulary_file(folder, wanted.file, wanted.model, wanted)
    require_kind(path, read_vocabulary(path), name)
    check_rows(path, wanted.tokens, rows)
    return path


def check_vocabulary(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the family has one published vocabulary (ChatGLM, CPM), which is then checked.

    Raises Damaged if it is missing, damaged, or another generation's; for pointers and empty files in every family.
    """
    name = None
    if config.get("model_type") == "chatglm":
        name = generation(config).replace("chatglm3", "chatglm2")  # which have one file between them
    elif is_cpm(config) and (folder / KNOWN["cpm"].file).is_file():
        name = "cpm"
    if name is not None:
        published_vocabulary(
            folder, name, integer(config, "padded_vocab_size", "vocab_size", default=KNOWN[name].tokens)
        )
        return True
    for file in FILES:
        if (folder / file).is_file():
            refuse_pointer(folder / file)
    return False


def count_pieces(path: Path, data: bytes) -> int:
    """Pieces of a SentencePiece model. Raises Damaged if `data` is none, or is cut off."""
    at, pieces, size = 0, 0, len(data)
    try:
        while at < size:
            tag, at = _varint(data, at)
            if tag & 7 == 2:
                length, at = _varint(data, at)
                pieces += tag == 0x0A
                at += length
            else:
                break
        if at > size or not pieces:
            raise ValueError
    except (IndexError, ValueError):
        raise damaged_vocabulary(
            tr("{name} ({size} bytes) is not a SentencePiece vocabulary", name=one_line(path.name), size=f"{size:,}"),
            tr("the download was interrupted, or this is a different file: pull it again"),
        ) from None
    return pieces


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf number and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError
