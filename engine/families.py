"""How the families of checkpoints/families.py are computed: what of each needs torch.

An architecture is one `Family` record in the module of engine/models that bears the family's name; a module is imported
when a checkpoint of it is identified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from glmchat.checkpoints import families
from glmchat.checkpoints.gguf_file import GGUFFile, config_of, open_gguf
from glmchat.checkpoints.spec import ModelSpec, Shape
from glmchat.checkpoints.weight_files import folder_config
from glmchat.core.errors import NotInstalled
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.formats.weights import WeightSource, with_own_head_of_bin
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.tokenizers.base import Tokenizer


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture is built, named and spoken to.

    build:          called under torch.device("meta"); parameter names are the checkpoint's own
    rename:         a checkpoint's tensor name -> the parameter's name, or None for a buffer that is ignored
    load_tokenizer: folder or GGUF file -> tokenizer; raises Damaged if it is damaged or of another generation
    prompt:         the chat format
    transposed:     parameter name -> is it stored [in, out] (GPT-2's Conv1D) instead of [out, in]
    load:           for a family that loads itself (the fallback): replaces build and rename; returns the model and,
                    parameter -> name in the source, the packed matrices that are still to be put in
    matrices:       for such a family, what is known of a file's tensors
    parse:          for a family whose measures only its library knows (the fallback): config -> measures
    """

    name: str
    build: Callable[[ModelSpec], LanguageModel]
    rename: Callable[[str], str | None]
    load_tokenizer: Callable[[Path, ModelSpec], Tokenizer]
    prompt: Callable[[Path, Tokenizer, ModelSpec], PromptFormat]
    transposed: Callable[[str], bool] | None = None
    load: Callable[[Checkpoint, Any, WeightSource], tuple[LanguageModel, dict[str, str]]] | None = None  # (…, dtype, …)
    matrices: Callable[[Checkpoint, Iterable[str]], Matrices] | None = None
    parse: Callable[[Mapping[str, Any]], ModelSpec] | None = None


@dataclass(frozen=True, slots=True)
class Matrices:
    """Of a file's tensors by name: what quantising packs, with its inputs and whether it is embedding or head; the
    shapes that are known; which lie the other way round, [in, out]; whether some are joined to others first."""

    places: Mapping[str, tuple[int, bool]]
    shapes: Mapping[str, Shape]
    across: frozenset[str]
    joined: bool


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder or file that was recognised; nothing of its weights has been read yet."""

    path: Path
    config: Mapping[str, Any]
    family: Family
    spec: ModelSpec
    gguf: GGUFFile | None = None  # the validated file, if it is one


def family_of(config: Mapping[str, Any]) -> tuple[Family, ModelSpec]:
    """How a configuration's network is computed, and its measures. Raises Damaged."""
    described = families.family_of(config)
    family: Family = import_module(f"glmchat.engine.models.{described.name}").FAMILY
    return family, (family.parse or described.parse)(config)


def identify(path: Path) -> Checkpoint:
    """What stands at `path`: reads config.json or a GGUF header, no weights.

    Raises NotInstalled if nothing is there, Damaged if it is no checkpoint or a damaged one.
    """
    path = path.expanduser().absolute()
    if not path.exists():
        raise NotInstalled(
            tr("there is no model at {path}", path=one_line(str(path))),
            hint=tr("`glmchat list` shows the models on this machine"),
            code="model.no_path",
        )
    gguf = None
    if path.is_file():
        gguf = open_gguf(path)
        config: Mapping[str, Any] = config_of(gguf)
    else:
        config = with_own_head_of_bin(path, folder_config(path))
    return Checkpoint(path, config, *family_of(config), gguf)
