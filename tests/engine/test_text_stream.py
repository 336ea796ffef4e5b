"""Ids to text: pieces join to the whole for every text and split, and stop strings never show."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmchat.engine import load_tokenizer
from glmchat.engine.prompts.chatglm import ChatGLM2Prompt, ChatGLM3Prompt, ChatGLMPrompt
from glmchat.engine.text_stream import CleanUp, TextStream
from glmchat.engine.tokenizers.base import Tokenizer

TEXTS = [
    "你好，世界！我是一个语言模型。",
    "👋 鳙鱼 👩‍👩‍👧‍👦 🇨🇳 é́",
    "def f(x):\n\treturn x ** 2  # π ≈ 3.14159\n",
    "mixed 中文 and English，标点“引号”…",
    "\U0001f600" * 7,
]


class Bytes:
    """Every id is a byte; ids from 256 are control tokens."""

    vocab_size = 260

    def __init__(self) -> None:
        self.controls: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_special = encode

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes | None:
        return self.piece_bytes(token)

    def piece_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""


class Whole(Bytes):
    """A vocabulary that cannot say what a single id stands for, and drops the first blank."""

    def decode(self, ids: Sequence[int]) -> str:
        text = super().decode(ids)
        return text[1:] if text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes | None:
        return None


def pieces(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("tokenizer", [Bytes(), Whole()], ids=["bytes", "whole"])
@given(text=st.text() | st.sampled_from(TEXTS))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_decoded_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [Bytes(), Whole()], ids=["bytes", "whole"])
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    found = pieces(tokenizer, tokenizer.encode(text))
    assert all("\ufffd" not in piece for piece in found)
    assert all(piece in text for piece in found)


@given(raw=st.binary(max_size=200), text=st.text(max_size=40) | st.sampled_from(TEXTS), times=st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_long_texts_and_bytes_that_are_none_join_to_the_decoded_whole(raw: bytes, text: str, times: int) -> None:
    for said in (raw + (text * times).encode() + raw, (raw + text.encode()) * times, b" " * 50 + raw):
        assert "".join(pieces(Whole(), list(said))) == Whole().decode(list(said))


class Counting(Whole):
    """Counts the ids that it was asked to decode."""

    decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return super().decode(ids)


class CountingFormat(ChatGLMPrompt):
    """Counts the characters that it was asked to clean up."""

    def __init__(self) -> None:
        self.cleaned = 0

    def clean(self, text: str) -> str:
        self.cleaned += len(text)
        return super().clean(text)


@pytest.mark.parametrize("text", [*TEXTS, "\ufffd", "天空是蓝色的, 因为!"])
def test_an_id_costs_the_same_at_the_end_of_a_long_answer_as_at_its_beginning(text: str) -> None:
    counts = []
    for length in (4_000, 8_000):
        tokenizer, clean_up = Counting(), CountingFormat()
        stream = TextStream(tokenizer, ("STOP",), clean_up)
        ids = tokenizer.encode(text * length)[:length]
        shown = "".join([*(stream.push(token) for token in ids), stream.finish()])
        assert shown == ChatGLMPrompt.clean(clean_up, Whole().decode(ids))
        counts.append((tokenizer.decoded, clean_up.cleaned))
    for once, twice in zip(*counts, strict=True):
        assert twice <= 2.1 * once


@given(raw=st.binary(max_size=40))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_text_come_out_as_in_decode(raw: bytes) -> None:
    assert "".join(pieces(Bytes(), list(raw))) == Bytes().decode(list(raw))


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_anywhere_joins_to_the_decoded_text(text: str) -> None:
    ids = Bytes().encode(text)
    for end in range(len(ids)):
        assert "".join(pieces(Bytes(), ids[:end])) == Bytes().decode(ids[:end])


@given(before=st.text(alphabet="ab问\n", max_size=12), after=st.text(alphabet="ab问\n", max_size=6))
@settings(max_examples=200, deadline=None)
def test_text_ends_before_the_first_stop_string(before: str, after: str) -> None:
    stop = ("\n问", "abba")
    text = before + stop[0] + after
    ends = [at for s in stop if (at := text.find(s)) >= 0]
    stream = TextStream(Bytes(), stop)
    found = "".join(stream.push(token) for token in Bytes().encode(text)) + stream.finish()
    # Which of two overlapping ones is first seen depends on where it ends, as the text comes in order.
    first_end = min(at + len(s) for s in stop if (at := text.find(s)) >= 0)
    seen = min(at for s in stop if (at := text[:first_end].find(s)) >= 0)
    assert stream.stopped
    assert found == text[:seen]
    assert seen in ends


def test_the_beginning_of_a_stop_string_is_held_back_and_given_when_it_was_none() -> None:
    stream = TextStream(Bytes(), ("STOP",))
    said = [stream.push(ord(letter)) for letter in "xSTO"]
    assert said == ["x", "", "", ""]
    assert stream.push(ord("y")) == "STOy"


FORMATS = {
    "6b": ChatGLMPrompt.__new__(ChatGLMPrompt),
    "2": ChatGLM2Prompt.__new__(ChatGLM2Prompt),
    "3": ChatGLM3Prompt.__new__(ChatGLM3Prompt),
}
SAID = [
    " 你好,世界! ", "中,,文", "!!中!!", "Hi, there: [[训练时间]]年; ok?", "a[b[[c训练", "", "\n 你好,\n世界 ",
    "多, 行\n\n第二: 行!\n [[训练时", "，,！!中 ,  文", "get_weather \n```python\ntool_call(city='北京')\n```",
]  # fmt: skip


@pytest.mark.parametrize("clean_up", FORMATS.values(), ids=FORMATS)
@given(text=st.sampled_from(SAID) | st.text(alphabet="中a, \n![]训练时间", max_size=14))
@settings(max_examples=150, deadline=None)
def test_cleaned_pieces_join_to_the_cleaned_whole_and_nothing_is_taken_back(clean_up: CleanUp, text: str) -> None:
    stream = TextStream(Bytes(), (), clean_up)
    assert "".join([*(stream.push(t) for t in Bytes().encode(text)), stream.finish()]) == clean_up.clean(text)


@pytest.mark.parametrize("clean_up", FORMATS.values(), ids=FORMATS)
@given(parts=st.lists(st.sampled_from([*SAID, "天空是蓝色的因为阳光", "x" * 30, "[[训练时间]],,!"]), max_size=12))
@settings(max_examples=150, deadline=None)
def test_so_they_do_where_old_text_was_forgotten_and_go_on_where_it_was_cut(
    clean_up: CleanUp, parts: list[str]
) -> None:
    text = "\n" + "".join(parts)  # ChatGLM3 opens an answer with a header line, which is empty
    ids = Bytes().encode(text)
    stream = TextStream(Bytes(), (), clean_up)
    assert "".join([*(stream.push(token) for token in ids), stream.finish()]) == clean_up.clean(text)
    stream = TextStream(Bytes(), (), clean_up)
    said = text[: len(text) // 2]
    stream.resume(Bytes().encode(said))
    rest = "".join([*(stream.push(token) for token in Bytes().encode(text[len(said) :])), stream.finish()])
    shown, whole = clean_up.clean(said), clean_up.clean(text)
    if whole.startswith(shown):
        assert shown + rest == whole


@given(words=st.lists(st.sampled_from(["ST", "OP", "S", "天空是蓝色的因为", "x" * 70, "P\n"]), max_size=30))
@settings(max_examples=150, deadline=None)
def test_a_stop_string_far_into_an_answer_never_shows(words: list[str]) -> None:
    text = "".join(words)
    stream = TextStream(Bytes(), ("STOP", "P\nS"))
    shown = "".join([*(stream.push(token) for token in Bytes().encode(text)), stream.finish()])
    ends = [(at + len(s), at) for s in ("STOP", "P\nS") if (at := text.find(s)) >= 0]
    assert shown == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("clean_up", FORMATS.values(), ids=FORMATS)
def test_a_placeholder_with_marks_behind_it_is_not_shown_in_halves(clean_up: CleanUp) -> None:
    stream = TextStream(Bytes(), (), clean_up)
    text = "它是[[训练时间]],,的"
    assert "".join([*(stream.push(token) for token in Bytes().encode(text)), stream.finish()]) == clean_up.clean(text)


@pytest.mark.parametrize("clean_up", [None, *FORMATS.values()], ids=["none", *FORMATS])
@pytest.mark.parametrize("text", [text for text in SAID if "[[训" not in text])
def test_an_answer_that_was_stopped_goes_on_where_its_text_ended(clean_up: CleanUp | None, text: str) -> None:
    ids = Bytes().encode(text)
    whole = text if clean_up is None else clean_up.clean(text)
    for cut in range(len(text)):
        said = len(text[:cut].encode())
        before, after = TextStream(Bytes(), (), clean_up), TextStream(Bytes(), (), clean_up)
        shown = "".join([*(before.push(token) for token in ids[:said]), before.finish()])
        after.resume(ids[:said])
        rest = "".join([*(after.push(token) for token in ids[said:]), after.finish()])
        if whole.startswith(shown):  # otherwise a mark that stood last was shown as it was
            assert shown + rest == whole, cut


def test_an_answer_without_marks_is_shown_all_but_its_last_character() -> None:
    stream = TextStream(Bytes(), (), FORMATS["6b"])
    assert "".join(stream.push(token) for token in Bytes().encode("天空是蓝色的")) == "天空是蓝色"


def test_the_starter_vocabulary_streams_chinese_and_emoji(starter_model: Path) -> None:
    tokenizer = load_tokenizer(starter_model)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids) == text
    chance = random.Random(3)
    for _ in range(50):
        ids = [chance.randrange(tokenizer.vocab_size) for _ in range(40)]
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_control_tokens_never_reach_the_screen(tmp_path: Path, builders: ModuleType) -> None:
    tokenizer = load_tokenizer(builders.write_folder(tmp_path))
    ids = [1, *tokenizer.encode("hello the"), 2, 0]
    assert "".join(pieces(tokenizer, ids)) == "hello the"
