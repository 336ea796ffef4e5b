"""Whether a network goes on with a text at all: known from its type before anything is loaded.

Which types can is what the installed transformers says in `models/auto/modeling_auto.py`. Its tables are read as text,
since its import takes longer than a refusal may.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged, Usage
from glmchat.core.files import read_text
from glmchat.core.language import tr
from glmchat.core.text import one_line

# Of transformers' causal types, those that read in both directions unless config.json says that they are decoders.
_ENCODERS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
    "xlm-roberta-xl", "xlnet", "xmod",
})  # fmt: skip
_GGUF_ENCODERS = ("bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert",
                  "t5encoder", "gemma-embedding", "eurobert")  # fmt: skip
# Heads that answer with a class or a place in the text. They stand on networks of every type.
_OTHER_HEADS = re.compile(r".*For(SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)")
_TABLE = re.compile(r"^MODEL_?(\w*?)_?MAPPING_NAMES = OrderedDict\(\n(.*?)^\)", re.MULTILINE | re.DOTALL)


@cache
def _types() -> Mapping[str, frozenset[str]]:
    """Table of transformers -> the types in it: "FOR_CAUSAL_LM" -> {"gpt_neox", …}; {} where it cannot be read."""
    found = find_spec("transformers")
    file = Path(found.origin or "").parent / "models" / "auto" / "modeling_auto.py" if found else Path()
    try:
        text = read_text(file)
    except OSError:
        return {}
    return {name: frozenset(re.findall(r'\(\s*"([\w.-]+)",', body)) for name, body in _TABLE.findall(text)}


def refuse_no_generator(config: Mapping[str, Any], natively: bool) -> None:
    """Raise Usage for a network that does something else than going on with a text, Damaged for a type nobody computes.

    natively: glmchat computes the type itself.
    """
    kind = config.get("model_type")
    heads = config.get("architectures")
    named = [head for head in heads if isinstance(head, str)] if isinstance(heads, list) else []
    if named and all(_OTHER_HEADS.fullmatch(head) for head in named):
        raise _other(tr("config.json names a {head}, which does not generate text", head=one_line(named[0], 60)))
    if natively or not isinstance(kind, str):
        return
    tables, shown = _types(), one_line(kind, 60)
    causal = kind in tables.get("FOR_CAUSAL_LM", {kind})
    if (kind in _ENCODERS and not config.get("is_decoder")) or (not causal and kind in tables.get("FOR_MASKED_LM", ())):
        raise encoder(shown)
    turns = any(kind in tables.get(f"FOR_{name}", ()) for name in ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"))
    whole = bool(named) and all(head.endswith("ForConditionalGeneration") for head in named)
    if config.get("is_encoder_decoder") is True or (turns and (whole or not causal)):
        raise _other(tr("this {kind} model turns one text or recording into another and cannot chat", kind=shown))
    if causal:
        return
    if any(kind in tables.get(f"FOR_{name}", ()) for name in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")):
        raise _other(tr("this {kind} model answers about pictures or sound, which glmchat does not read", kind=shown))
    if any(kind in types for types in tables.values()):
        raise _other(tr("this {kind} model does not generate text", kind=shown))
    raise unknown_type(kind, bool(config.get("auto_map")))


def encoder(kind: str) -> Usage:
    """The error for a network that fills gaps in a text, and cannot go on with one."""
    return Usage(
        tr("this {kind} model reads a text in both directions and cannot go on with one", kind=kind),
        hint=tr("use a model that was trained to generate text"),
        code="model.encoder",
    )


def unknown_type(kind: str, has_code: bool = False) -> Damaged:
    """The error for a type that neither glmchat nor the installed transformers computes. has_code: the folder brings
    code of its own for it."""
    hint = tr("neither glmchat nor the installed transformers supports it; code from the folder is never run")
    if has_code:
        hint = tr("it needs code of its own, and code from a folder is never run: use a model of a known architecture")
    return Damaged(
        tr("glmchat does not know this model: config.json names {kind}", kind=one_line(kind, 80)),
        hint=hint,
        code="model.unknown_family",
    )


def refuse_gguf_kind(name: str, architecture: str) -> None:
    """Raise Usage for a GGUF file that is an encoder, or what sees and hears for another model."""
    if architecture in _GGUF_ENCODERS:
        raise encoder(architecture)
    if architecture == "clip":
        raise _other(
            tr("{name} only turns pictures or sound into input for another model (mmproj)", name=name),
            tr("name the GGUF file of the model itself; glmchat answers about text alone"),
        )


def refuse_pipeline(folder: Path) -> None:
    """Raise Usage for a folder of several networks that make pictures together (diffusers)."""
    if (folder / "model_index.json").is_file():
        raise _other(tr("{folder} is a pipeline that makes pictures (model_index.json)", folder=one_line(str(folder))))


def _other(sentence: str, hint: str | None = None) -> Usage:
    return Usage(sentence, hint=hint or tr("use a model that was trained to generate text"), code="model.kind")
