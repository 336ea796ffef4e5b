"""Text from outside is drawn, never obeyed."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from glmchat.core.text import human_bytes, is_chinese, number_text, one_line, show_controls


@given(st.text())
def test_no_control_or_bidi_character_survives(text: str) -> None:
    shown = show_controls(text)
    assert all(unicodedata.category(c) not in ("Cc", "Cs") for c in shown if c not in "\n\t")
    assert not set(shown) & set("\u202e\u2066\u2028\u200f")


@given(st.text())
def test_one_line_is_one_line_within_its_limit(text: str) -> None:
    line = one_line(text, 50)
    assert "\n" not in line and "\r" not in line and "\t" not in line
    assert len(line) <= 50


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_ordinary_text_is_left_as_it_is(text: str) -> None:
    assert show_controls(text) == text


def test_an_escape_sequence_is_visible() -> None:
    assert show_controls("\x1b[31mred\x07") == "␛[31mred␇"


def test_joined_emoji_stay_joined() -> None:
    assert show_controls("👩‍👩‍👧") == "👩‍👩‍👧"


def test_bytes_are_said_as_disks_count_them() -> None:
    assert [human_bytes(n) for n in (0, 999, 98_362_432, 13_419_779_393)] == ["0 B", "999 B", "98.4 MB", "13.4 GB"]


def test_chinese_is_recognised() -> None:
    assert is_chinese("hi 你好") and not is_chinese("hi, どう")


def test_a_number_is_written_as_people_write_it() -> None:
    known = {
        1048576: "1,048,576",
        2.0: "2",
        0.95: "0.95",
        1e-06: "1e-6",
        2.5e-12: "2.5e-12",
        1e6: "1,000,000",
        -3: "-3",
    }
    assert {value: number_text(value) for value in known} == known
    assert number_text(float("inf")) == "inf" and number_text(float("nan")) == "nan"
