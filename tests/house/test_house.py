"""What ARCHITECTURE.md says about the house, asserted: who imports whom, what ships, what a start loads.

Covers cli/main.py, core/errors.py.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import typer

from glmchat.cli.main import COMMANDS, CommandTable
from glmchat.core import errors

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("core", "checkpoints", "hub", "engine", "tuning", "jobs", "serve", "chat", "tui", "cli")


def sources(room: str) -> Iterator[Path]:
    yield from (ROOT / room).rglob("*.py")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Every absolute import of a file as (dotted name, stands at the top). `if TYPE_CHECKING` counts as inside."""
    tree, found = tree_of(path), []
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append((alias.name, node not in inside))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            found.append((module, node not in inside))
            found += [(f"{module}.{alias.name}", node not in inside) for alias in node.names]
    return found


def allowed(room: str, column: str) -> tuple[set[str], set[str]]:
    """What a table of ARCHITECTURE.md lets a room import: at the top of a file, and there or inside a function."""
    header: list[str] = []
    for line in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if row[:1] == ["room"]:
            header = row
        elif row[:1] == [f"`{room}/`"] and column in header:
            top, inside = (
                set(re.findall(r"[\w.]+", row[header.index(name)])) for name in (column, "inside a function")
            )
            return top, top | inside
    raise AssertionError(f"ARCHITECTURE.md has no row for {room} with {column!r}")


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    top, anywhere = allowed(room, "may import")
    for path in sources(room):
        for name, at_top in imports(path):
            parts = name.split(".")
            if parts[0] == "glmchat" and len(parts) > 1 and parts[1] in ROOMS and parts[1] != room:
                assert parts[1] in (top if at_top else anywhere), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_the_libraries_of_its_row_and_no_other(room: str) -> None:
    top, anywhere = allowed(room, "third party")
    used = set()
    for path in sources(room):
        for name, at_top in imports(path):
            library = name.split(".")[0]
            if library != "glmchat" and library not in sys.stdlib_module_names:
                assert library in (top if at_top else anywhere), f"{path.relative_to(ROOT)} imports {name}"
                used.add(library)
    assert used == anywhere, "the row names a library that nothing imports"


def loaded_after(statement: str) -> set[str]:
    """Names of the top-level modules a fresh interpreter holds after one statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("group", ["cli.main", "cli.output"])
def test_the_command_line_starts_without_torch_textual_or_the_hub(group: str) -> None:
    assert not loaded_after(f"import glmchat.{group}") & {"torch", "textual", "huggingface_hub", "transformers"}


def test_building_every_command_loads_neither_torch_nor_textual_nor_the_hub() -> None:
    every = "from glmchat.cli.main import COMMANDS; [CommandTable().commands[name] for name in COMMANDS]"
    loaded = loaded_after(f"from glmchat.cli.main import CommandTable; {every}")
    assert not loaded & {"torch", "textual", "huggingface_hub", "transformers", "numpy"}


def test_the_help_lists_each_command_as_the_command_describes_itself() -> None:
    commands = CommandTable().commands
    for name, (_, summary) in COMMANDS.items():
        command = commands[name]
        assert command.name == name
        assert command.hidden is (summary == "")
        if summary:
            assert (command.help or "").strip().splitlines()[0] == summary


def test_every_file_of_commands_is_in_the_table() -> None:
    files = {path.stem for path in sources("cli") if "\ndef register(" in path.read_text(encoding="utf-8")}
    assert files == {file for file, _ in COMMANDS.values()}
    for file in files:
        app = typer.Typer()
        import_module(f"glmchat.cli.{file}").register(app)
        registered = set(typer.main.get_group(app).commands)
        assert registered == {name for name, (where, _) in COMMANDS.items() if where == file}


def test_the_window_starts_without_torch() -> None:
    assert not loaded_after("import glmchat.tui.app") & {"torch", "transformers", "huggingface_hub"}


def test_the_engine_starts_without_transformers() -> None:
    assert "transformers" not in loaded_after("import glmchat.engine")


def test_the_packages_of_pyproject_are_the_folders_with_code() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {"glmchat"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add("glmchat." + ".".join(init.parent.relative_to(ROOT).parts))
    assert listed == found
    for room in ROOMS:
        for path in sources(room):
            assert (path.parent / "__init__.py").exists(), f"{path.parent} ships only with an __init__.py"


def test_the_root_holds_no_stray_modules() -> None:
    assert {p.name for p in ROOT.glob("*.py")} - {"setup.py"} == {"__init__.py", "__main__.py"}


def test_only_the_output_module_prints() -> None:
    for room in ROOMS:
        for path in sources(room):
            if path == ROOT / "cli" / "output.py":
                continue
            calls = [
                node.lineno
                for node in ast.walk(tree_of(path))
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
            ]
            assert not calls, f"{path.relative_to(ROOT)} prints in line {calls[0]}"


def test_nothing_runs_code_from_a_checkpoint() -> None:
    for room in ROOMS:
        for path in sources(room):
            for node in ast.walk(tree_of(path)):
                if not isinstance(node, ast.Call):
                    continue
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert given.get("trust_remote_code", "False") == "False", where
                called = ast.unparse(node.func)
                if called != "get_completion_script":  # there it is the name of a shell
                    assert given.get("shell", "False") == "False", where
                assert called not in ("pickle.load", "pickle.loads", "eval", "exec"), where
                if called == "torch.load":
                    assert given.get("weights_only") == "True", where


def test_every_child_that_is_python_is_kept_from_the_folder_one_stands_in() -> None:
    """`python -m X` puts the current folder first on sys.path, unless `-P` says no."""
    children = 0
    for room in ROOMS:
        for path in sources(room):
            for node in ast.walk(tree_of(path)):
                if not isinstance(node, ast.List | ast.Tuple):
                    continue
                words = [ast.unparse(word) for word in node.elts]
                if words[:1] == ["sys.executable"]:
                    assert words[1:2] == ["'-P'"], f"{path.relative_to(ROOT)}:{node.lineno}"
                    children += 1
    assert children


def test_every_error_code_has_one_class_and_so_one_exit_code() -> None:
    kinds = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.GlmchatError)}
    classes: dict[str, dict[str, str]] = {}  # code -> class -> where
    for path in (path for room in ROOMS for path in sources(room)):
        for node in ast.walk(tree_of(path)):
            name = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
            if isinstance(node, ast.Call) and name in kinds:
                given = next((word.value for word in node.keywords if word.arg == "code"), None)
                choices = [given.body, given.orelse] if isinstance(given, ast.IfExp) else [given]
                codes = [c.value for c in choices if isinstance(c, ast.Constant)]
                codes += [kinds[name].default_code] if given is None else []
                for code in codes:
                    classes.setdefault(str(code), {})[name] = f"{path.relative_to(ROOT)}:{node.lineno}"
    assert len(classes) > 200
    assert {code: where for code, where in classes.items() if len(where) > 1} == {}


def test_every_test_file_asserts_something() -> None:
    """In its own lines, or in those of a helper beside it (`from kills import live_and_die`)."""

    def asserts(path: Path) -> bool:
        text = path.read_text(encoding="utf-8")
        if "assert" in text or "pytest.raises" in text or "snap_compare" in text:
            return True
        helpers = [path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
        return any(asserts(helper) for helper in helpers if helper.exists())

    for path in (ROOT / "tests").rglob("test_*.py"):
        assert asserts(path), path
