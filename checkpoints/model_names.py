"""Is it the same model? Names, told apart where both say something.

Shapes cannot tell two models of one architecture apart; the names that trainers and hubs write down can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glmchat.core.json_files import small_json
from glmchat.core.text import one_line

BESIDE = "glmchat.json"  # the note beside a model that glmchat made or stored
# What is added to a model's name when it is stored in another way: it is still the same model.
_STORAGE = re.compile(
    r"(?i)[-_.:](bnb-4bit|unsloth|(\dbit)|int[48]|[if]?q\d(_\w+)*|gguf|gptq|awq|hf|fp16|bf16|f16|f32|fp32|safetensors)$"
)
# 6b, 135M: what models' names have and folders' not.
_SIZE = re.compile(r"(?i)(?<![a-z0-9.])\d+(\.\d+)?[bm](?![a-z0-9])")


def names_of(path: Path, config: Mapping[str, Any], *others: object) -> list[str]:
    """Every name under which the model at `path` may be known, the most telling first. others: more of them."""
    found: list[Any] = []
    for part in path.parts:
        if part.startswith("models--"):  # the hub's cache
            found.append(part.removeprefix("models--").replace("--", "/", 1))
    note = small_json((path if path.is_dir() else path.parent) / BESIDE)
    found += [note.get("repo"), note.get("base"), note.get("name")]
    found += [config.get("_name_or_path"), config.get("name_or_path"), path.name, *others]
    return list(dict.fromkeys(one_line(name, 120) for name in found if isinstance(name, str) and name.strip("./")))


def other_model(recorded: str, here: Iterable[str]) -> str | None:
    """The telling name of the model here, if `recorded` names another one; None where the names prove nothing.

    Names that say nothing ("./glm_models", "output") are like no name.
    """
    telling = [name for name in here if is_telling(name)]
    if not telling or not is_telling(recorded) or canonical(recorded) in map(canonical, telling):
        return None
    return telling[0]


def canonical(name: str) -> str:
    """ "THUDM/chatglm-6b-int4" and "/models/ChatGLM_6B" -> "chatglm6b": without owner, storage and punctuation."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].partition("@")[0]
    while (shorter := _STORAGE.sub("", last)) != last:
        last = shorter
    return re.sub(r"[^a-z0-9]", "", last.lower()).removeprefix("meta")


def is_telling(name: str) -> bool:
    """The name holds a model's size, and so is more than the name of somebody's folder."""
    return bool(_SIZE.search(re.split(r"[/\\]", name.rstrip("/\\"))[-1].replace("_", "-")))
