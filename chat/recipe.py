"""What a run of tuning is asked for, checked as far as that takes neither torch nor a look into the rows."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.locations import name_beside, user_path
from glmchat.core.shell import shell_line
from glmchat.core.text import number_text, one_line

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
        return {FLAGS[name]: value for name, value in asdict(self).items() if value not in (None, [])}

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
                raise wrong_value(flag, value, ", ".join(words))
        for field, (low, high) in _RANGES.items():
            value = getattr(self, field)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                flag = f"--{field.replace('_', '-')}"
                raise wrong_value(
                    flag, number_text(value), tr("from {low} to {high}", low=number_text(low), high=number_text(high))
                )
        if self.targets == "":
            raise wrong_value("--targets", "", tr("names of layers, a regular expression, or all-linear"))
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
            if share is None and re.fullmatch(r"[\d.]+", self.eval) and not is_there(self.eval):
                raise wrong_value("--eval", self.eval, tr("a file, or a share of the rows: 5%"))
            recipe["eval"] = parse_data(self.eval) if share is None else self.eval.strip()
        if self.config is not None and is_there(self.config):
            recipe["config"] = str(user_path(self.config))
        elif method == "scratch":
            raise Usage(
                tr("--method scratch needs --config")
                if self.config is None
                else tr("{path} is not here", path=one_line(self.config, 200) or "''"),
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
            raise wrong_value("--over-length", "split", tr("of pairs: refuse, cut-question, cut-answer or drop"))
        return method


def parse_data(text: str) -> str:
    """A file or a folder of rows, absolute; `FILE#name` names an entry of a dataset_info.json. Raises Usage."""
    path, mark, entry = (text, "", "") if is_there(text) else text.partition("#")
    if not path or not is_there(path):  # of "" a path is the folder one stands in
        raise Usage(
            tr("{path} is not here", path=one_line(text, 200) or "''"),
            hint=name_beside(path) or tr("DATA is a file of rows, a folder of .txt, or dataset_info.json#name"),
            code="tune.no_data",
        )
    return f"{user_path(path)}{mark}{entry}"


def is_there(text: str) -> bool:
    """Whether something is at a path that a person wrote."""
    try:
        return Path(user_path(text)).exists()
    except OSError:
        return False


def _share(text: str, flag: str, *, most: float) -> float | None:
    """ "5%" -> 0.05; None for what is no share. Raises Usage for one out of range."""
    if (match := _SHARE.fullmatch(text.strip())) is None:
        return None
    if not 0 < (percent := float(match[1])) <= most:
        raise wrong_value(flag, text, tr("from {low} to {high}", low="0.1%", high=f"{number_text(most)}%"))
    return percent / 100


def _mix(text: str) -> str:
    """FILE:20%, the file absolute."""
    path, colon, share = text.rpartition(":")
    if not colon or _share(share, "--mix", most=95) is None:
        raise wrong_value("--mix", text, tr("FILE:20%, the share of all rows"))
    return f"{parse_data(path)}:{share}"


def _columns(text: str) -> dict[str, str]:
    """prompt=A,answer=B -> what -> column."""
    chosen: dict[str, str] = {}
    for pair in text.split(","):
        what, equals, column = (part.strip() for part in pair.partition("="))
        if not equals or not column or not what:
            raise wrong_value("--columns", pair, "--columns prompt=A,answer=B")
        chosen[what] = column
    return chosen


def wrong_value(flag: str, value: str, wanted: str) -> Usage:
    """For a flag that cannot be what was given."""
    return Usage(
        tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(value, 60))), hint=wanted, code="usage.value"
    )


def command_of(base: str, data: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """The line that asks for a run again. recipe: as it stands in recipe.json, or a part of it."""
    words = ["glmchat", "tune", base, *data]
    for name, value in recipe.items():
        if name not in FLAGS or value in (None, False, [], {}):
            continue
        flag = f"--{FLAGS[name]}"
        if value is True:
            words.append(flag)
            continue
        several = value if isinstance(value, list) else [value]
        for one in [",".join(f"{k}={v}" for k, v in value.items())] if isinstance(value, dict) else several:
            words += [flag, f"{one:.15g}" if isinstance(one, float) else str(one)]
    return shell_line(words)


FLAGS = {each.name: each.name.replace("_", "-") for each in fields(Recipe)} | {"samples": "sample", "name": "as"}
