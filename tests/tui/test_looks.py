"""Where things stand in the window and how they are drawn, in a pseudo-terminal at four sizes.

Covers tui/screens/chat.py, tui/widgets/actions.py, tui/widgets/sidebar.py, tui/transcript/turns.py,
tui/widgets/suggestions.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fakes import model_in
from rich.cells import cell_len
from screen import TerminalSession

from glmchat.chat.history.history import History
from glmchat.tui.theme import PALETTES
from glmchat.tui.widgets.actions import hint_line, key_rows

SIZES = ((40, 12), (80, 24), (120, 36), (200, 60))
SLOW = {"pieces": [f"word{n} " for n in range(2000)], "seconds_per_token": 0.05}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return model_in(tmp_path / "model")


def hints(terminal: TerminalSession) -> str:
    """The lower border of the prompt, or of a dialog before it; that of the list at the left begins its row."""
    return next((line for line in reversed(terminal.lines) if "╰" in line[1:]), "")


@pytest.mark.parametrize("theme", ["dark", "light"])
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_title_question_answer_and_prompt_stand_in_one_column_and_a_question_takes_one_row(
    model: Path, theme: str, columns: int, rows: int
) -> None:
    settings = {"GLMCHAT_THEME": theme}
    with TerminalSession("run", model, columns=columns, rows=rows, environ=settings) as terminal:
        terminal.until_ready()
        terminal.say("hello there")
        terminal.until_seen("one two")
        terminal.until_still()
        left = terminal.lines[terminal.row_of("▌ hello there")].index("▌")
        assert terminal.lines[terminal.row_of("● model")].index("●") == left
        assert terminal.lines[terminal.row_of("╭")].index("╭") == left - 1
        if rows >= 16:
            assert terminal.lines[0].index("hello there") == left
        question = terminal.row_of("▌ hello there")
        assert not terminal.lines[question - 1].strip(" ▇▄▅▆▃▂▁█") or question == 1
        assert not any("▀" in line for line in terminal.lines) and "●" in terminal.lines[question + 2]
        behind = terminal.backgrounds(question)
        assert behind[left + 5] != terminal.backgrounds(question + 2)[left + 5]


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_what_a_command_says_stands_above_the_prompt_and_is_one_row_after_the_next_question(
    model: Path, columns: int, rows: int
) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows) as terminal:
        terminal.until_ready()
        terminal.say("first")
        terminal.until_seen("one two")
        terminal.say("/set temp 0.2")
        terminal.until_seen("temperature is 0.2", "/reset temperature")
        terminal.until_still()
        assert terminal.row_of("╭") - terminal.row_of("/reset temperature") <= 3
        terminal.say("second")
        terminal.until(lambda: "/reset temperature" not in terminal.text)
        if rows > 12:
            terminal.until(lambda: any("temperature is 0.2" in line and "…" in line for line in terminal.lines))


@pytest.mark.parametrize(("columns", "rows"), SIZES)
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_keys_that_exist_now_stand_in_the_border_of_the_prompt(
    model: Path, lang: str, columns: int, rows: int
) -> None:
    stop, empty, stopped = {
        "en": ("Esc stop", "Ctrl+P palette", "resume"), "zh": ("Esc 停止", "Ctrl+P 命令面板", "已停止")
    }[lang]  # fmt: skip
    with TerminalSession("--lang", lang, "run", model, columns=columns, rows=rows, behaviour=SLOW) as terminal:
        terminal.until(lambda: empty in hints(terminal))
        assert cell_len(hints(terminal)) <= columns and hints(terminal).endswith("╯")
        terminal.type("/re")
        terminal.until(lambda: "Tab" in hints(terminal))
        terminal.press("esc", "ctrl+c")
        terminal.until(lambda: empty in hints(terminal))
        terminal.say("go on")
        terminal.until(lambda: stop in hints(terminal))
        terminal.until_seen("word0")  # one that had not begun is not stopped in the middle
        terminal.press("ctrl+up")
        terminal.until(lambda: "Ctrl+↑ ↓" in hints(terminal))
        terminal.press("esc")  # stops the answer; the next one leaves the turn
        terminal.until(lambda: stopped in terminal.text)
        terminal.press("esc")
        terminal.until(lambda: empty in hints(terminal))
        assert cell_len(hints(terminal)) <= columns


def test_the_keys_can_be_turned_off(model: Path) -> None:
    with TerminalSession("run", model, environ={"GLMCHAT_HINTS": "false"}) as terminal:
        terminal.until_ready()
        terminal.type("words")
        terminal.until_seen("words")
        terminal.until_still()
        assert set(hints(terminal).strip()) == set("╰─╯")


@pytest.mark.parametrize(
    ("lang", "words"), [("en", "r rename · p pin · d delete"), ("zh", "r 重命名 · p 置顶 · d 删除")]
)
def test_the_keys_of_the_conversations_take_no_row_of_their_own(model: Path, lang: str, words: str) -> None:
    with History.default() as history:
        history.append(history.new(), "user", "alpha question")
    with TerminalSession("run", model, columns=120, environ={"GLMCHAT_LANG": lang}) as terminal:
        terminal.until_seen("Ctrl+B", "alpha question")
        terminal.press("ctrl+b")
        terminal.until_seen(words, "alpha question")
        assert terminal.lines[-1].startswith("╰") and words in terminal.lines[-1]


@pytest.mark.parametrize("width", range(0, 60, 7))
def test_no_hint_is_cut_in_half(width: int) -> None:
    keys = [("Ctrl+P", "命令面板"), ("F1", "帮助"), ("Ctrl+B", "对话")]
    line = hint_line(keys, width, PALETTES["dark"])
    assert line.cell_len <= width
    assert line.plain in ["  ".join(" ".join(key) for key in keys[:count]) for count in range(4)]


def test_from_130_columns_on_the_conversations_stand_beside_until_they_are_closed(model: Path) -> None:
    with History.default() as history:
        history.append(history.new(), "user", "alpha question")
    with TerminalSession("run", model, columns=140, rows=30) as terminal:
        terminal.until(lambda: any("alpha" in line[:36] for line in terminal.lines))
        terminal.type("typed")  # the prompt has the focus
        terminal.until_seen("│ typed")
        terminal.press("esc", "esc")
        terminal.resize(100, 30)
        terminal.until(lambda: "╭─ Conversations" not in terminal.text)
        terminal.resize(140, 30)
        terminal.until(lambda: any("alpha" in line[:36] for line in terminal.lines))
        terminal.press("ctrl+b")
        terminal.until(lambda: "Enter open" in hints(terminal))
        terminal.press("ctrl+b")
        terminal.until(lambda: "╭─ Conversations" not in terminal.text)


@pytest.mark.parametrize("environ", [{}, {"GLMCHAT_THEME": "light"}, {"TERM": "screen", "COLORTERM": ""}])
@pytest.mark.parametrize(("columns", "rows"), [(40, 12), (80, 24)])
def test_behind_a_dialog_no_frame_stands_out_and_all_is_dimmed(
    model: Path, environ: dict[str, str], columns: int, rows: int
) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows, environ=environ) as terminal:
        terminal.until_ready()
        terminal.until(lambda: "Ctrl+P" in hints(terminal) and terminal.lines[-1].endswith("B"))  # the memory
        terminal.until_still()
        before = terminal.screen.buffer[rows - 1][2].fg
        for key in ("ctrl+p", "f2", "f1"):
            terminal.press(key)
            terminal.until(lambda: terminal.text.count("╭") == terminal.text.count("╰") == 1)
            terminal.until(lambda: not terminal.lines[-1].strip() or "╰" in terminal.lines[-1] or
                           terminal.screen.buffer[rows - 1][2].fg != before or "TERM" in environ)  # fmt: skip
            terminal.press("esc")
            terminal.until(lambda: "Ctrl+P" in hints(terminal))
            terminal.until(lambda: terminal.screen.buffer[rows - 1][2].fg == before)


@pytest.mark.parametrize(("lang", "columns", "rows"), [("en", 40, 12), ("zh", 40, 12)])
def test_where_rows_are_few_keys_take_one(model: Path, lang: str, columns: int, rows: int) -> None:
    with TerminalSession("--lang", lang, "run", model, columns=columns, rows=rows) as terminal:
        terminal.until(lambda: "Ctrl+P" in hints(terminal))
        for key, least in (("f4", 4), ("f7", 1), ("f2", 8)):
            terminal.press(key)
            terminal.until(lambda: " · … ─╯" in hints(terminal))
            foot = next(n for n in range(rows - 1, -1, -1) if "· … ─╯" in terminal.lines[n])
            assert foot - terminal.row_of("╭─") > least
            terminal.press("esc")
            terminal.until(lambda: "Ctrl+P" in hints(terminal))
        terminal.press("ctrl+b")
        terminal.until(lambda: " · … ─╯" in terminal.lines[-1])
        assert terminal.lines[0].startswith("╭─") and cell_len(terminal.lines[0]) == columns
        terminal.press("esc")
        terminal.until(lambda: "Ctrl+P" in hints(terminal))
        terminal.say("hello")
        terminal.until_seen("one two")
        terminal.press("ctrl+up")
        terminal.until(lambda: any(line.rstrip().endswith(" …") for line in terminal.lines))
        acts = next(n for n, line in enumerate(terminal.lines) if line.rstrip().endswith(" …"))
        assert acts == terminal.row_of("╭") - 1 and "one two" in terminal.text


@pytest.mark.parametrize(
    ("lang", "columns", "pairs"),
    [
        ("en", 60, ("r rename", "p pin", "o one-shots", "y copy", "e edit", "q quote")),
        ("en", 80, ("r rename", "p pin", "o one-shots", "y copy", "e edit", "q quote")),
        ("zh", 80, ("r 重命名", "p 置顶", "d 删除", "o 单次问答", "y 复制", "e 编辑", "q 引用")),
    ],
)
def test_the_help_breaks_no_line_between_a_key_and_what_it_does(
    model: Path, lang: str, columns: int, pairs: tuple[str, ...]
) -> None:
    with TerminalSession("--lang", lang, "run", model, columns=columns, rows=60) as terminal:
        terminal.until(lambda: "Ctrl+P" in hints(terminal))
        terminal.press("f1")
        terminal.until(lambda: all(any(pair in line for line in terminal.lines) for pair in pairs))


@pytest.mark.parametrize(
    "words",
    [
        "Enter uses only this · Space adds or removes it · o none · Esc closes",
        "其中 Enter 打开，r 重命名，p 置顶，d 删除；o 单次问答、/ 搜索 · Esc 关闭",
    ],
)
@pytest.mark.parametrize("width", [*range(24, 60), 200])
def test_keys_and_their_words_stay_together_in_rows_that_fit(words: str, width: int) -> None:
    found = key_rows(words, width, whole=width)
    assert "".join(found).replace(" ", "") == words.replace(" ", "")
    assert all(cell_len(row) <= width for row in found)
    parts = [part.strip() for part in re.split(r"(?<=[·，；、])", words)]
    assert all(any(part in row for row in found) for part in parts if cell_len(part) <= width)
    if max(map(cell_len, parts)) <= width:
        assert all(row[-1] in "·，；、" for row in found[:-1])  # each ends where a key and its word end


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_the_palette_has_its_foot_on_the_screen(model: Path, columns: int, rows: int) -> None:
    with TerminalSession("run", model, columns=columns, rows=rows) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+p")
        terminal.until(lambda: any("Esc closes ─╯" in line for line in terminal.lines))


def test_the_speed_leaves_a_narrow_status_line_first(model: Path) -> None:
    with TerminalSession("run", model, columns=110) as terminal:
        terminal.until_ready()
        terminal.say("hello")
        terminal.until(lambda: "tok/s" in terminal.lines[-1] and "B" in terminal.lines[-1].split("·")[-1])
        for columns in range(106, 30, -4):
            terminal.resize(columns, 30)
            terminal.until_still(0.3)
            line = terminal.lines[-1]
            if "tok/s" not in line:
                assert "/4,096" in line and "MB" in line and "first token" not in line
                return
        raise AssertionError("it never left")


def test_the_chosen_suggestion_has_a_row_of_its_own_colour(model: Path) -> None:
    with TerminalSession("run", model) as terminal:
        terminal.until_ready()
        terminal.type("/re")
        terminal.until_seen("▸ /regen")
        terminal.until_still()
        row = terminal.row_of("▸ /regen")
        chosen, usual = terminal.backgrounds(row)[5:90], terminal.backgrounds(row + 1)[5:90]
        assert all(one != two for one, two in zip(chosen, usual, strict=True))


def test_a_title_that_does_not_fit_at_the_start_ends_with_an_ellipsis(model: Path) -> None:
    with History.default() as history:
        history.append(history.new(), "user", "a question of words that are many and 很长的词 and more of them")
    with TerminalSession("run", model, columns=60) as terminal:
        terminal.until_ready()
        terminal.until(lambda: re.search(r"1 +a question of words .*…  +\d\d:\d\d", terminal.text))


def looks(terminal: TerminalSession, words: str) -> set[tuple[str, str, bool]]:
    """Colours of the first cells of a row, from these words on."""
    at = terminal.row_of(words)
    start = terminal.lines[at].index(words)
    cells = (terminal.screen.buffer[at][x] for x in range(start, start + 28))
    return {(cell.fg, cell.bg, cell.reverse) for cell in cells}


@pytest.mark.parametrize("environ", [{"GLMCHAT_THEME": "ansi"}, {"NO_COLOR": "1"}])
def test_where_a_theme_has_no_grounds_the_chosen_row_is_of_one_colour(model: Path, environ: dict[str, str]) -> None:
    with History.default() as history:
        tree = history.new()
        history.append(tree, "user", "alpha question")
        history.pin(tree, True)  # its sign has a colour of its own
    with TerminalSession("run", model, environ=environ) as terminal:
        terminal.until_ready()
        terminal.press("ctrl+b")
        terminal.until(lambda: any("▸ ★ alpha" in line for line in terminal.lines))
        assert looks(terminal, "▸ ★ alpha") == {("default", "default", True)}
        terminal.press("esc")
        terminal.until(lambda: "★" not in terminal.text)
        terminal.type("/c")
        terminal.until(lambda: any("▸ /c" in line for line in terminal.lines))
        assert looks(terminal, "▸ /c") == {("default", "default", True)}
        terminal.press("ctrl+p")
        terminal.until(lambda: "╭─ Palette" in terminal.text)
        terminal.type("gruv")
        terminal.until(lambda: any("▸ gruvbox" in line for line in terminal.lines))
        assert looks(terminal, "▸ gruvbox") == {("default", "default", True)}
