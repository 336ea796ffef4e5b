"""Blocks do not depend on how the stream was cut, and no input makes one block huge."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmchat.tui.transcript.blocks import CHUNK_LINES, Block, BlockSplitter, split_row

EVERYTHING = """# 标题 😀

A paragraph with **bold**
and a second line.
Setext
======
- one
- two

  still two
  ```sh
  ls
  ```
1. first
1. second
> quote
> more
| a | b |
|---|--:|
| 1 | 2 |

```python
def f():
    return '''

# no heading'''
```
~~~
never closed ``` 你好
"""
LINES = st.lists(
    st.sampled_from(
        [
            "# h",
            "text 量化",
            "",
            "- item",
            "  more",
            "1. x",
            "> q",
            "```",
            "```py",
            "~~~",
            "| a | b |",
            "|---|---|",
            "---",
            "===",
            "$$",
            "    code",
            "👨‍👩‍👧‍👦",
            "\r",
        ]
    ),
    max_size=25,
)


def split(text: str, cuts: int = 0, *, look: bool = False) -> list[tuple[str, str, int]]:
    splitter = BlockSplitter()
    for start in range(0, len(text), cuts or max(1, len(text))):
        splitter.feed(text[start : start + (cuts or max(1, len(text)))])
        if look:
            splitter.tail()
    splitter.close()
    return [(block.kind, block.text, block.number) for block in splitter.blocks]


@pytest.mark.parametrize("cut", range(1, 24))
def test_every_cut_of_the_stream_gives_the_same_blocks(cut: int) -> None:
    assert split(EVERYTHING, cut, look=True) == split(EVERYTHING)


@given(LINES, st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_any_lines_in_any_pieces_give_the_same_blocks(lines: list[str], cut: int) -> None:
    text = "\n".join(lines)
    assert split(text, cut, look=True) == split(text)


def test_the_tail_shows_what_is_not_final_and_changes_nothing() -> None:
    splitter = BlockSplitter()
    splitter.feed("done\n\n```py\nx = 1\n")
    assert [b.kind for b in splitter.blocks] == ["text"]
    assert [(b.kind, b.text) for b in splitter.tail()] == [("code", "x = 1")]
    splitter.feed("``")  # the closing fence is on its way
    assert [b.text for b in splitter.tail()] == ["x = 1"]
    splitter.feed("`\n")
    assert [(b.kind, b.text) for b in splitter.blocks] == [("text", "done"), ("code", "x = 1")]


def test_lists_count_on_although_every_item_says_one() -> None:
    assert [number for _, _, number in split("1. a\n1. b\n1. c\n")] == [1, 2, 3]


def test_long_code_and_long_tables_come_in_parts_that_know_their_head() -> None:
    splitter = BlockSplitter()
    splitter.feed("```\n" + "x\n" * 1000 + "```\n| a |\n|---|\n" + "| 1 |\n" * 1000)
    splitter.close()
    assert max(len(b.lines) for b in splitter.blocks) <= CHUNK_LINES
    heads = {id(b.first) for b in splitter.blocks}
    assert len(heads) == 2
    assert sum(len(b.lines) for b in splitter.blocks) == 1000 + 1002


@pytest.mark.parametrize(
    "hostile",
    [
        "x" * 1_000_000,
        "[" * 200_000,
        "*" * 200_000,
        "> " * 100_000,
        "- " * 100_000,
        "```\n" + "never closed\n" * 50_000,
        "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 50_000,
        "$$\n" + "x\n" * 10_000,
        "- a\n" + "  b\n" * 50_000,
        "\n" * 100_000,
    ],
    ids=["long-line", "brackets", "stars", "quotes", "bullets", "fence", "table", "math", "item", "empty"],
)
def test_no_input_makes_a_block_that_is_dear_to_draw(hostile: str) -> None:
    splitter = BlockSplitter()
    splitter.feed(hostile)
    splitter.close()
    largest: Block | None = max(splitter.blocks, key=lambda b: len(b.text), default=None)
    assert largest is None or len(largest.text) <= 25_000


def test_control_characters_are_drawn_and_carriage_returns_end_lines() -> None:
    assert split("a\x1b[31mb\r\nc\u202ed\x07\n", 1) == split("a\x1b[31mb\r\nc\u202ed\x07\n")
    assert split("a\x1b[31mb\r\nc\u202ed\x07\n") == [("text", "a␛[31mb\nc<U+202E>d␇", 0)]


def test_a_bar_in_a_cell_can_be_escaped() -> None:
    assert split_row(r"| a \| b | `c` |") == ["a | b", "`c`"]
