"""What a run of tuning is asked for, checked as far as that takes neither torch nor a look into the rows."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from glmchat.chat.launch import launch_source
from glmchat.core.engine_options import parse_quant
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.repetition import conditions_of
from glmchat.core.run_folder import Run
from glmchat.core.text import number_text, one_line
from glmchat.hub import adapters, trained_models
from glmchat.hub.installed import Installed

# original -> the method that it trains by
LIKE = {"lora-guide": "lora", "ptuning": "prefix", "ptuning-chat": "prefix", "chatglm2-ptuning": "prefix",
        "chatglm3": "lora", "chatglm-tuning": "lora", "cpm": "scratch"}  # fmt: skip
METHODS = ("lora", "prefix", "prompt", "dpo", "full", "scratch")
MODELS = ("full", "scratch")  # what these leave is a model, not an adapter
LOSSES = ("sigmoid", "ipo")
ON = ("answers", "last", "all", "text")
DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "bfloat16", "float16")
OUTPUTS = ("peft", "pt")
OVER_LENGTH = ("refuse", "cut-question", "cut-answer", "split", "drop")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")
# field -> the methods that know it; what is not here belongs to all
_ONLY = {
    **dict.fromkeys(("rank", "alpha", "targets", "rslora", "dora", "output"), ("lora", "dpo")),
    "dropout": ("lora", "dpo", "prefix"),
    "quant": ("lora", "dpo", "prefix", "prompt"),
    "prefix_length": ("prefix", "prompt"),
    "prefix_projection": ("prefix",),
    **dict.fromkeys(("last_layers", "optimiser_dtype"), MODELS),
    "config": ("scratch",),
    "stride": ("lora", "prefix", "prompt", *MODELS),
    "like": ("lora", "prefix", *MODELS),
    "on": ("lora", "prefix", "prompt", "full"),
    **dict.fromkeys(("beta", "loss"), ("dpo",)),
}
# field -> lowest, highest
_RANGES = {
    "max_length": (2, 1 << 20), "stride": (1, 1 << 20), "rank": (1, 4096), "alpha": (1e-6, 1e6), "dropout": (0, 0.95),
    "prefix_length": (1, 8192), "beta": (1e-4, 1e3), "last_layers": (1, 10_000), "lr": (1e-12, 10),
    "epochs": (1, 10_000), "steps": (1, 10**7), "minutes": (0.01, 10**6), "tokens_per_step": (1, 10**9),
    "save_every": (1, 10**9), "row_tokens": (1, 10**9), "threads": (1, 1024), "seed": (0, 2**63 - 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """None: not asked for, so that what --like says, or the default, holds."""

    like: str | None
    method: str | None
    on: str | None
    system: str | None
    eval: str | None
    mix: list[str]
    columns: str | None
    max_length: int | None
    stride: int | None
    over_length: str | None
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: str | None
    rslora: bool | None
    dora: bool | None
    prefix_length: int | None
    prefix_projection: bool | None
    beta: float | None
    loss: str | None
    output: str | None
    config: str | None
    last_layers: int | None
    optimiser_dtype: str | None
    lr: float | None
    epochs: int | None
    steps: int | None
    minutes: float | None
    tokens_per_step: int | None
    save_every: int | None
    row_tokens: int | None
    checkpointing: str | None
    quant: int | None
    dtype: str | None
    device: str | None
    threads: int | None
    samples: list[str]
    seed: int | None

    def given(self) -> dict[str, Any]:
        """What was asked for, by the names of the flags."""
        return {_FLAGS[name]: value for name, value in asdict(self).items() if value not in (None, [])}

    def checked(self) -> dict[str, Any]:
        """As it stands in recipe.json, paths absolute. Raises Usage with what is wanted instead."""
        for field, flag, words in (
            ("like", "--like", tuple(LIKE)),
            ("method", "--method", METHODS),
            ("on", "--on", ON),
            ("loss", "--loss", LOSSES),
            ("over_length", "--over-length", OVER_LENGTH),
            ("output", "--output", OUTPUTS),
            ("checkpointing", "--checkpointing", ("auto", "on", "off")),
            ("dtype", "--dtype", DTYPES),
            ("device", "--device", DEVICES),
            ("optimiser_dtype", "--optimiser-dtype", DTYPES[:2]),
        ):
            if (value := getattr(self, field)) is not None and value not in words:
                raise _wrong(flag, value, ", ".join(words))
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                flag = f"--{field.replace('_', '-')}"
                raise _wrong(
                    flag, number_text(value), tr("from {low} to {high}", low=number_text(low), high=number_text(high))
                )
        if self.targets == "":
            raise _wrong("--targets", "", tr("names of layers, a regular expression, or all-linear"))
        method = self._method()
        lengths = [f"--{name}" for name in ("epochs", "steps", "minutes") if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise Usage(
                tr("{one} and {other} conflict", one=lengths[0], other=lengths[1]),
                hint=tr("give one of them"),
                code="usage.contradiction",
            )
        if self.output == "pt" and self.dora:
            raise Usage(
                tr("--output pt holds the two matrices of a LoRA, and nothing else"),
                hint=tr("leave out --output: a PEFT folder holds everything"),
                code="usage.contradiction",
            )
        recipe = {name: value for name, value in asdict(self).items() if value not in (None, [])}
        if method != METHODS[0]:
            recipe["method"] = method
        if self.eval is not None:
            share = _share(self.eval, "--eval", most=90)
            recipe["eval"] = parse_data(self.eval) if share is None else self.eval.strip()
        if self.config is not None:
            recipe["config"] = parse_data(self.config)
        elif method == "scratch":
            raise Usage(
                tr("--method scratch needs --config"),
                hint=tr("a config.json of GPT-2: n_layer, n_head, n_embd, n_positions"),
                code="tune.config",
            )
        if self.mix:
            recipe["mix"] = [_mix(one) for one in self.mix]
        if self.columns is not None:
            recipe["columns"] = _columns(self.columns)
        return recipe

    def _method(self) -> str:
        """What was asked for, or what --like does. Raises Usage for what the method does not know."""
        likes = LIKE.get(self.like or "")
        method = self.method or likes or METHODS[0]
        goes_on = likes == "scratch" and method == "full"  # with a model that was made so
        if likes is not None and method != likes and not goes_on:
            raise Usage(
                tr("--like {like} and --method {method} conflict", like=self.like, method=method),
                hint=tr("leave out --method: this original trains by {method}", method=likes),
                code="usage.contradiction",
            )
        for field, methods in _ONLY.items():
            if getattr(self, field) is not None and method not in methods:
                raise Usage(
                    tr("{flag} does not go with --method {method}", flag=f"--{field.replace('_', '-')}", method=method),
                    hint=tr("it belongs to --method {methods}", methods="|".join(methods)),
                    code="usage.contradiction",
                )
        if self.stride is not None and self.over_length not in (None, "split"):
            raise Usage(
                tr("{one} and {other} conflict", one="--stride", other=f"--over-length {self.over_length}"),
                hint=tr("windows are what --over-length split makes of a long text"),
                code="usage.contradiction",
            )
        if method == "dpo" and self.over_length == "split":
            raise _wrong("--over-length", "split", tr("of pairs: refuse, cut-question, cut-answer or drop"))
        return method


def request_in_chat(words: str, base: str) -> dict[str, Any] | None:
    """What `/tune FILE … --epochs 3` asks for, by the flags of the command line; None where it names no data.

    Raises Usage for flags that are none, or that only the command line has, and what `request_of` raises.
    """
    if _there(words.partition("#")[0]):
        return request_of(base, [words], None, None)
    try:
        parts = shlex.split(words)
    except ValueError:
        raise Usage(
            tr("a quote is not closed"), hint=tr("for example: {example}", example='/tune "my rows.csv" --epochs 5')
        ) from None
    data: list[str] = []
    given: dict[str, Any] = {field.name: [] if field.type == "list[str]" else None for field in fields(Recipe)}
    flags = {f"--{_FLAGS[field.name]}": field for field in fields(Recipe)}
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
    if not data or (not any(word.startswith("--") for word in words.split()) and not _there(data[0].partition("#")[0])):
        return None
    checked = Recipe(**given).checked()
    return request_of(base, data, name, checked.get("method")) | checked


def _value(flag: str, text: str, wanted: str) -> Any:
    """As the command line reads it. Raises Usage for what is no such number."""
    if flag == "--quant":
        return parse_quant(text, flag)
    try:
        return int(text) if wanted.startswith("int") else float(text) if wanted.startswith("float") else text
    except ValueError:
        raise _wrong(flag, text, tr("a number")) from None


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
    """ "train:N", or the folder that the words are taken from: of a model by its name, or one that has just them."""
    if re.fullmatch(r"train:\d{3,6}", text):
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
        hint=tr("take the folder with float weights: glmchat tune {name} …", name=one_line(origin, 80))
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


def parse_data(text: str) -> str:
    """A file or a folder of rows, absolute; `FILE#name` names an entry of a dataset_info.json. Raises Usage."""
    path, mark, entry = (text, "", "") if _there(text) else text.partition("#")
    if not path or not _there(path):  # of "" a path is the folder one stands in
        raise Usage(
            tr("{path} is not here", path=one_line(text, 200) or "''"),
            hint=tr("DATA is a file of rows, a folder of .txt, or dataset_info.json#name"),
            code="tune.no_data",
        )
    return f"{user_path(path)}{mark}{entry}"


def _there(text: str) -> bool:
    try:
        return Path(user_path(text)).exists()
    except OSError:
        return False


def _share(text: str, flag: str, *, most: float) -> float | None:
    """ "5%" -> 0.05; None for what is no share. Raises Usage for one out of range."""
    if (match := _SHARE.fullmatch(text.strip())) is None:
        return None
    if not 0 < (percent := float(match[1])) <= most:
        raise _wrong(flag, text, tr("from {low} to {high}", low="0.1%", high=f"{number_text(most)}%"))
    return percent / 100


def _mix(text: str) -> str:
    """FILE:20%, the file absolute."""
    path, colon, share = text.rpartition(":")
    if not colon or _share(share, "--mix", most=95) is None:
        raise _wrong("--mix", text, tr("FILE:20%, the share of all rows"))
    return f"{parse_data(path)}:{share}"


def _columns(text: str) -> dict[str, str]:
    """prompt=A,answer=B -> what -> column."""
    chosen: dict[str, str] = {}
    for pair in text.split(","):
        what, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or not what:
            raise _wrong("--columns", pair, "--columns prompt=A,answer=B")
        chosen[what] = column
    return chosen


def _wrong(flag: str, value: str, wanted: str) -> Usage:
    return Usage(
        tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(value, 60))), hint=wanted, code="usage.value"
    )


def command_of(base: str, data: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """The line that asks for a run again. recipe: as it stands in recipe.json, or a part of it."""
    words = ["glmchat", "tune", base, *data]
    for name, value in recipe.items():
        if name not in _FLAGS or value in (None, False, [], {}):
            continue
        flag = f"--{_FLAGS[name]}"
        if value is True:
            words.append(flag)
            continue
        several = value if isinstance(value, list) else [value]
        for one in [",".join(f"{k}={v}" for k, v in value.items())] if isinstance(value, dict) else several:
            words += [flag, f"{one:.15g}" if isinstance(one, float) else str(one)]
    return shlex.join(words)


_FLAGS = {each.name: each.name.replace("_", "-") for each in fields(Recipe)} | {"samples": "sample", "name": "as"}
