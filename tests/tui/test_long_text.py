"""However long a text is, its blocks are those of the splitter, and few of them are kept.

Covers tui/transcript/turn_layout.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmchat.tui.theme import PALETTES
from glmchat.tui.transcript import long_text, turn_layout
from glmchat.tui.transcript.blocks import Block, BlockSplitter
from glmchat.tui.transcript.long_text import LongText
from glmchat.tui.transcript.markdown import code_blocks
from glmchat.tui.transcript.turn_layout import TurnLayout
from glmchat.tui.transcript.turns import Turn

LINES = st.lists(
    st.sampled_from(
        [
            "# h",
            "text 量化",
            "",
            "- item",
            "  more",
            "1. x",
            "1. y",
            "> q",
            "```",
            "```py",
            "code = 1",
            "'''",
            "---",
            "| a | b |",
            "|---|---|",
            "| 1 | 2 |",
            "$$",
            "👨‍👩‍👧‍👦",
            "\r",
        ]
    ),
    min_size=1,
    max_size=120,
)


@pytest.fixture(autouse=True)
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "STRETCH_BLOCKS", 3)
    monkeypatch.setattr(long_text, "STRETCH_CHARACTERS", 40)
    monkeypatch.setattr(long_text, "KEPT_STRETCHES", 2)
    monkeypatch.setattr(turn_layout, "STRETCH_CHARACTERS", 40)
    monkeypatch.setattr(turn_layout, "MOST_LINES", 30)
    monkeypatch.setattr(turn_layout, "_LONG", 60)


def said(block: Block) -> tuple[object, ...]:
    return (block.kind, block.text, block.number, block.info, block.part, block.gap, block.first.text, block.before)


def plain(text: str) -> list[Block]:
    splitter = BlockSplitter()
    splitter.feed(text)
    splitter.close()
    return splitter.blocks


def streamed(text: str, cut: int) -> LongText:
    holder = Turn("a", "assistant")
    found = LongText(holder)
    for at in range(0, len(text), cut):
        holder.text += text[at : at + cut]
        found.feed(found.unread)
    found.close()
    return found


@given(LINES, st.integers(1, 40), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_blocks_are_the_splitters_in_whatever_order_they_are_asked_for(lines: Any, cut: Any, random: Any) -> None:
    text = "\n".join(lines)
    expected, found = plain(text), streamed(text, cut)
    numbers = list(range(len(expected)))
    random.shuffle(numbers)
    assert len(found) == len(expected)
    for number in numbers:
        assert said(found.block(number)) == said(expected[number])
        assert found.before(number) == (expected[number - 1].kind if number else None)


def test_the_blocks_of_few_stretches_are_kept() -> None:
    found = streamed("\n\n".join(f"paragraph {n}" for n in range(300)), 7)
    for number in (0, 299, 150, 3):
        found.block(number)
        with_blocks = [stretch for stretch in found._stretches[:-1] if stretch.blocks is not None]
        assert len(with_blocks) == long_text.KEPT_STRETCHES
    assert len(found._stretches) > 90


def test_a_list_counts_on_in_what_is_still_being_written() -> None:
    splitter = BlockSplitter()
    splitter.feed("1. one\n1. two\n1. thr")
    assert [block.number for block in [*splitter.blocks, *splitter.tail()]] == [1, 2, 3]


def laid_out(turn: Turn, width: int) -> TurnLayout:
    layout = TurnLayout(turn)
    layout.fit(width, PALETTES["dark"], 20)
    return layout


def drawn(layout: TurnLayout) -> list[str]:
    """Every line, read a screen at a time from the end to the beginning and back."""
    for top in [*range(layout.height, -1, -15), *range(0, layout.height, 15)]:
        layout.realise(top, top + 15)
    return [line.text for piece in range(layout.count) for line in layout.lines(piece)]


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("feed"), LINES),
        st.tuples(st.just("update"), st.none()),
        st.tuples(st.just("narrow or widen"), st.integers(1, 70)),
        st.tuples(st.just("recolour"), st.sampled_from(["dark", "light"])),
        st.tuples(st.just("scroll"), st.floats(0, 1)),
    ),
    max_size=20,
)


@given(ACTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_whatever_happened_while_it_streamed_an_answer_ends_as_it_would_have_been_loaded(
    acts: Any, whole: bool
) -> None:
    turn, width, palette = Turn("a", "assistant", state="waiting"), 40, "dark"
    layout = laid_out(turn, width)
    for act, value in acts:
        match act:
            case "feed":
                layout.feed("\n".join(value))
            case "update":
                layout.update()
            case "narrow or widen":
                width = value
            case "recolour":
                palette = value
            case "scroll":
                top = int(value * layout.height)
                while layout.realise(top, top + 15):
                    pass
                assert all(layout.line(*layout.locate(y)) for y in range(top, min(top + 15, layout.height)))
        layout.fit(width, PALETTES[palette], 20)
    layout.update()
    if whole:
        layout.finish()
    loaded = laid_out(Turn("b", "assistant", turn.text, state=turn.state), width)
    assert drawn(layout) == drawn(loaded)
    assert layout.height == loaded.height == len(drawn(loaded))


LONG = "".join(f"Paragraph {n} 量化 with words that wrap\n\n```py\nx = {n}\n```\n" for n in range(300))


def test_a_long_answer_is_the_same_after_it_streamed_by_and_after_the_window_changed_its_width() -> None:
    turn = Turn("a", "assistant", state="waiting")
    layout = laid_out(turn, 60)
    for at in range(0, len(LONG), 700):
        layout.feed(LONG[at : at + 700])
        layout.update()
        layout.realise(layout.height - 20, layout.height)
    layout.finish()
    fresh = drawn(laid_out(Turn("b", "assistant", LONG), 60))
    assert drawn(layout) == fresh
    layout.fit(30, PALETTES["dark"], 20)
    narrow = laid_out(Turn("c", "assistant", LONG), 30)
    assert drawn(layout) == drawn(narrow)
    assert layout.height == narrow.height == len(drawn(narrow))


def test_code_that_came_in_many_parts_is_copied_whole_from_any_of_them() -> None:
    code = "\n".join(f"line {n}" for n in range(500))
    layout = laid_out(Turn("a", "assistant", f"Look:\n\n```py\n{code}\n```\nand\n```\nmore\n```\n"), 60)
    parts = [piece for piece in range(layout.count) if "line" in layout.code_of(piece)]
    assert len(parts) == 8
    assert {layout.code_of(piece) for piece in parts} == {code}
    assert layout.code_of(0) == ""
    assert code_blocks(layout.turn.text) == [code, "more"]
