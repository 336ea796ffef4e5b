"""Files are opened in one place: core/files.py, which opens regular files alone, without waiting, up to a bound.

A library that opens by name is named here with the files that hand it a path; they are behind `require_plain_folder`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "checkpoints", "hub", "engine", "tuning", "jobs", "serve", "chat", "tui", "cli")
READER = "core/files.py"
# Names that open a file to read it, and who may use them beside the reader.
OPENERS = {
    "read_bytes": (),
    "read_text": ("core/language.py", "hub/catalogue.py"),  # what glmchat brings itself, by importlib.resources
    "O_RDONLY": (  # to bring a folder or a file of ours to the disk
        "hub/partial.py",
    ),
    "safe_open": ("engine/formats/weights.py", "engine/formats/compressed.py", "engine/formats/packed_cache.py",
                  "engine/adapters/files.py"),
    "from_file": ("engine/tokenizers/hf.py",),
    "from_pretrained": ("engine/models/transformers.py",),
    "ZipFile": ("hub/sources_pypi.py",),
    "copyfile": ("hub/store.py", "hub/pull.py", "hub/adapters.py", "engine/formats/folder_writer.py"),
}  # fmt: skip


def openers(tree: ast.AST) -> Iterator[str]:
    """The names by which a module opens files to read them; "open" for open() and path.open()."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in OPENERS:
            yield node.attr
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in OPENERS and function.id != "read_text":
            yield function.id
        is_builtin = isinstance(function, ast.Name) and function.id == "open"
        is_method = isinstance(function, ast.Attribute) and function.attr == "open"
        mode = node.args[1:2] if is_builtin else node.args[:1]
        reads = bool(mode) and isinstance(mode[0], ast.Constant) and str(mode[0].value).startswith("r")
        if (is_builtin and (reads or not mode)) or (is_method and (reads or not (node.args or node.keywords))):
            yield "open"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("open(p)", ["open"]),
        ("open(p, 'rb')", ["open"]),
        ("open(p, 'w')", []),
        ("p.open()", ["open"]),
        ("p.open('rb')", ["open"]),
        ("p.open('x', encoding='utf-8')", []),
        ("session.open(7)", []),
        ("p.read_text()", ["read_text"]),
        ("read_text(p)", []),
        ("os.open(p, os.O_RDONLY)", ["O_RDONLY"]),
        ("safe_open(p, framework='pt')", ["safe_open"]),
    ],
)
def test_every_way_to_open_a_file_is_seen(code: str, found: list[str]) -> None:
    assert list(openers(ast.parse(code))) == found


def test_nothing_but_the_one_reader_opens_a_file_to_read_it() -> None:
    wrong = []
    used = {name: set[str]() for name in OPENERS}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            for name in openers(ast.parse(path.read_text(encoding="utf-8"))):
                used.setdefault(name, set()).add(place)
                if place != READER and place not in OPENERS.get(name, ()):
                    wrong.append(f"{place}: {name}")
    assert not wrong, "use core/files.py: " + ", ".join(wrong)
    idle = {name: set(places) - used[name] for name, places in OPENERS.items() if set(places) - used[name]}
    assert not idle, f"these open nothing any more: {idle}"
