"""What a reading of data is told, what of a checkpoint it needs, and one hash of everything that tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.core.errors import Usage
from glmchat.core.fingerprints import whole
from glmchat.core.language import tr
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.prompts.template import TemplatePrompt
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.tuning.recipes import Recipe, recipe_of
from glmchat.tuning.rendering import On, OverLength
from glmchat.tuning.sources import Source


@dataclass(frozen=True, slots=True)
class DataOptions:
    """on, over_length None: by the data. max_length None: the recipe's, or 2,048. columns: part -> key.

    system: for rows that bring no system text. evaluation: a file, or a share of the rows as "5%". seed: of what is
    held out and mixed in. pairs: rows hold a better and a worse answer each, and both are wanted. stride: tokens from
    one window of a long text to the next; None: as many as it has.
    """

    on: On | None = None
    like: str | None = None
    over_length: OverLength | None = None
    max_length: int | None = None
    format: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    mixes: tuple[str, ...] = ()
    evaluation: str | None = None
    system: str | None = None
    seed: int = 0
    pairs: bool = False
    stride: int | None = None

    def recipe(self, family: str) -> Recipe | None:
        """The original that is asked for. Raises Usage where something else is that a recipe fixes."""
        found = recipe_of(self.like, family)
        asked = {"--max-length": self.max_length, "--over-length": self.over_length, "--on": self.on,
                 "--system": self.system}  # fmt: skip
        fixed = [name for name, value in asked.items() if value is not None]
        if found is not None and fixed:
            raise Usage(
                tr("--like fixes what {options} would change", options=", ".join(fixed)),
                hint=tr("leave out one of them"),
                code="data.recipe_fixed",
            )
        if self.stride is not None and found is not None:
            if not found.is_text:
                raise Usage(
                    tr("--stride is of texts, and --like {name} learns questions and answers", name=found.name),
                    hint=tr("leave out one of them"),
                    code="data.stride",
                )
            return replace(found, stride=self.stride)
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> DataOptions:
        """The inverse of `to_json`. Raises TypeError for names that are none."""
        return DataOptions(**{**data, "mixes": tuple(data.get("mixes", ()))})


@dataclass(frozen=True, slots=True)
class PromptSide:
    """What of a checkpoint turns a conversation into ids, and back."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    prompt: PromptFormat

    def close(self) -> None:
        """End the helper process of a chat template."""
        if isinstance(self.prompt, TemplatePrompt):
            self.prompt.close()


def load_prompt_side(path: Path) -> PromptSide:
    """Of a folder or a GGUF file, without its weights. Raises Damaged where the tokenizer is missing or broken."""
    checkpoint = identify(path)
    try_vocabulary(checkpoint.path)
    tokenizer = checkpoint.family.load_tokenizer(checkpoint.path, checkpoint.spec)
    return PromptSide(checkpoint, tokenizer, checkpoint.family.prompt(checkpoint.path, tokenizer, checkpoint.spec))


def _plain(value: object) -> str:
    """For the hash: of numbers that a GGUF header holds as one block their bytes, not where they lie in memory."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, memoryview) else str(value)


def fingerprint(sources: Sequence[Source], options: DataOptions, side: PromptSide) -> str:
    """Of the data's bytes, tokenizer, template, options, and the code that makes tokens of them."""
    digest = hashlib.sha256()

    def add(*parts: object) -> None:
        digest.update(json.dumps(parts, ensure_ascii=False, default=_plain).encode("utf-8", "replace"))

    for source in sources:
        add(str(source.path), source.use, source.share, source.most, source.form, whole(source.path))
    add(options.to_json(), side.prompt.identity, side.checkpoint.spec.context)
    add(*_tokenizer_prints(side.checkpoint.path), *_program_prints())
    return "sha256:" + digest.hexdigest()


_TEXT_FILES = ("tokenizer", "ice_text", "special_tokens", "added_tokens", "vocab", "merges", "chat_template", "chinese")


def _tokenizer_prints(path: Path) -> Iterator[object]:
    """Of the files that tokenizer and template come from; of a GGUF file, what its header says of them."""
    if path.is_file():
        metadata: Mapping[str, Any] = open_gguf(path).metadata
        yield {key: value for key, value in metadata.items() if key.startswith("tokenizer.")}
        return
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.name.startswith(_TEXT_FILES) or file.name in ("config.json", "spiece.model")):
            yield file.name, whole(file)


def _program_prints() -> Iterator[object]:
    root = Path(__file__).resolve().parent.parent
    for room in ("tuning", "engine/prompts", "engine/tokenizers"):
        for file in sorted((root / room).glob("*.py")):
            yield room, file.name, whole(file)
