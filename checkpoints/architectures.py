"""Whether a network goes on with a text at all, and whether its settings are ones that its type has: known before
anything is loaded.

Both are what the installed transformers says: in `models/auto/modeling_auto.py`, and in the class of settings of each
type, whose annotations it checks each value against. They are read as text, since its import takes longer than a
refusal may.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from glmchat.checkpoints.config import absurd
from glmchat.checkpoints.transformers_text import Field, code_of, fields_of, text_of
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import number_text, one_line

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
    found = _TABLE.findall(text_of("models/auto/modeling_auto.py"))
    return {name: frozenset(re.findall(r'\(\s*"([\w.-]+)",', body)) for name, body in found}


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


_PARTS = ("text_config",)  # settings of their own within those of a model that also sees or hears
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
_DTYPES = ("float", "float16", "float32", "float64", "half", "double", "bfloat16")  # in which torch can hold a model
_SLIDING = "sliding_attention"
_ROPE_DEFAULTS = ("rope_type", "rope_theta", "original_max_position_embeddings")  # known from elsewhere where not said


def refuse_settings(config: Mapping[str, Any]) -> None:
    """Raise Damaged, with its name, for a setting that transformers would not take for this type of model.

    What it takes and what means nothing to the network is left alone. A type that it does not know has no such rules
    but one: the weights are of a type that torch has.
    """
    for settings in (config, *(part for name in _PARTS if isinstance(part := config.get(name), Mapping))):
        _refuse_dtype(settings)
        fields = fields_of(settings.get("model_type"))
        for name in fields.keys() & settings.keys():
            _refuse_value(name, settings[name], fields[name])
        if fields:
            _refuse_activation(settings, fields)
            _refuse_layers(settings, fields)
            _refuse_rope(settings, fields)
            _refuse_padding(settings, fields)


def _refuse_dtype(settings: Mapping[str, Any]) -> None:
    name = "torch_dtype" if settings.get("dtype") is None else "dtype"
    value = settings.get(name)
    if isinstance(value, Mapping | None) or (isinstance(value, str) and value in _DTYPES):
        return
    raise _refused(name, value, tr("expected one of {names}", names=", ".join(_DTYPES)))


def _refuse_value(name: str, value: Any, field: Field) -> None:
    if not _is_of(value, field.annotation):
        kinds = tr(" or ").join(dict.fromkeys(_words_of(field.annotation)))
        raise _refused(name, value, tr("expected {kinds}: the file is damaged or not a model", kinds=kinds))
    if isinstance(value, int | float) and not field.least <= value <= field.most:
        raise _refused(
            name,
            value,
            tr(
                "expected a number between {low} and {high}", low=number_text(field.least), high=number_text(field.most)
            ),
        )


def _refuse_activation(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    known = _activations()
    for name in _ACTIVATIONS:
        value = settings.get(name)
        if name not in fields or not isinstance(value, str) or not known:
            continue
        if value not in known and not _has_code_for(settings["model_type"], value):
            raise _refused(name, value, tr("expected one of {names}", names=", ".join(known)))


def _refuse_layers(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """Kinds of layers that there are, one for each layer, with a window where one of them needs it."""
    allowed, old = _layer_kinds()
    layers, kinds = _value("num_hidden_layers", settings, fields), settings.get("layer_types")
    if kinds is not None and allowed:
        count = layers if isinstance(layers, int) else None
        words = [old.get(kind, kind) for kind in kinds] if _is_texts(kinds) else None
        if words is None or not set(words) <= set(allowed) or (count is not None and len(words) != count):
            hint = tr(
                "expected one of {names} for each of {count} layers", names=", ".join(allowed), count=count or "?"
            )
            raise _refused("layer_types", kinds, hint)
    window = _value("sliding_window", settings, fields)
    if "use_sliding_window" in fields and not _value("use_sliding_window", settings, fields):
        window = None
    slides = isinstance(kinds, list) and _SLIDING in kinds
    if window is True and "sliding_window" not in fields and not slides:
        return  # of a type that has none: transformers' cache then keeps every token
    hint = tr("expected the number of tokens that a layer looks back")
    if "sliding_window" not in fields and not slides:
        hint = tr("expected the number of tokens that a layer looks back, or null")
    if not isinstance(window, int | None) or isinstance(window, bool) or (slides and window is None):
        raise _refused("sliding_window", window, hint)
    if window is not None and window < 1 and (slides or (kinds is None and "sliding_window" in fields)):
        raise _refused("sliding_window", window, hint)


def _refuse_rope(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    if "rope_parameters" not in fields:
        return
    known = _rope_kinds()
    given = next((v for key in ("rope_scaling", "rope_parameters") if isinstance(v := settings.get(key), Mapping)), {})
    tables = [given]
    if given and all(isinstance(value, Mapping | None) for value in given.values()):  # one for each kind of layer
        tables = [value for value in given.values() if isinstance(value, Mapping)]
    for table in tables:
        kind = table.get("rope_type", table.get("type", "default"))
        kind = "default" if kind is None else kind
        if isinstance(kind, str) and kind not in known and _has_code_for(settings["model_type"], kind):
            continue
        if known and (not isinstance(kind, str) or kind not in known):
            raise _refused("rope_type", kind, tr("expected one of {names}", names=", ".join(known)))
        for name in known.get(kind, ()):
            if name not in table and settings.get(name) is None:
                raise _refused(name, None, tr("a rope_type of {kind} needs it", kind=kind))
        both = table if "rope_theta" in table else settings
        theta = both.get("rope_theta", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not theta > 0:
            raise _refused("rope_theta", theta, tr("expected a number above 0"))


def _refuse_padding(settings: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """An embedding that keeps a row for padding needs that row; ids of other tokens may lie anywhere."""
    pad, rows = settings.get("pad_token_id"), _value("vocab_size", settings, fields)
    if isinstance(pad, int) and isinstance(rows, int) and not -rows <= pad < rows and _pads(settings["model_type"]):
        hint = tr("expected the id of a token below {rows}, or null", rows=rows)
        raise _refused("pad_token_id", pad, hint)


def _refused(name: str, value: Any, hint: str) -> Damaged:
    shown = "null" if value is None else one_line(repr(value), 60)
    return absurd(tr("{name} is {value} in the model's configuration", name=name, value=shown), hint)


def _value(name: str, settings: Mapping[str, Any], fields: Mapping[str, Field]) -> Any:
    if name in settings or name not in fields:
        return settings.get(name)
    return fields[name].default


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_of(value: Any, annotation: ast.expr) -> bool:
    """Whether a value of JSON is of an annotated type, as huggingface_hub's `strict` judges it. What a file cannot hold
    or nobody here knows is taken."""
    match annotation:
        case ast.BinOp(left=left, right=right):
            return _is_of(value, left) or _is_of(value, right)
        case ast.Constant(value=None):
            return value is None
        case ast.Name(id="bool"):
            return isinstance(value, bool)
        case ast.Name(id="int"):
            return isinstance(value, int) and not isinstance(value, bool)
        case ast.Name(id="float"):
            return isinstance(value, float)
        case ast.Name(id="str"):
            return isinstance(value, str)
        case ast.Name(id="list" | "tuple"):
            return isinstance(value, list)
        case ast.Name(id="dict" | "PreTrainedConfig" | "RopeParameters") | ast.Subscript(value=ast.Name(id="dict")):
            return isinstance(value, Mapping)
        case ast.Subscript(value=ast.Name(id="list"), slice=inner) if not isinstance(inner, ast.Tuple):
            return isinstance(value, list) and all(_is_of(part, inner) for part in value)
    return True


def _words_of(annotation: ast.expr) -> Iterator[str]:
    match annotation:
        case ast.BinOp(left=left, right=right):
            yield from _words_of(left)
            yield from _words_of(right)
        case ast.Constant(value=None):
            yield "null"
        case ast.Name(id="bool"):
            yield tr("true or false")
        case ast.Name(id="int"):
            yield tr("a whole number")
        case ast.Name(id="float"):
            yield tr("a number with a decimal point")
        case ast.Name(id="str"):
            yield tr("a text")
        case ast.Name(id="list" | "tuple") | ast.Subscript(value=ast.Name(id="list" | "tuple")):
            yield tr("a list")
        case _:
            yield tr("a table of settings")


@cache
def _activations() -> Sequence[str]:
    body = re.search(r"^ACT2CLS = \{\n(.*?)^\}", text_of("activations.py"), re.MULTILINE | re.DOTALL)
    return re.findall(r'^    "(\w+)":', body[1], re.MULTILINE) if body else []


@cache
def _layer_kinds() -> tuple[Sequence[str], Mapping[str, str]]:
    """The kinds of layers, and older names of some."""
    source = text_of("configuration_utils.py")
    kinds = re.search(r"^ALLOWED_ATTN_LAYER_TYPES = \(\n(.*?)^\)", source, re.MULTILINE | re.DOTALL)
    older = re.search(r"^_LEGACY_LAYER_TYPE_REMAP = \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    return (
        re.findall(r'^    "(\w+)",', kinds[1], re.MULTILINE) if kinds else [],
        dict(re.findall(r'^    "(\w+)": "(\w+)",', older[1], re.MULTILINE)) if older else {},
    )


@cache
def _rope_kinds() -> Mapping[str, Sequence[str]]:
    """Way of scaling positions -> what has to be said of it; {} where it cannot be read."""
    source = text_of("modeling_rope_utils.py")
    table = re.search(r"^ROPE_INIT_FUNCTIONS\b.*? = \{\n(.*?)^\}", source, re.MULTILINE | re.DOTALL)
    kinds = re.findall(r'^    "(\w+)":', table[1], re.MULTILINE) if table else []
    needs = dict(re.findall(r"def _validate_(\w+)_rope_parameters\(.*?required_keys = \{(.*?)\}", source, re.DOTALL))
    found = {kind: re.findall(r'"(\w+)"', needs.get(kind, "")) for kind in kinds}
    others = {kind: [name for name in names if name not in _ROPE_DEFAULTS] for kind, names in found.items()}
    return {"default": (), **others} if kinds else {}


def _pads(kind: str) -> bool:
    """Whether the network of a type gives its embedding the row of the padding."""
    return "padding_idx" in code_of(kind)


def _has_code_for(kind: str, word: str) -> bool:
    """Whether the files of a type know a word that the tables do not."""
    return bool(word) and f'"{word}"' in code_of(kind)
