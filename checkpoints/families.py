"""The one list of the architectures that can be run, and which of them a configuration is of.

A family's measures are one file of this room: what its configurations look like, and what they say. How it is computed
is the file of the same name in engine/models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from glmchat.checkpoints import chatglm, chatglm2, gpt2, llama, transformers
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Damaged, GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import one_line


@dataclass(frozen=True, slots=True)
class Family:
    """matches: config (config.json, or GGUF metadata in config.json's words) -> is it ours.
    parse: config -> measures, every one checked (checkpoints/config.py) before memory is taken; raises Damaged."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], ModelSpec]


# In the order in which they are asked; the last takes what nobody else knows.
FAMILIES: tuple[Family, ...] = (
    Family("chatglm", chatglm.matches, chatglm.parse),
    Family("chatglm2", chatglm2.matches, chatglm2.parse),
    Family("gpt2", gpt2.matches, gpt2.parse),
    Family("llama", llama.matches, llama.parse),
    Family("transformers", transformers.matches, transformers.parse),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a configuration is of. Raises Damaged for one that names none."""
    for family in FAMILIES:
        if family.matches(config):
            return family
    kind = config.get("model_type") or config.get("architectures") or "no architecture"
    raise Damaged(
        f"glmchat does not know this model: config.json names {one_line(str(kind), 80)}",
        hint=tr("`glmchat show` lists the families it runs"),
        code="model.unknown_family",
    )


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """The measures that a configuration tells. Raises Damaged."""
    return family_of(config).parse(config)


def spec_of(config: Mapping[str, Any]) -> ModelSpec | None:
    """As `parse`; None where a configuration tells too little or nothing that can be. Never raises."""
    try:
        return parse(config)
    except GlmchatError:
        return None
