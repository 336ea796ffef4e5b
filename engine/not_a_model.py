"""Folders that people give as a model and that hold only part of one: a LoRA, or a P-Tuning prefix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.text import one_line
from glmchat.engine.config import read_json
from glmchat.engine.shards import load_bin, refuse_pointer

_PREFIX = "transformer.prefix_encoder."
# Rows of the embedding by which a revision is known.
_REVISIONS = {
    150528: "ChatGLM-6B of the first generation (March 2023, revision 096f3de6)",
    130528: "ChatGLM-6B, slim (April 2023 and later)",
    65024: "ChatGLM2-6B or ChatGLM3-6B",
    151552: "GLM-4",
}


def refuse_adapter_folder(folder: Path) -> None:
    """For a folder without config.json: raise Usage, with the base and the command, if it holds an adapter."""
    file = folder / "adapter_config.json"
    if file.is_file():
        base = read_json(file).get("base_model_name_or_path")
        raise _only("an adapter (adapter_config.json)", folder, base if isinstance(base, str) else "")
    weights = folder / "pytorch_model.bin"
    if weights.is_file():
        refuse_pointer(weights)
        refuse_prefix_folder(load_bin(weights), folder, {})


def refuse_prefix_folder(names: Iterable[str], folder: Path, config: Mapping[str, Any]) -> None:
    """Raise Usage if all the tensors there are belong to a prefix encoder: THUDM's P-Tuning saves nothing else."""
    found = list(names)
    if found and all(name.startswith(_PREFIX) for name in found):
        base = config.get("_name_or_path")
        raise _only("a P-Tuning prefix", folder, base if isinstance(base, str) else "")


def _only(what: str, folder: Path, base: str) -> Usage:
    named = one_line(base, 120) or "its base model, which it does not name"
    base_word = one_line(base, 120) if re.fullmatch(r"[\w./~+-]+", base) else "BASE"
    return Usage(
        f"{one_line(str(folder))} holds only {what}; it needs {named}",
        hint=f"glmchat run {base_word} --adapter {one_line(str(folder))}",
        code="model.only_adapter",
    )


def revision_of(shape: tuple[int, ...]) -> str | None:
    """Which published model has an embedding of this shape, in words; None if none is known."""
    return _REVISIONS.get(shape[0]) if len(shape) == 2 else None
