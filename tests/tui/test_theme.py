"""Themes, in a pseudo-terminal: what is chosen is seen in each of them, however many colours there are.

Covers tui/theme.py, tui/screens/palette.py, tui/widgets/rows.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

from glmchat.core.settings import THEMES
from glmchat.tui.theme import remembered_theme

DEPTHS: Mapping[str, Mapping[str, str]] = {
    "truecolor": {},
    "256": {"COLORTERM": ""},
    "16": {"TERM": "xterm", "COLORTERM": ""},
}
SIZES = ((40, 12), (80, 24), (120, 36), (200, 60))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


def grounds(terminal: TerminalSession, row: int) -> list[tuple[str, bool]]:
    """The colour behind each cell; reversed ones differ from others where both are the terminal's own."""
    reverse = (terminal.screen.buffer[row][column].reverse for column in range(terminal.screen.columns))
    return list(zip(terminal.backgrounds(row), reverse, strict=True))


def chosen_cells(terminal: TerminalSession, row: int) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """The colours behind the row that is marked, within its panel, and behind the row below or above it."""
    line = terminal.lines[row]
    first = line.index("▸")
    last = line.index("│", first) if "│" in line[first:] else len(line)
    other = row + 1 if "│" in terminal.lines[row + 1] else row - 1
    return grounds(terminal, row)[first : last - 4], grounds(terminal, other)[first : last - 4]


def differs(chosen: list[tuple[str, bool]], usual: list[tuple[str, bool]]) -> bool:
    return len(chosen) > 20 and all(a != b for a, b in zip(chosen, usual, strict=True))


def marked(terminal: TerminalSession) -> int:
    return next((number for number, line in enumerate(terminal.lines) if "▸" in line), -1)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("columns", "rows"), [(40, 12), (100, 30)])
def test_the_chosen_row_is_seen_in_every_theme_and_however_many_colours_there_are(
    model: Path, depth: str, columns: int, rows: int
) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows, environ=DEPTHS[depth]) as terminal:
        terminal.until_ready()
        terminal.say("/theme dark")
        terminal.until_still()
        terminal.say("/theme")
        terminal.until_seen("▸ dark")
        for name in THEMES:
            terminal.until_seen(f"▸ {name}")
            terminal.until(lambda: differs(*chosen_cells(terminal, marked(terminal))))
            terminal.press("down")


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_a_theme_is_shown_under_the_cursor_and_esc_brings_back_the_one_before(
    model: Path, columns: int, rows: int
) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows) as terminal:
        terminal.until_ready()
        terminal.until_still()
        before = terminal.backgrounds(rows - 1)[0]
        terminal.say("/theme")
        terminal.until_seen("▸ dark")
        terminal.until_still()
        dimmed = terminal.backgrounds(rows - 1)[0]
        terminal.press("down")
        terminal.until_seen("▸ light")
        terminal.until(lambda: terminal.backgrounds(rows - 1)[0] not in (before, dimmed))
        terminal.press("esc")
        terminal.until(lambda: terminal.backgrounds(rows - 1)[0] == before)
        assert remembered_theme() is None


def test_a_theme_that_was_taken_is_there_at_the_next_start_and_a_setting_stands_above_it(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.say("/theme")
        terminal.until_seen("▸ dark")
        terminal.press("end", "enter")
        terminal.until_seen("Ask anything")
        terminal.until(lambda: remembered_theme() == THEMES[-1])
        terminal.until_still()
        taken = terminal.backgrounds(5)[0]
    for setting, is_same in (({}, True), ({"GLMCHAT_THEME": "dark"}, False)):
        with TerminalSession("run", model, environ=setting) as terminal:
            terminal.until_ready()
            terminal.until_still()
            assert (terminal.backgrounds(5)[0] == taken) is is_same


@pytest.mark.parametrize(
    ("environ", "has_colours"), [({"TERM": "screen", "COLORTERM": ""}, True), ({"NO_COLOR": "1"}, False)]
)
def test_few_colours_are_the_terminals_own_and_none_are_none(
    model: Path, environ: dict[str, str], has_colours: bool
) -> None:
    with TerminalSession("run", model, environ=environ) as terminal:
        terminal.until_ready()
        terminal.until_still()
        cells = [terminal.screen.buffer[y][x] for y in range(30) for x in range(100)]
        assert {cell.bg for cell in cells} == {"default"}
        inks = {cell.fg for cell in cells}
        assert (inks > {"default"}) is has_colours and all(not ink.isdigit() for ink in inks)
        if not has_colours:
            terminal.say("/theme")
            terminal.until_seen("NO_COLOR is set")


@pytest.mark.parametrize("depth", DEPTHS)
def test_marked_text_in_the_prompt_is_seen(model: Path, depth: str) -> None:
    with TerminalSession("run", model, environ=DEPTHS[depth]) as terminal:
        terminal.until_ready()
        for theme in ("dark", "light", "nord", "ansi"):
            terminal.say(f"/theme {theme}")
            terminal.until_seen("Ask anything")
            terminal.type("marked words")
            terminal.until_seen("marked words")
            terminal.press("\x1b[1;2D", "\x1b[1;2D", "\x1b[1;2D")  # Shift+Left
            row = terminal.row_of("marked words")
            at = terminal.lines[row].index("words")

            def is_marked(row: int = row, at: int = at) -> bool:
                behind = grounds(terminal, row)
                return all(behind[at] != behind[at + one] for one in (2, 3, 4))

            terminal.until(is_marked)
            terminal.press("end", "esc", "esc")
            terminal.until_seen("Ask anything")
