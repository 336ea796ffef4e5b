"""The one list of what we support, and which of it a checkpoint is.

An architecture is one `Family` record in its own model module, named in `FAMILIES`. Modules are imported when a
checkpoint is identified, in this order; the first whose `matches` says yes takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmchat.checkpoints.weight_files import folder_config
from glmchat.core.errors import Damaged, NotInstalled
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.models.base import LanguageModel, ModelSpec
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from glmchat.checkpoints.gguf_file import GGUFFile

# "module:attribute" of a Family, or of a tuple of them. The fallback takes what nobody else knows, so it stays last.
FAMILIES: tuple[str, ...] = (
    "glmchat.engine.models.chatglm:FAMILY",
    "glmchat.engine.models.chatglm2:FAMILY",
    "glmchat.engine.models.gpt2:FAMILY",
    "glmchat.engine.models.llama:FAMILY",
    "glmchat.engine.models.transformers:FAMILY",
)


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture is recognised, built, named and spoken to.

    matches:        config (config.json, or GGUF metadata in config.json's words) -> is it ours
    parse:          config -> measures, every one checked (checkpoints/config.py) before memory is taken
    build:          called under torch.device("meta"); parameter names are the checkpoint's own
    rename:         a checkpoint's tensor name -> the parameter's name, or None for a buffer that is ignored
    load_tokenizer: folder or GGUF file -> tokenizer; raises Damaged if it is damaged or of another generation
    prompt:         the chat format
    transposed:     parameter name -> is it stored [in, out] (GPT-2's Conv1D) instead of [out, in]
    load:           for a family that loads itself (the fallback): replaces build and rename
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Mapping[str, Any]], ModelSpec]
    build: Callable[[ModelSpec], LanguageModel]
    rename: Callable[[str], str | None]
    load_tokenizer: Callable[[Path, ModelSpec], Tokenizer]
    prompt: Callable[[Path, Tokenizer, ModelSpec], PromptFormat]
    transposed: Callable[[str], bool] | None = None
    load: Callable[[Checkpoint, Any], LanguageModel] | None = None  # (checkpoint, torch dtype)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder or file that was recognised; nothing of its weights has been read yet."""

    path: Path
    config: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    gguf: GGUFFile | None = None  # the validated file, if it is one


def families() -> Iterator[Family]:
    """Every family, in the order in which they are asked."""
    for entry in FAMILIES:
        module, _, attribute = entry.partition(":")
        found = getattr(import_module(module), attribute)
        yield from found if isinstance(found, tuple) else (found,)


def identify(path: Path) -> Checkpoint:
    """What stands at `path`: reads config.json or a GGUF header, no weights.

    Raises NotInstalled if nothing is there, Damaged if it is no checkpoint or a damaged one.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise NotInstalled(
            tr("there is no model at {path}", path=one_line(str(path))),
            hint=tr("`glmchat list` shows what is here"),
            code="model.no_path",
        )
    gguf = None
    if path.is_file():
        from glmchat.checkpoints.gguf_file import open_gguf
        from glmchat.checkpoints.gguf_names import config_of

        gguf = open_gguf(path)
        config: Mapping[str, Any] = config_of(gguf)
    else:
        config = folder_config(path)
    for family in families():
        if family.matches(config):
            return Checkpoint(path, config, family, family.parse(config), gguf)
    kind = config.get("model_type") or config.get("architectures") or "no architecture"
    raise Damaged(
        f"glmchat does not know this model: config.json names {one_line(str(kind), 80)}",
        hint=tr("`glmchat show` lists the families it runs"),
        code="model.unknown_family",
    )
