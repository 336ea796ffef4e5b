"""What a run is asked for, whole: the base, the rows, the name of what it leaves, and the recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from glmchat.chat.launch import launch_source
from glmchat.chat.recipe import FLAGS, MODELS, Recipe, is_there, parse_data, wrong_value
from glmchat.core.engine_options import parse_quant
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.repetition import conditions_of
from glmchat.core.run_folder import Run, runs
from glmchat.core.shell import shell_word
from glmchat.core.text import one_line
from glmchat.hub import adapters, trained_models
from glmchat.hub.installed import Installed


def request_in_chat(words: str, base: str) -> dict[str, Any] | None:
    """What `/tune FILE … --epochs 3` asks for, by the flags of the command line; None where it names no data.

    Raises Usage for flags that are none, or that only the command line has, and what `request_of` raises.
    """
    if is_there(words.partition("#")[0]):
        return request_of(base, [words], None, None)
    try:
        parts = shlex.split(words)
    except ValueError:
        raise Usage(
            tr("a quote is not closed"), hint=tr("for example: {example}", example='/tune "my rows.csv" --epochs 5')
        ) from None
    data: list[str] = []
    given: dict[str, Any] = {field.name: [] if field.type == "list[str]" else None for field in fields(Recipe)}
    flags = {f"--{FLAGS[field.name]}": field for field in fields(Recipe)}
    name = None
    while parts:
        word = parts.pop(0)
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        if not flag.startswith("--"):
            data.append(word)
            continue
        if flag != "--as" and flag not in flags:
            hint = tr("it takes --as and {flags}", flags=", ".join(sorted(flags)))
            raise Usage(tr("/tune takes no {flag}", flag=one_line(flag, 40)), hint=hint, code="usage.flag")
        if flag in flags and flags[flag].type == "bool | None":
            given[flags[flag].name] = True
            continue
        if not equals:
            if not parts:
                raise Usage(tr("{flag} needs a value", flag=flag), hint=f"{flag} …", code="usage.value")
            value = parts.pop(0)
        if flag == "--as":
            name = value
        elif flags[flag].type == "list[str]":
            given[flags[flag].name].append(value)
        else:
            given[flags[flag].name] = _value(flag, value, str(flags[flag].type))
    is_flagged = any(word.startswith("--") for word in words.split())
    if not data or not (is_flagged or _means_data(data[0])):
        return None
    checked = Recipe(**given).checked()
    return request_of(base, data, name, checked.get("method")) | checked


def _means_data(word: str) -> bool:
    """A file, or what is written as one; else it may be the name of a run."""
    return is_there(word.partition("#")[0]) or (bool({*"./~"} & {*word}) and word not in [run.id for run in runs()])


def _value(flag: str, text: str, wanted: str) -> Any:
    """As the command line reads it. Raises Usage for what is no such number."""
    if flag == "--quant":
        return parse_quant(text, flag)
    try:
        return int(text) if wanted.startswith("int") else float(text) if wanted.startswith("float") else text
    except ValueError:
        raise wrong_value(flag, text, tr("a number")) from None


def request_of(base: str, data: Sequence[str], name: str | None, method: str | None) -> dict[str, Any]:
    """What is trained on what, and what it will be called, as it stands in recipe.json.

    Raises what makes a base, a file or a name no good.
    """
    row = None if method == "scratch" else launch_source(base)
    sources = [parse_data(one) for one in data]
    file, _, entry = sources[0].partition("#")
    if method in MODELS and row is not None:
        _refuse_packed(row)
    names = _names(method)
    if name is None:
        name = names.unused_name(adapters.suggested_name(Path(entry or file), None))
    _refuse_taken(name, method)
    if row is None:
        return {"base": base, "words": _words_of(base), "data": sources, "name": name}
    note: dict[str, Any] = {"name": row.name, "repo": row.repo, "revision": row.revision}
    note["files"] = {file.path: file.sha256 for file in row.files if file.sha256}
    return {"base": row.name, "folder": str(row.path), "base_note": note, "data": sources, "name": name}


def _words_of(text: str) -> str:
    """ "train:N", "train-bpe:N", or the folder that the words are taken from: of a model, or one that has just them."""
    if re.fullmatch(r"train(-bpe)?:\d{3,6}", text):
        return text
    folder = Path(user_path(text))
    if folder.is_dir():
        return str(folder.absolute())
    row = launch_source(text)
    if not row.path.is_dir():
        raise Usage(
            tr("{path} has no vocabulary", path=one_line(text, 200)),
            hint=tr("a folder with chinese_vocab.model, tokenizer.json or vocab.json and merges.txt; or train:8000"),
            code="tune.words",
        )
    return str(row.path)


def _names(method: str | None) -> ModuleType:
    """Where the name of what a method leaves has to be free."""
    return trained_models if method in MODELS else adapters


def _refuse_taken(name: str, method: str | None) -> None:
    if method in MODELS:
        trained_models.free_name(name)
    else:
        adapters.free_name(name, "--as")


def _refuse_packed(row: Installed) -> None:
    """Weights of a few bits do not learn, and a GGUF file has no folder's layout to be written in."""
    if row.quant == "none" and row.path.is_dir():
        return
    origin = row.base or row.repo
    raise Usage(
        tr("the weights of {name} are packed ({quant}), and packed weights do not learn", name=one_line(row.name, 80),
           quant="GGUF" if row.path.is_file() else row.quant),
        hint=tr("take the folder with float weights: glmchat tune {name} …", name=shell_word(origin))
        if origin and row.path.is_dir()
        else tr("take the folder with float weights that it was made from, or --method lora"),
        code="tune.packed",
    )  # fmt: skip


def request_again(run: Run, threads: int | None, name: str | None) -> dict[str, Any]:
    """What a run was asked for, to be compared with it at the end; with as many threads unless another number is told.

    Raises Usage for a name that is taken.
    """
    recipe = run.recipe()
    names = _names(recipe.get("method"))
    if name is None:
        name = names.unused_name(str(recipe.get("name") or run.id))
    _refuse_taken(name, recipe.get("method"))
    recipe["threads"] = threads or recipe.get("threads") or conditions_of(run).get("threads")
    return {**{key: value for key, value in recipe.items() if value is not None}, "name": name, "again": run.id}
