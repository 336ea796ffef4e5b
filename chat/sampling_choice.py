"""Which value of each sampling setting holds, and who said so.

flag > /set > conversation > GLMCHAT_* > config > models.toml > generation_config.json > default
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from glmchat.checkpoints.fit import variables_at
from glmchat.core.errors import Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.messages import Sampling
from glmchat.core.settings import load_settings

Origin = Literal["flag", "set", "conversation", "environment", "config", "catalogue", "generation_config", "default"]
ORDER: tuple[Origin, ...] = get_args(Origin)  # the highest rank first
WORDS: Mapping[Origin, str] = {  # of each rank, as people are told it; translated when shown
    "flag": "command line",
    "set": "you",
    "conversation": "this conversation",
    "environment": "environment",
    "config": "config",
    "catalogue": "catalogue",
    "generation_config": "model",
    "default": "built in",
}
# Values for the four settings that shape an answer; "model" means: whatever the model's own files say.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "precise": {"temperature": 0.2, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
    "balanced": {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0.0},
    "creative": {"temperature": 1.1, "top_p": 1.0, "top_k": 0, "min_p": 0.05},
    "model": {},
}


@dataclass(frozen=True, slots=True)
class ChosenSampling:
    sampling: Sampling
    origins: Mapping[str, Origin]  # for every field of Sampling

    @property
    def asked(self) -> frozenset[str]:
        """The fields that somebody set. A foreign server is sent only these: its own defaults are for its model."""
        return frozenset(name for name, origin in self.origins.items() if origin != "default")


@dataclass(slots=True)
class SamplingRanks:
    """What each rank asks for; field of `Sampling` -> value. Only the ranks that speak need an entry."""

    asked: dict[Origin, dict[str, Any]] = field(default_factory=dict)

    def rank(self, origin: Origin) -> dict[str, Any]:
        return self.asked.setdefault(origin, {})

    def choose(self, only_now: Mapping[str, Any] | None = None) -> ChosenSampling:
        """The values that hold. `only_now`: for one answer, above every rank. Raises Usage for one out of range."""
        return choose_sampling({**self.asked, "flag": {**self.asked.get("flag", {}), **(only_now or {})}})


def choose_sampling(asked: Mapping[Origin, Mapping[str, Any]]) -> ChosenSampling:
    """The highest rank that names a field decides it. Raises Usage for a value out of range, naming who gave it."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for item in fields(Sampling):
        origins[item.name] = next((o for o in ORDER if item.name in asked.get(o, {})), "default")
        if origins[item.name] != "default":
            values[item.name] = asked[origins[item.name]][item.name]
            try:
                Sampling(**{item.name: values[item.name]})
            except TypeError:
                raise Usage(
                    tr(
                        "{name} cannot be {values!r} ({origins})",
                        name=item.name,
                        values=values[item.name],
                        origins=origins[item.name],
                    ),
                    hint=tr("give a number, for example /set {name} 0.8", name=item.name),
                    code="sampling.value",
                ) from None
    return ChosenSampling(Sampling(**values), origins)


def ranks_for_launch(
    flags: Mapping[str, Any], *, catalogue: Mapping[str, Any] | None = None, folder: Path | None = None
) -> SamplingRanks:
    """The ranks that are known before a conversation is open. Raises Usage for a broken config."""
    return SamplingRanks(
        {
            "flag": dict(flags),
            "environment": _heard(load_settings(Path(os.devnull)).sampling, folder),
            "config": _heard(load_settings(environ={}).sampling, folder),
            "catalogue": dict(catalogue or {}),
            "generation_config": generation_config(folder),
        }
    )


def _heard(sampling: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """What holds for every model, without the template variables that this one does not read."""
    told = sampling.get("template_variables") or {}
    known = variables_at(folder) if told and folder is not None else None
    if known is None:
        return dict(sampling)
    return {**sampling, "template_variables": {name: told[name] for name in told if name in known}}


def generation_config(folder: Path | None) -> dict[str, Any]:
    """What a checkpoint's own generation_config.json says; a missing, foreign or broken one says nothing.

    `do_sample: false` is the format's default and is what most files leave out while they mean to be sampled from, so
    only values that are there count.
    """
    data = small_json(folder / "generation_config.json") if folder is not None else {}
    values: dict[str, Any] = {}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        value = data.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            one: dict[str, Any] = {name: value}
            try:
                Sampling(**one)
            except Usage:
                continue
            values.update(one)
    return values


def value_text(value: Any) -> str:
    """A setting as it is typed, in the language of the window."""
    if value is None:
        return tr("none")
    if isinstance(value, tuple):
        return "|".join(value)
    if isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False) if value else tr("none")
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
