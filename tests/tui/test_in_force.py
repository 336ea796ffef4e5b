"""What is in force, where a person sees it: marks in the status line, the panel of F9, the table of /context.

Covers tui/screens/help.py.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import pytest
from fakes import model_in
from screen import TerminalSession

WORDS = {
    "en": ("Ask anything", "system prompt", "precise", "turns not sent", "In force", "draft", "room for the answer"),
    "zh": ("输入 /", "系统提示词", "精确", "轮未发送", "当前设置", "草稿", "留给回答的空间"),
}
ADAPTERS = {"en": "none: just the model", "zh": "仅模型本身"}


def is_said(terminal: TerminalSession, word: str) -> bool:
    return terminal.text.count(word) >= 4  # twice in the question, twice in its echo


@pytest.mark.parametrize(
    ("lang", "heads", "built_in", "flag", "own"),
    [
        ("en", ("setting", "value", "from"), "built in", "command line", "you"),
        ("zh", ("设置", "值", "来源"), "内置", "命令行", "您"),
    ],
)
def test_where_a_setting_comes_from_is_said_in_the_words_of_the_window(
    tmp_path: Path, lang: str, heads: tuple[str, ...], built_in: str, flag: str, own: str
) -> None:
    model = model_in(tmp_path / "model")
    with TerminalSession("--lang", lang, "run", model, "--top-k", 7, columns=80, rows=24) as terminal:
        terminal.until(lambda: "Ctrl+P" in terminal.text)
        terminal.until_still()
        terminal.press("f2")
        terminal.until_seen(built_in, *heads)
        assert terminal.lines[terminal.row_of("top k")].split()[-2] == flag.split()[-1]
        assert not any(word in terminal.text for word in ("default", "flag", "/set"))
        terminal.type("0.3")
        terminal.press("enter")
        terminal.until(lambda: own in terminal.lines[terminal.row_of("temperature")])


def test_what_a_command_takes_is_chinese_in_a_chinese_window(tmp_path: Path) -> None:
    model = model_in(tmp_path / "model")
    with TerminalSession("--lang", "zh", "run", model, columns=100, rows=110) as terminal:
        terminal.until(lambda: "Ctrl+P" in terminal.text)
        terminal.press("f1")
        terminal.until_seen("/save 标题", "/model [名称]", "/export", "/quit")
        english = [line for line in terminal.lines if re.search(r" /\w+ [^ ]*[A-Z]{3}", line)]
        assert not english
        terminal.press("esc")
        terminal.until(lambda: "/quit" not in terminal.text)
        terminal.type("/sav")
        terminal.until_seen("▸ /save 标题")


@pytest.mark.parametrize(("lang", "columns", "rows"), [("en", 80, 24), ("zh", 120, 36)])
def test_what_is_not_the_default_is_in_the_status_line_and_all_of_it_on_f9(
    tmp_path: Path, lang: str, columns: int, rows: int
) -> None:
    ready, system, preset, unsent, in_force, draft, room = WORDS[lang]
    model = model_in(tmp_path / "model")
    behaviour = {"echo": True, "context": 200}
    with TerminalSession("--lang", lang, "run", model, columns=columns, rows=rows, behaviour=behaviour) as terminal:
        terminal.until_seen(ready)
        for word in ("alpha", "bravo", "charlie"):
            terminal.say(f"a long question of {word}, with words that fill the context, and then again {word}")
            terminal.until(partial(is_said, terminal, word))
            terminal.until_still()
        terminal.until(lambda: unsent in terminal.lines[-1])
        assert system not in terminal.lines[-1]
        terminal.say("/system Be kind.")
        terminal.until(lambda: system in terminal.lines[-1])
        terminal.say("/preset precise")
        terminal.until(lambda: preset in terminal.lines[-1])
        terminal.type("half a sentence")
        terminal.press("f9")
        terminal.until_seen(in_force, "Be kind.", "temperature 0.2", draft, room)
        terminal.press("f7")
        terminal.until(lambda: in_force not in terminal.text and ADAPTERS[lang] in terminal.text)
        terminal.press("esc")
        terminal.until(lambda: ADAPTERS[lang] not in terminal.text)
        terminal.press("f9")
        terminal.until_seen(in_force)
        terminal.press("f9")
        terminal.until(lambda: in_force not in terminal.text and "half a sentence" in terminal.text)
        terminal.press("ctrl+c")
        terminal.until(lambda: "half a sentence" not in terminal.text)
        terminal.say("/context")
        terminal.until_seen(draft, room)
