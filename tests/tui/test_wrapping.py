"""Wrapping: nothing is lost, nothing is wider than the row, graphemes stay whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from glmchat.tui.transcript.wrapping import rows, slices

TEXT = st.text(alphabet=st.sampled_from("ab cd,.量化，。（）“”😀é\n-x"), max_size=80)


@given(TEXT, st.integers(2, 40), st.booleans())
@settings(max_examples=300, deadline=None)
def test_rows_fit_and_nothing_but_space_is_lost(text: str, width: int, words: bool) -> None:
    found = rows(text, width, words=words)
    position = 0
    for row in found:
        assert cell_len(text[row.start : row.end]) <= width
        assert not text[position : row.start].strip(), "only space may fall between two rows"
        position = row.end
    assert not text[position:].strip()
    if not words:
        assert "".join(text[r.start : r.end] + ("\n" if r.joint == "\n" else "") for r in found) == text + "\n"


@given(st.lists(TEXT, max_size=5), st.integers(2, 30))
@settings(max_examples=100, deadline=None)
def test_slices_carry_every_character_of_their_row(parts: list[str], width: int) -> None:
    spans = [(part, Style(bold=bool(i % 2))) for i, part in enumerate(parts)]
    text = "".join(parts)
    wrapped = rows(text, width)
    for row, segments in zip(wrapped, slices(spans, wrapped), strict=True):
        assert "".join(segment.text for segment in segments) == text[row.start : row.end]
        assert all(isinstance(segment, Segment) for segment in segments)


def test_chinese_breaks_anywhere_but_before_closing_punctuation() -> None:
    text = "量化把权重压缩，模型更小。"
    shown = [text[r.start : r.end] for r in rows(text, 14)]
    assert shown == ["量化把权重压", "缩，模型更小。"]
    assert all(line[0] not in "，。" for line in shown)


@pytest.mark.parametrize("width", range(2, 12))
def test_a_family_of_joined_emoji_is_never_cut(width: int) -> None:
    family = "👨‍👩‍👧‍👦"
    text = family * 3
    for row in rows(text, width):
        assert len(text[row.start : row.end]) % len(family) == 0


def test_a_megabyte_without_a_space_wraps_in_a_line_pass() -> None:
    found = rows("x" * 1_000_000, 100)
    assert len(found) == 10_000
