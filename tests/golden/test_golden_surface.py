"""What people and programs call by name: commands and options, keys, slash commands, error codes, the engine's face."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import typer
from golden_files import Golden

import glmchat
from glmchat.chat.commands.table import COMMANDS
from glmchat.cli.main import build
from glmchat.core import errors

PACKAGE = Path(glmchat.__file__).resolve().parent


# Commands


def parameter(one: Any) -> tuple[str, str]:
    """The names of an option, or an argument as help shows it, and what it takes in one line; not its help's words."""
    is_option = type(one).__name__ == "TyperOption"
    names = [*one.opts, *one.secondary_opts] if is_option else [one.metavar or one.name]
    told = [getattr(one.type_descriptor.annotation, "__name__", str(one.type_descriptor.annotation))]
    told += [word for word in ("required", "multiple", "is_flag", "hidden") if getattr(one, word, False)]
    told += [f"values={one.nargs}"] if one.nargs != 1 else []
    for fact in ("default", "min", "max", "metavar", "envvar"):
        value = getattr(one, fact, None)
        if isinstance(value, (bool, int, float, str)) and not (fact == "metavar" and not is_option):
            told.append(f"{fact}={value}")
    return ", ".join(names), " ".join(told)


def commands(command: Any, path: str = "glmchat") -> Iterator[tuple[str, dict[str, str]]]:
    """`glmchat pull` -> its parameters; a hidden command says so."""
    context = typer.Context(command)
    yield path + (" (hidden)" if command.hidden else ""), dict(parameter(one) for one in command.params)
    for name in command.list_commands(context) if hasattr(command, "list_commands") else ():
        yield from commands(command.get_command(context, name), f"{path} {name}")


def test_every_command_keeps_its_options(golden: Golden) -> None:
    golden("commands.json", dict(commands(typer.main.get_command(build()))))


# Keys and slash commands


def modules(room: str) -> Iterator[Any]:
    top = import_module(f"glmchat.{room}")
    for found in walk_packages(top.__path__, f"glmchat.{room}."):
        yield import_module(found.name)


def bindings(kind: type) -> dict[str, str]:
    """What a screen or widget of ours binds itself: key -> action, and how it is shown."""
    from textual.binding import Binding

    rows: dict[str, str] = {}
    for binding in Binding.make_bindings(vars(kind)["BINDINGS"]):
        facts = [binding.action, *(word for word in ("show", "priority") if getattr(binding, word))]
        facts += [f"id={binding.id}"] if binding.id else []
        rows[binding.key] = "; ".join([*([rows[binding.key]] if binding.key in rows else []), " ".join(facts)])
    return rows


def test_every_screen_and_widget_keeps_its_keys(golden: Golden) -> None:
    bound: dict[str, Any] = {}
    for module in modules("tui"):
        for name, kind in vars(module).items():
            if isinstance(kind, type) and kind.__module__.startswith("glmchat.") and vars(kind).get("BINDINGS"):
                bound[name] = bindings(kind)
    golden("keys.json", bound)


def test_the_window_keeps_its_slash_commands(golden: Golden) -> None:
    told = {c.name: {"argument": c.argument, "words": sorted(c.aliases), "key": c.key} for c in COMMANDS}
    golden("slash_commands.json", told)


# Error codes


def names_of_code(node: ast.expr) -> list[str]:
    """The codes that an expression can be: a constant, one of two, or a text with parts that are filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.IfExp):
        return [*names_of_code(node.body), *names_of_code(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(str(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values)]
    return []


def error_codes() -> Iterator[tuple[str, int]]:
    """Every (code, exit code) that is written where an error of the tree is made, and those the classes begin with."""
    kinds = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, errors.GlmchatError)}
    for kind in kinds.values():
        yield kind.default_code, kind.exit
    rooms = [folder for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()]
    for path in sorted(path for room in rooms for path in room.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if name in kinds:
                for word in node.keywords:
                    if word.arg == "code":
                        yield from ((code, kinds[name].exit) for code in names_of_code(word.value))


def test_every_error_code_keeps_its_exit_code(golden: Golden) -> None:
    found: dict[str, set[int]] = {}
    for code, number in error_codes():
        found.setdefault(code, set()).add(number)
    golden("error_codes.json", {code: ", ".join(map(str, sorted(numbers))) for code, numbers in found.items()})


# The engine's public face


def shape_of(owner: Any, name: str) -> Any:
    """The parameters of a function or method with their defaults and annotations; "property" for one."""
    found = inspect.getattr_static(owner, name, None) or getattr(owner, name)
    if isinstance(found, property):
        return "property"
    function = found.__func__ if isinstance(found, (classmethod, staticmethod)) else found
    return str(inspect.signature(function))


def test_the_engine_keeps_its_public_face(golden: Golden) -> None:
    import glmchat.engine as engine

    methods = (
        "load", "render", "render_open", "logits", "generate", "stream", "stream_ids", "loss", "attach", "activate",
        "detach", "memory", "facts", "close", "complete", "tokenize", "tokenizer",
    )  # fmt: skip
    face: dict[str, Any] = {f"Engine.{name}": shape_of(engine.Engine, name) for name in methods}
    face["load_tokenizer"] = shape_of(engine, "load_tokenizer")
    face["exported"] = sorted(engine.__all__)
    for kind in (engine.Sampling, engine.Chunk):
        assert is_dataclass(kind)
        face[kind.__name__] = {
            f.name: repr(f.default) if "MISSING" not in repr(f.default) else "" for f in fields(kind)
        }
    golden("engine_face.json", face)
