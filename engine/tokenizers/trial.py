"""The first reading of a vocabulary, in a process that may crash: tokenizers, sentencepiece and their expressions are
somebody else's code on somebody else's file.

It reads the file as the engine will and encodes a few texts. What takes too much time or memory for that, blows text up
or ends its reader is told; the engine reads only what came through here (checkpoints/vocabulary_trial.py).
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Lower

from glmchat.core.errors import Damaged, GlmchatError
from glmchat.core.files import read_file
from glmchat.core.sandbox import READY, confine, reply_stream
from glmchat.core.text import one_line
from glmchat.engine.tokenizers import hf, loading
from glmchat.engine.tokenizers.base import open_pieces

_PROBE = 4096  # characters
# One character may become 18 others (NFKC of U+FDFA), each of three bytes that are tokens of their own.
_MOST_TOKENS_EACH, _SOME = 64, 4096
_LONGEST = 4096  # characters of an expression or a word that text is cut or exchanged by; the longest known has 600
_MOST_STEPS = 256
_GROWTH = 64  # times that all exchanges together may make a text longer
_DEEPEST = 20
_STAGES = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_TEXTS = (
    "a", " ", "1", "\n", "!", "\t", "A", "_", "中", "é", "😀", "\ufdfa", "\u0130", "a1", "a ", "a!", "ab\n", "aA",
    "'s ", "的1",
    "The quick brown fox, it's said, jumps over 12 lazy dogs.\n", "你好，世界！我有 3 个问题。\n",
    "".join(map(chr, range(32, 127))), "def f(x):\n    return x**2  # ok\n",
)  # fmt: skip


class _Refused(Exception):
    """Something that no honest vocabulary holds, in words."""


def _stages(text: str) -> dict[str, Any]:
    """What stands at the top of a tokenizer.json beside its model, which is most of it and is not looked into."""
    decode, at, found = json.JSONDecoder().raw_decode, 0, {}
    begin = re.compile(r'\s*[{,]\s*("(?:[^"\\]|\\.){1,64}")\s*:\s*')
    while (key := begin.match(text, at)) and key[1] != '"model"':
        value, at = decode(text, key.end())
        found[json.loads(key[1])] = value
    if key is None and not re.match(r"\s*\}\s*\Z", text[at : at + 100]):
        raise _Refused("it is not a JSON object")
    if any(stage not in found for stage in _STAGES):  # another order
        whole = json.loads(text)
        found = {name: value for name, value in whole.items() if name != "model"}
    return found


def _parts(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """Every object in it, from the outside in. Raises _Refused for what is nested too deeply."""
    if depth > _DEEPEST:
        raise _Refused("its settings are nested too deeply")
    if isinstance(value, Mapping):
        yield value
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from _parts(inner, depth + 1)


def look_through(text: str) -> list[str]:
    """The words that the stages of a tokenizer.json exchange or cut by. Raises _Refused for what no honest one has."""
    found = _stages(text)
    words: list[str] = []
    growth = 1.0
    steps = [part for stage in _STAGES for part in _parts(found.get(stage))]
    if len(steps) > 16 * _MOST_STEPS:
        raise _Refused("it takes too many steps")
    for step in steps:
        for name, value in step.items():
            if isinstance(value, str) and len(value) > _LONGEST and name != "precompiled_charsmap":
                raise _Refused(f"its {one_line(name, 40)} has {len(value):,} characters")
        if step.get("type") in ("Replace", "Prepend"):
            put, pattern = str(step.get("content") or step.get("prepend") or ""), step.get("pattern")
            taken = str(pattern.get("String") or pattern.get("Regex") or "") if isinstance(pattern, Mapping) else put
            plain = taken if not isinstance(pattern, Mapping) or "String" in pattern else "x"
            growth *= max(1.0, len(put.encode()) / max(1, len(plain.encode())))
            words += [taken, plain]
        elif isinstance(step.get("Regex"), str):
            words += sorted(set(re.findall(r"\w", step["Regex"])))[:64]
    if growth > _GROWTH:
        raise _Refused("it makes text longer without measure")
    return words


def _probe(tokenizer: Any, words: list[str]) -> None:
    """Encode a few thousand characters of each kind, and decode some of the ids. Raises _Refused."""
    for sample in dict.fromkeys((*_TEXTS, *words[:256])):
        if not sample:
            continue
        text = (sample * (_PROBE // len(sample) + 1))[: _PROBE - 1] + "\x01"
        try:
            ids = tokenizer.encode(text)
        except Damaged as error:
            if isinstance(error.__context__, Exception):  # it has no token for such a text, and says so
                continue
            raise
        if len(ids) > _MOST_TOKENS_EACH * len(text) + _SOME:
            raise _Refused(f"{len(text):,} characters become {len(ids):,} tokens")
        some = list(ids[:256])
        if len(tokenizer.decode(some)) > _LONGEST * (len(some) + 1):
            raise _Refused("a few tokens become a text without measure")


def _read(request: Mapping[str, Any]) -> None:
    if request["reader"] == "text":  # whether it is cut in time; what becomes of it is told by who asked
        Lower.from_str(request["path"]).encode(request["text"], add_special_tokens=False)
        return
    path = Path(request["path"])
    match request["reader"]:
        case "tokenizer.json":
            words = look_through(read_file(path / "tokenizer.json").decode("utf-8"))
            _probe(hf.load_tokenizer_json(path), words)
        case "tokenizer.model":
            _probe(loading.load_tokenizer_model(path), [])
        case "pieces":
            _probe(open_pieces(path, read_file(path)), [])
        case "merges":
            _probe(hf.load_byte_pairs(path, "GPT2Tokenizer"), [])
        case _:
            _probe(loading.load_plain_tokenizer(path, None), [])


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        _read(request)
    except GlmchatError as error:
        return {"error": error.to_json()}
    except _Refused as refused:
        return {"refused": str(refused)}
    except MemoryError:
        return {"refused": "it needs too much memory"}
    except RecursionError:
        return {"refused": "its settings are nested too deeply"}
    except BaseException as error:  # noqa: BLE001 - a panic in Rust is no Exception
        return {"refused": one_line(str(error) or type(error).__name__, 200)}
    return {"ok": True}


def main() -> None:
    """Answer one request: path, reader, and what reading may take (memory in bytes, seconds of the processor)."""
    replies = reply_stream()
    replies.write(READY)
    replies.flush()
    request = json.loads(sys.stdin.readline())
    confine(request["memory"], files=64)
    # SIGPROF's default action ends the process, also within one long call of a library.
    signal.setitimer(signal.ITIMER_PROF, request["seconds"])
    replies.write(json.dumps(_answer(request)) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
