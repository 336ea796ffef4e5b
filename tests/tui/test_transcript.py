"""The transcript: follows the end, stays where one reads, wraps again, selects what was said, finds.

Covers tui/transcript/page.py, tui/transcript/turns.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from polling import eventually
from rich.cells import cell_len
from textual.app import App, ComposeResult
from textual.geometry import Size

from glmchat.tui.theme import PALETTES
from glmchat.tui.transcript.transcript import Clicked, Transcript
from glmchat.tui.transcript.turn_layout import MOST_LINES, TurnLayout
from glmchat.tui.transcript.turns import FOLD_TO, Turn


class Reader(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.clicks: list[tuple[str, str]] = []

    def compose(self) -> ComposeResult:
        yield Transcript(PALETTES["dark"])

    def on_clicked(self, event: Clicked) -> None:
        self.clicks.append((event.name, event.argument))


@asynccontextmanager
async def reader(*turns: Turn, size: tuple[int, int] = (60, 20)) -> AsyncIterator[tuple[Transcript, Any]]:
    app = Reader()
    async with app.run_test(size=size) as pilot:
        transcript = app.query_one(Transcript)
        transcript.show(turns)
        await pilot.pause()
        yield transcript, pilot


def screen(transcript: Transcript) -> list[str]:
    return [transcript.render_line(y).text.rstrip() for y in range(transcript.size.height)]


async def shows(transcript: Transcript, text: str) -> None:
    await eventually(lambda: any(text in line for line in screen(transcript)))


async def grows(transcript: Transcript, before: Size) -> None:
    await eventually(lambda: transcript.virtual_size != before)


async def resize(transcript: Transcript, pilot: Any, width: int, height: int = 20) -> None:
    """Another size of the terminal, and the text wrapped for it."""
    await pilot.resize_terminal(width, height)
    await eventually(lambda: transcript.outer_size == (width, height))
    await eventually(
        lambda: transcript.virtual_size.width == transcript.size.width - transcript.scrollbar_size_vertical
    )


def long_answer(key: str = "a", lines: int = 100) -> Turn:
    return Turn(key, "assistant", "\n\n".join(f"line {i}" for i in range(lines)), "m")


async def test_the_view_stays_at_the_end_while_text_streams_in() -> None:
    async with reader(Turn("a", "assistant", "", "m", state="waiting")) as (transcript, _):
        for i in range(60):
            transcript.feed("a", f"paragraph {i}\n\n")
            if i % 20 == 19:
                await shows(transcript, f"paragraph {i}")
        assert transcript.scroll_offset.y == transcript.max_scroll_y


async def test_who_scrolled_up_stays_where_he_reads_while_text_streams_in() -> None:
    async with reader(long_answer(), Turn("b", "assistant", "", "m", state="waiting")) as (transcript, pilot):
        transcript.action_go_top()
        await pilot.pause()
        before = screen(transcript)[:-1]
        for _ in range(10):
            before_it = transcript.virtual_size
            transcript.feed("b", "more text\n\n" * 5)
            await grows(transcript, before_it)
        assert screen(transcript)[:-1] == before
        assert "End" in screen(transcript)[-1], "a sign says that there is more below"
        transcript.action_go_end()
        await pilot.pause()
        assert transcript.scroll_offset.y == transcript.max_scroll_y


async def test_a_resize_wraps_again_and_keeps_the_text_that_was_read_at_the_top() -> None:
    words = " ".join(f"word{i}" for i in range(3000))
    async with reader(Turn("a", "assistant", words, "m"), long_answer("b")) as (transcript, pilot):
        transcript.scroll_to(y=50, animate=False, force=True)
        await pilot.pause()
        for width in (100, 30, 58):
            await resize(transcript, pilot, width)
            for y in range(transcript.size.height):
                assert cell_len(transcript.render_line(y).text) == transcript.size.width
        await resize(transcript, pilot, 60)
        assert "word" in screen(transcript)[0]


async def test_streamed_text_ends_as_it_would_have_been_loaded() -> None:
    text = "# T\n\n| a | b |\n|---|---|\n| 1 | 量化 |\n\n```py\nx = 1\n```\n- item\n- item two\n\nend 👨‍👩‍👧‍👦 **bold**"
    async with reader(Turn("a", "assistant", "", "m", state="waiting"), size=(60, 40)) as (transcript, pilot):
        for character in text:
            transcript.feed("a", character)
            transcript.tick()
        transcript.finish("a")
        await pilot.pause()
        streamed = screen(transcript)
        transcript.show([Turn("a", "assistant", text, "m")])
        await pilot.pause()
        assert screen(transcript) == streamed
        assert "\ufffd" not in "".join(streamed)


async def test_two_thousand_messages_open_without_drawing_them_all() -> None:
    turns = [
        turn
        for i in range(1000)
        for turn in (
            Turn(f"q{i}", "user", f"question {i}"),
            Turn(f"a{i}", "assistant", "answer\n\n- one\n- two " * 5, "m"),
        )
    ]
    async with reader(*turns) as (transcript, pilot):
        layouts = [transcript.layout_of(turn.key) for turn in turns]
        assert 0 < sum(layout is not None and layout.is_split for layout in layouts) < 20
        for y in (0, 900, 3000, transcript.max_scroll_y):
            transcript.scroll_to(y=y, animate=False, force=True)
            await pilot.pause()
            assert all(cell_len(transcript.render_line(row).text) == transcript.size.width for row in range(20))


async def test_a_mouse_selection_copies_what_was_said_not_what_was_drawn() -> None:
    text = (
        "A sentence that is long enough to be wrapped at least once in this narrow view.\n\n```py\nx = 1\n```\n\n- item"
    )
    async with reader(Turn("a", "assistant", text, "m"), size=(40, 30)) as (transcript, pilot):
        await pilot.mouse_down(Transcript, offset=(4, transcript.air + 1))
        await pilot.hover(Transcript, offset=(38, transcript.size.height - 1))
        await pilot.mouse_up(Transcript, offset=(38, transcript.size.height - 1))
        await pilot.pause()
        assert "long enough to be wrapped at least once in this narrow view." in transcript.selected_text
        assert "\nx = 1\n" in transcript.selected_text
        assert "- item" in transcript.selected_text
        assert "copy" not in transcript.selected_text and "▀" not in transcript.selected_text


async def test_selected_chinese_is_cut_at_characters() -> None:
    async with reader(Turn("a", "assistant", "量化把权重压缩到四位", "m"), size=(40, 10)) as (transcript, pilot):
        left = transcript.margin + 2
        await pilot.mouse_down(Transcript, offset=(left + 4, transcript.air + 1))
        await pilot.hover(Transcript, offset=(left + 10, transcript.air + 1))
        await pilot.mouse_up(Transcript, offset=(left + 10, transcript.air + 1))
        assert transcript.selected_text == "把权重"


async def test_a_double_click_selects_a_word() -> None:
    async with reader(Turn("a", "assistant", "one two_three four", "m"), size=(40, 10)) as (transcript, pilot):
        await pilot.click(Transcript, offset=(transcript.margin + 2 + 6, transcript.air + 1), times=2)
        assert transcript.selected_text == "two_three"


async def test_a_click_on_copy_gives_the_whole_block_even_if_it_came_in_parts() -> None:
    code = "\n".join(f"x{i}" for i in range(200))
    async with reader(Turn("a", "assistant", f"```py\n{code}\n```", "m"), size=(60, 20)) as (transcript, pilot):
        transcript.action_go_top()
        await pilot.pause()
        y = next(i for i, line in enumerate(screen(transcript)) if line.rstrip().endswith("copy"))
        x = screen(transcript)[y].rindex("copy")
        await pilot.click(Transcript, offset=(x, y))
        await pilot.pause()
        assert transcript.app.clicks == [("copy-code", code)]  # type: ignore[attr-defined]


async def test_a_click_on_copy_in_a_list_gives_that_code_alone() -> None:
    text = "1. Write this:\n\n   ```python\n   if x:\n       print(1)\n   ```\n\n   then\n\n   ```sh\n   ls\n   ```\n"
    async with reader(Turn("a", "assistant", text, "m"), size=(60, 30)) as (transcript, pilot):
        labels = [
            (line.rindex("copy"), y) for y, line in enumerate(screen(transcript)) if line.rstrip().endswith("copy")
        ]
        for place in labels:
            await pilot.click(Transcript, offset=place)
            await pilot.pause()
        assert transcript.app.clicks == [("copy-code", "if x:\n    print(1)"), ("copy-code", "ls")]  # type: ignore[attr-defined]


async def test_what_is_selected_with_the_mouse_has_the_tabs_that_were_written() -> None:
    text = "a\tb\n\n```make\nall:\n\tgcc\ta.c\n```\n"
    async with reader(Turn("a", "assistant", text, "m"), size=(60, 20)) as (transcript, pilot):
        last = next(y for y, line in enumerate(screen(transcript)) if "gcc" in line)
        await pilot.mouse_down(Transcript, offset=(transcript.margin, 0))
        await pilot.hover(Transcript, offset=(55, last))
        await pilot.mouse_up(Transcript, offset=(55, last))
        assert "a\tb" in transcript.selected_text
        assert transcript.selected_text.endswith("all:\n\tgcc\ta.c")


async def test_a_long_question_is_folded_and_unfolds_on_a_click() -> None:
    async with reader(Turn("q", "user", "\n".join(f"row {i}" for i in range(100))), size=(60, 40)) as (
        transcript,
        pilot,
    ):
        shown = screen(transcript)
        assert sum("row" in line for line in shown) == FOLD_TO
        y = next(i for i, line in enumerate(shown) if "more lines" in line)
        await pilot.click(Transcript, offset=(10, y))
        await pilot.pause()
        assert sum("row" in line for line in screen(transcript)) > FOLD_TO


async def test_search_marks_hits_and_walks_between_them() -> None:
    async with reader(long_answer("a"), Turn("b", "assistant", "量化 is here", "m"), long_answer("c")) as (
        transcript,
        pilot,
    ):
        assert transcript.search("量化") == 1
        transcript.go_to_hit(1)
        await pilot.pause()
        y = next(i for i, line in enumerate(screen(transcript)) if "量化" in line)
        found = PALETTES["dark"].hit_style
        marked = [s.text for s in transcript.render_line(y) if s.style and s.style.bgcolor == found.bgcolor]
        assert marked == ["量化"]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 2), (300, 80)])
async def test_any_size_is_survived(size: tuple[int, int]) -> None:
    turns = [
        Turn("w", "welcome", "Enter\tsend"),
        Turn("q", "user", "问题"),
        long_answer(),
        Turn("e", "error", "e", hint="h"),
    ]
    turns.append(Turn("r", "rule", "new context"))
    async with reader(*turns, size=size) as (transcript, pilot):
        transcript.feed("a", "x")
        await resize(transcript, pilot, 60)
        assert len(screen(transcript)) == 20


@pytest.mark.parametrize(
    "hostile",
    ["x" * 1_000_000, "| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 50_000, "```\n" + "line\n" * 50_000, "[" * 100_000],
    ids=["long-line", "table", "fence", "brackets"],
)
async def test_hostile_answers_are_drawn_while_the_window_stays_alive(hostile: str) -> None:
    async with reader(Turn("a", "assistant", "", "m", state="waiting")) as (transcript, pilot):
        for at in range(0, len(hostile), 50_000):
            transcript.feed("a", hostile[at : at + 50_000])
            transcript.tick()
        transcript.finish("a")
        await pilot.pause()
        transcript.action_go_top()
        await pilot.pause()
        transcript.scroll_to(y=transcript.max_scroll_y // 2, animate=False, force=True)
        await pilot.pause()
        assert any(screen(transcript))


def test_an_answer_that_streams_by_keeps_few_of_its_drawn_lines_and_draws_them_again() -> None:
    layout = TurnLayout(Turn("a", "assistant", state="streaming"))
    layout.fit(60, PALETTES["dark"], 20)
    for n in range(MOST_LINES):
        layout.feed(f"paragraph {n}\n\n")
        if n % 5 == 0:
            layout.update()
            layout.realise(layout.height - 20, layout.height)
    assert layout.drawn_lines < MOST_LINES + 50
    assert layout.height > 2 * MOST_LINES - 20  # of nothing the height is forgotten
    layout.realise(0, 20)
    first = layout.line(1, 0)
    assert first is not None and first.text == "paragraph 0"
