"""Whether an adapter fits a model, by what both say of themselves: names and measures.

Shapes cannot tell two models of one architecture apart; the names that trainers and hubs write down can.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.adapter_settings import other_vocabulary
from glmchat.checkpoints.fit import config_at, spec_at
from glmchat.checkpoints.peft_kinds import KINDS
from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
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


# Families whose prompts are code, with words of one kind.
CHATGLM = ("chatglm", "chatglm2", "chatglm3", "glm4")
_HEADS = ("lm_head", "output_layer", "embed_tokens", "wte", "word_embeddings")


@dataclass(frozen=True, slots=True)
class Misfit:
    """Why an adapter does not fit. forceable: its shapes do; only the names say that it is for another model."""

    reason: str
    hint: str
    forceable: bool = False

    def error(self, name: str) -> Usage:
        code = "adapter.other_base" if self.forceable else "adapter.misfit"
        return Usage(f"{one_line(name, 40)}: {self.reason}", hint=self.hint, code=code)


@dataclass(frozen=True, slots=True)
class Base:
    """A model as adapters see it. spec: None where its files say too little."""

    names: tuple[str, ...]
    spec: ModelSpec | None

    @staticmethod
    def of(folder: Path) -> Base:
        """folder: of the checkpoint, or a GGUF file. Never raises: what cannot be read is the engine's to refuse."""
        names = tuple(names_of(folder.expanduser().absolute(), config_at(folder)))
        return Base(names, spec_at(folder))


def misfit(facts: Mapping[str, Any], trained_on: str | None, base: Base) -> Misfit | None:
    """None if the adapter fits, or if too little is known of the two to say that it does not.

    facts: what was noted when it was added. trained_on: the model it names.
    """
    found = _by_measures(facts, base.spec)
    if found is not None or trained_on is None or facts.get("forced"):
        return found
    here = other_model(trained_on, base.names)
    if here is None:
        return None
    return Misfit(
        tr("trained on {base}, but this model is {here}", base=one_line(trained_on, 80), here=one_line(here, 80)),
        tr("use it with its own base, or attach it anyway with --force"),
        forceable=True,
    )


def _by_measures(facts: Mapping[str, Any], model: ModelSpec | None) -> Misfit | None:
    kind = facts.get("kind")
    if model is None or model.layout is None or kind is None:
        return None
    if kind == "lora":
        return _lora(facts, model)
    if kind in KINDS:
        return Misfit(
            tr("a {kind} needs PEFT, and glmchat computes {family} models itself", kind=KINDS[kind].name,
               family=model.family),
            tr("LoRA, DoRA, prefixes and virtual tokens run here; the other kinds need a model that runs "
"through transformers"),
        )  # fmt: skip
    if facts.get("form") == "thudm" and model.family not in CHATGLM:
        return Misfit(
            tr("a P-Tuning prefix for ChatGLM, but this model is of the family {family}", family=model.family),
            tr("use it with the ChatGLM model it was trained on"),
        )
    wanted, width = model.hidden_size if kind == "prompt" else model.prefix_width, facts.get("width")
    if width is None or width == wanted:
        return None
    return Misfit(
        tr("made for a model of width {theirs}, but this one has {ours}", theirs=width, ours=wanted),
        tr("it was trained on a model of a different size"),
    )


def _lora(facts: Mapping[str, Any], model: ModelSpec) -> Misfit | None:
    changed: Mapping[str, Any] = facts.get("shapes") or {}
    here = model.linear_shapes()
    for name, shape in changed.items():
        if name in _HEADS:
            continue
        if name not in here:
            return Misfit(
                tr(
                    "changes layers called {name}, but this {family} model has none",
                    name=one_line(str(name), 40),
                    family=model.family,
                ),
                tr("it was trained on a model of another family"),
            )
        if tuple(shape) not in here[name]:
            ours = tr(" or ").join(f"{outputs} × {inputs}" for outputs, inputs in here[name])
            return Misfit(
                tr("{name} is {theirs} in it, but {here} in the model", name=one_line(str(name), 40),
                   theirs=" × ".join(map(str, shape)), here=ours),
                tr("it was trained on a model of a different size"),
            )  # fmt: skip
    layers, vocabulary = facts.get("layers") or 0, facts.get("vocabulary")
    if layers > model.layers:
        return Misfit(
            tr("trained on {theirs} layers, but this model has {ours}", theirs=layers, ours=model.layers),
            tr("it was trained on a model with more layers"),
        )
    if vocabulary and vocabulary != model.vocab_size and not _brings_all_words(facts, model):
        return Misfit(*other_vocabulary(vocabulary, model.vocab_size))
    return None


def words_with(facts: Mapping[str, Any], model: ModelSpec) -> int:
    """How many words the model has rows for while this adapter is in use."""
    words = facts.get("vocabulary")
    return words if isinstance(words, int) and _brings_all_words(facts, model) else model.vocab_size


def _brings_all_words(facts: Mapping[str, Any], model: ModelSpec) -> bool:
    """Whether an adapter with another number of words brings every row of them, so that it needs none of the model's.

    The ChatGLM families have words of one kind only, which their code puts into prompts.
    """
    replaced = set(facts.get("replaces") or ())
    ends = {name.split(".")[-2] for name in model.ends()}
    return model.family not in CHATGLM and (ends <= replaced if ends else len(replaced) > 1)
