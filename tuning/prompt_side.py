"""What of a checkpoint a reading of data needs, and one hash of everything that tokens depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.gguf_file import open_gguf
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.core.fingerprints import whole
from glmchat.engine.families import Checkpoint, identify
from glmchat.engine.prompts.base import PromptFormat
from glmchat.engine.prompts.template import TemplatePrompt
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.tuning.options import DataOptions
from glmchat.tuning.sources import Source


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
