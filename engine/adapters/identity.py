"""Is this the model that the adapter was trained on? Asked before the model is touched.

Shapes cannot tell two models of one architecture apart; the names that trainers and hubs write down can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.text import one_line
from glmchat.engine.adapters.adapter import STORED, Adapter
from glmchat.engine.config import read_json
from glmchat.engine.families import Checkpoint

# What is added to a model's name when it is stored in another way: it is still the same model.
_STORAGE = re.compile(
    r"(?i)[-_.:](bnb-4bit|unsloth|(\dbit)|int[48]|[if]?q\d(_\w+)*|gguf|gptq|awq|hf|fp16|bf16|f16|f32|fp32|safetensors)$"
)
_SIZE = re.compile(
    r"(?i)(?<![a-z0-9.])\d+(\.\d+)?[bm](?![a-z0-9])"
)  # 6b, 135M: what models' names have and folders' not


def names_of(checkpoint: Checkpoint) -> list[str]:
    """Every name under which the loaded model may be known, the most telling first."""
    found: list[Any] = []
    for part in checkpoint.path.parts:
        if part.startswith("models--"):  # the hub's cache
            found.append(part.removeprefix("models--").replace("--", "/", 1))
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if (folder / STORED).is_file():
        note = read_json(folder / STORED)
        found += [note.get("repo"), note.get("base"), note.get("name")]
    found += [checkpoint.config.get("_name_or_path"), checkpoint.config.get("name_or_path"), checkpoint.path.name]
    if checkpoint.gguf is not None:
        found.append(checkpoint.gguf.metadata.get("general.name"))
    return list(dict.fromkeys(one_line(name, 120) for name in found if isinstance(name, str) and name.strip("./")))


def refuse_other_base(adapter: Adapter, checkpoint: Checkpoint) -> None:
    """Raise Usage if the adapter names the model it was trained on, and that is another one.

    Names that say nothing ("./glm_models", "output") prove nothing, and pass.
    """
    if adapter.base is None or adapter.forced:
        return
    here = names_of(checkpoint)
    if not told_apart(adapter.base, here):
        return
    shown = next(name for name in here if _telling(name))
    raise Usage(
        f"this adapter was trained on {adapter.base}, and the model here is {shown}: its shapes are the same, its "
        "weights are not",
        hint="use it with its own base, or attach it all the same with --force",
        code="adapter.other_base",
    )


def told_apart(recorded: str, here: Iterable[str]) -> bool:
    """True if `recorded` and the names of the model here are both telling, and none of these is the same."""
    wanted = canonical(recorded)
    known = [canonical(name) for name in here if _telling(name)]
    return bool(known) and _telling(recorded) and wanted not in known


def canonical(name: str) -> str:
    """ "THUDM/chatglm-6b-int4" and "/models/ChatGLM_6B" -> "chatglm6b": without owner, storage and punctuation."""
    last = re.split(r"[/\\]", name.rstrip("/\\"))[-1].partition("@")[0]
    while (shorter := _STORAGE.sub("", last)) != last:
        last = shorter
    return re.sub(r"[^a-z0-9]", "", last.lower()).removeprefix("meta")


def _telling(name: str) -> bool:
    return bool(_SIZE.search(re.split(r"[/\\]", name.rstrip("/\\"))[-1].replace("_", "-")))
