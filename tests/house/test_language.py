"""The interface is complete in both languages.

Covers core/language.py.
"""

from __future__ import annotations

import ast
import re
import string
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmchat.chat.commands.table import COMMANDS
from glmchat.cli.main import SENTENCES, run
from glmchat.core import language

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "checkpoints", "hub", "chat", "tui", "cli", "serve", "engine", "tuning", "jobs")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """`--lang` holds for the process: the next test begins without it."""
    yield
    language.choose(None)


def sentences() -> set[str]:
    """Every literal that the code hands to `tr`."""
    found = set()
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "tr" and node.args:
                    first = node.args[0]
                    if isinstance(first, ast.Constant) and isinstance(first.value, str):
                        found.add(first.value)
    return found


def chinese() -> dict[str, str]:
    return tomllib.loads((ROOT / "core" / "zh.toml").read_text(encoding="utf-8"))


def test_every_sentence_of_the_interface_has_a_chinese_one() -> None:
    arguments = {command.argument for command in COMMANDS if command.argument}
    missing = sorted((sentences() | set(SENTENCES) | arguments) - set(chinese()))
    assert not missing, "no Chinese for:\n" + "\n".join(missing)


def test_no_error_speaks_english_alone() -> None:
    """The message and the hint of every error that the code makes go through `tr`, commands and names aside."""
    kinds = {
        node.name
        for node in ast.parse((ROOT / "core" / "errors.py").read_text()).body
        if isinstance(node, ast.ClassDef)
    }
    bare = []
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in kinds:
                    said = [*node.args[:1], *(word.value for word in node.keywords if word.arg == "hint")]
                    bare += [f"{path.relative_to(ROOT)}: {words}" for part in said for words in _untranslated(part)]
    assert not bare, "\n".join(bare)


def _untranslated(node: ast.AST) -> Iterator[str]:
    """The English of an expression that no `tr` holds: two words beside each other, or one before a colon."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("tr", "join"):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        words = node.value
        if re.search(r"[A-Za-z]{2,} [a-z]{2,}|^[a-z]+(: | )$", words) and not words.startswith(("glmchat ", "/", "--")):
            yield words
    for child in ast.iter_child_nodes(node):
        yield from _untranslated(child)


def test_a_translation_has_the_fields_of_its_sentence() -> None:
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}

    for english, translated in chinese().items():
        assert fields(english) == fields(translated), english


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LC_ALL": "C", "GLMCHAT_LANG": "zh"}, "zh"),
        ({}, "en"),
    ],
)
def test_the_locale_chooses_the_language(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLMCHAT_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert language.language() == expected


@pytest.mark.parametrize(
    "line", ["--lang zh verify nobody", "verify --lang zh nobody", "verify nobody --lang=zh", "verify nobody --lang en"]
)
def test_the_language_may_be_chosen_anywhere_in_the_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert ("nobody" in (said := capsys.readouterr().err)) and said.isascii() is line.endswith("en")


@pytest.mark.parametrize(
    ("line", "english", "translated"),
    [
        (
            "puls",
            "No such command 'puls'. Did you mean 'pull', 'ps', 'ls'?",
            "没有命令 'puls'。您是不是要找 'pull', 'ps', 'ls'？",
        ),
        ("nosuch", "No such command 'nosuch'.", "没有命令 'nosuch'"),
        ("adapters nosuch", "No such command 'nosuch'.", "没有命令 'nosuch'"),
        ("show", "Missing argument 'NAME'.", "缺少参数 'NAME'"),
        ("show a b", "Got unexpected extra argument(s) (b)", "多余的参数：b"),
        ("lock --file", "No such option: --file", "没有选项 --file"),
        ("pull --keep=3 x", "Option '--keep' does not take a value.", "选项 '--keep' 不带值"),
        ("pull --quant", "Option '--quant' requires an argument.", "选项 '--quant' 需要一个值"),
        ("history show a", "Invalid value for 'ID': Input should be a valid integer", "'ID' 的值无效：应为整数"),
    ],
)
def test_a_wrong_command_line_is_answered_in_the_chosen_language(
    line: str, english: str, translated: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for code, said in (("en", english), ("zh", translated)):
        assert run(["--lang", code, *line.split()]) == 2
        assert capsys.readouterr().err.startswith(f"glmchat: {said}")


@pytest.mark.parametrize(
    ("line", "option"), [("-c", "-c"), ("--server=http://box", "--server"), ("--lang zh -c", "-c")]
)
def test_what_belongs_behind_run_is_told_so(line: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(line.split()) == 2
    assert f"glmchat run {option}\n" in capsys.readouterr().err


def test_behind_two_dashes_it_is_a_text_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "nobody", "--", "--lang", "zh"]) == 2
    assert capsys.readouterr().err.isascii()
