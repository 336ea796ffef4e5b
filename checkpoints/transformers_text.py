"""The installed transformers, read as text: its import takes longer than a refusal may.

Its tables and classes are written in one form, which is looked for; of what has another one nothing is known.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmchat.core.files import read_text

_BOUNDLESS = (-float("inf"), float("inf"))


@dataclass(frozen=True, slots=True)
class Field:
    """annotation: of what types a value is; least, most: where there is a range; default: None for none or a call."""

    annotation: ast.expr
    least: float
    most: float
    default: Any


@cache
def text_of(name: str) -> str:
    """The text of a file of transformers; empty where it cannot be read."""
    found = find_spec("transformers")
    try:
        return read_text(Path(found.origin or "").parent / name) if found else ""
    except (OSError, ValueError):
        return ""


@cache
def classes_in(name: str) -> Mapping[str, ast.ClassDef]:
    """The classes of a file by name; {} where it cannot be read."""
    try:
        body = ast.parse(text_of(name)).body
    except SyntaxError:
        return {}
    return {part.name: part for part in body if isinstance(part, ast.ClassDef)}


@cache
def fields_of(kind: Any) -> Mapping[str, Field]:
    """What transformers' class of settings for a type says of each of them; {} for a type that has none."""
    fields: dict[str, Field] = {}
    for made in reversed(settings_classes(kind)):
        for line in made.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                fields[line.target.id] = _field(line)
    return fields


@cache
def settings_classes(kind: Any) -> tuple[ast.ClassDef, ...]:
    """A type's class of settings and those of its file that it is made from, itself first."""
    name = settings_class(kind) if isinstance(kind, str) else None
    if name is None:
        return ()
    module = module_of(kind)
    classes, found, names = classes_in(f"models/{module}/configuration_{module}.py"), [], [name]
    while names:
        made = classes.get(names.pop(0))
        if made is not None and made not in found:
            found.append(made)
            names += [base.id for base in made.bases if isinstance(base, ast.Name)]
    return tuple(found)


def _field(line: ast.AnnAssign) -> Field:
    least, most = _BOUNDLESS
    value = line.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Call):  # interval(min=0.0, max=1.0)(default=0.02)
        bounds = {word.arg: ast.literal_eval(word.value) for word in value.func.keywords}
        least, most = bounds.get("min", least), bounds.get("max", most)
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    try:
        default = ast.literal_eval(value) if value is not None else None
    except ValueError:
        default = None
    return Field(line.annotation, least, most, default)


def settings_class(kind: str) -> str | None:
    """The name of a type's class of settings."""
    return _classes().get(kind)


@cache
def _classes() -> Mapping[str, str]:
    return dict(re.findall(r'\("([\w.-]+)", "(\w+Config)"\)', text_of("models/auto/auto_mappings.py")))


@cache
def _modules() -> Mapping[str, str]:
    """Type -> the folder of its class, where that has another name."""
    return dict(re.findall(r'\("([\w.-]+)", "([a-z]\w*)"\)', text_of("models/auto/auto_mappings.py")))


@cache
def code_of(kind: str) -> str:
    """The text of a type's settings and of its network."""
    module = module_of(kind)
    return "".join(text_of(f"models/{module}/{part}_{module}.py") for part in ("configuration", "modeling"))


def module_of(kind: str) -> str:
    """The folder that a type's classes stand in."""
    return _modules().get(kind, kind.replace("-", "_"))
