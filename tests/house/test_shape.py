"""The shape of the house in numbers: circles of imports, what the engine's core holds, files with one user."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "checkpoints", "hub", "engine", "tuning", "jobs", "serve", "chat", "tui", "cli")
# A person who reads these, and nothing else, knows how an answer is computed.
ENGINE_CORE = (
    *("engine", "generate", "sampling", "kv_cache", "text_stream", "loading", "families", "identity", "placement"),
    *("models/base", "models/layers", "models/prefix", "models/chatglm", "models/chatglm2", "models/llama"),
    "models/gpt2",
)
ENGINE_CORE_LINES = 3000
# Files that import each other nevertheless.
MEANT: tuple[frozenset[str], ...] = ()
SINGLE_USERS = 55  # each way to learn, and the folder it leaves, is a file that one other names
FRAGMENT = 39  # lines; a shorter file with one user belongs into its user


@cache
def modules() -> Mapping[str, Path]:
    """Dotted name -> file, of every product module; a package is its __init__."""
    files: dict[str, Path] = {}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            files[".".join(("glmchat", *(parts[:-1] if parts[-1] == "__init__" else parts)))] = path
    return files


@cache
def arrows() -> Mapping[str, frozenset[str]]:
    """Module -> modules it imports, wherever the import stands: one inside a function ties two files as well."""
    return {name: frozenset(_imported(name, path)) for name, path in modules().items()}


def _imported(name: str, path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [member if member in modules() else node.module for member in members]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (other for other in names if other in modules() and other != name)


def circles(ties: Mapping[str, frozenset[str]]) -> list[frozenset[str]]:
    """Strongly connected groups of more than one module (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[frozenset[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in ties[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = frozenset(stack[stack.index(name) :])
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(group)

    for name in ties:
        if name not in index:
            visit(name)
    return groups


def test_a_circle_is_found_wherever_one_enters_it() -> None:
    ties = {"a": "b", "b": "c", "c": "b", "d": "ae", "e": ""}
    assert circles({name: frozenset(others) for name, others in ties.items()}) == [frozenset("bc")]


def test_no_files_import_each_other_in_a_circle() -> None:
    unmeant = [sorted(group) for group in circles(arrows()) if group not in MEANT]
    assert not unmeant, "\n".join(map(str, unmeant))
    assert len(MEANT) <= 2


def test_the_core_of_the_engine_can_be_read_in_an_afternoon() -> None:
    lines = {name: len((ROOT / "engine" / f"{name}.py").read_text().splitlines()) for name in ENGINE_CORE}
    assert sum(lines.values()) < ENGINE_CORE_LINES, lines


def test_the_top_drawer_of_the_engine_holds_its_core_and_nothing_else() -> None:
    top = {path.stem for path in (ROOT / "engine").glob("*.py")} - {"__init__"}
    assert top == {name for name in ENGINE_CORE if "/" not in name}


def test_a_file_with_one_user_is_a_chapter_and_there_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    users: dict[str, set[str]] = defaultdict(set)
    for name, others in arrows().items():
        for other in others:
            users[other].add(name)
    single = sorted(name for name, path in modules().items() if len(users[name]) == 1 and path.name != "__init__.py")
    lines = {name: len(modules()[name].read_text(encoding="utf-8").splitlines()) for name in single}
    with capsys.disabled():
        print(f" {len(single)} of {len(modules())} files have one user ", end="")
    assert len(single) <= SINGLE_USERS, lines
    assert not {name: count for name, count in lines.items() if count < FRAGMENT}
