"""Reading config.json: either spelling of a field, and no value that would take memory it has no right to.

Face and engine read it here, so that what the one refuses before anything is loaded is what the other would refuse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged
from glmchat.core.files import read_text
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import number_text, one_line

# The most that a measure may be, with room above every network there is; in each family's spelling.
_LARGEST = {
    **dict.fromkeys(("num_layers", "num_hidden_layers", "n_layer"), 1024),
    **dict.fromkeys(("hidden_size", "n_embd"), 2**17),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "multi_query_group_num"), 2048),
    **dict.fromkeys(("head_dim", "kv_channels", "rotary_dim"), 2**13),
    **dict.fromkeys(("intermediate_size", "inner_hidden_size", "ffn_hidden_size", "n_inner"), 2**20),
    **dict.fromkeys(("vocab_size", "padded_vocab_size"), 2**22),
    **dict.fromkeys(("max_sequence_length", "seq_length", "max_position_embeddings", "n_positions", "n_ctx"), 2**26),
    "pre_seq_len": 2**16,
}
_MAY_BE_NONE_AT_ALL = ("pre_seq_len",)
_ANY = 2**24
_ANY_NUMBER = 1e37  # float32 ends at 3.4e38


def absurd(sentence: str, hint: str) -> Damaged:
    """The error for a configuration whose numbers cannot be: `sentence` says which."""
    return Damaged(sentence, hint=hint, code="config.absurd")


def integer(
    config: Mapping[str, Any], *names: str, low: int = 1, high: int | None = None, default: int | None = None
) -> int:
    """The first of `names` that the config holds, checked against its range; high None: as the field's name allows.

    Raises Damaged, which names the field, if it is absent without a default, no integer, or out of range.
    """
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        most = _LARGEST.get(name, _ANY) if high is None else high
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
            raise absurd(
                tr("{name} is {value} in the model's configuration", name=name, value=one_line(repr(value), 60)),
                tr(
                    "expected a whole number between {low} and {high}: the file is damaged or not a model",
                    low=low,
                    high=most,
                ),
            )
        return value
    if default is not None:
        return default
    raise Damaged(
        tr("the model's configuration has no {names}", names=names[0]),
        hint=tr("the folder contains another kind of model, or config.json is incomplete"),
        code="config.missing",
    )


def epsilon(config: Mapping[str, Any], name: str, default: float) -> float:
    """What a norm adds to a variance: a number of any size, as every implementation takes it."""
    return number(config, name, low=-_ANY_NUMBER, high=_ANY_NUMBER, default=default)


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the rotary frequencies."""
    return number(config, "rope_theta", low=1 / _ANY_NUMBER, high=_ANY_NUMBER, default=10000.0)


def refuse_absurd(config: Mapping[str, Any]) -> None:
    """Raise Damaged for a measure that no network has, whatever the family. Lists and absent fields are left alone."""
    refuse_no_name(config)
    for name in _LARGEST:
        if not isinstance(config.get(name), list):
            integer(config, name, low=0 if name in _MAY_BE_NONE_AT_ALL else 1, default=1)


# What an architecture that is not computed here is said by its own class of settings, each of one type.
_FLAGS = (
    "use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "is_decoder", "is_encoder_decoder",
    "add_cross_attention", "scale_attn_weights", "parallel_attn", "alibi", "use_parallel_residual",
)  # fmt: skip
_TABLES = ("rope_scaling", "rope_parameters", "quantization_config", "text_config")


def refuse_types(config: Mapping[str, Any]) -> None:
    """Raise Damaged for a switch that is neither true nor false, or something else where a table of settings or the id
    of a token should be."""
    for name in _FLAGS:
        flag(config, name, False)
    for name in _TABLES:
        if not isinstance(value := config.get(name), Mapping | None):
            raise absurd(
                tr("{name} is {value} in the model's configuration", name=name, value=one_line(repr(value), 60)),
                tr("expected a table of settings: the file is damaged or not a model"),
            )
    ends = config.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [ends]:
        if not isinstance(end, int | None) or isinstance(end, bool):
            raise absurd(
                tr(
                    "{name} is {value} in the model's configuration", name="eos_token_id", value=one_line(repr(end), 60)
                ),
                tr("expected the id of a token, or a list of them"),
            )


def refuse_no_name(config: Mapping[str, Any]) -> None:
    """Raise Damaged for a type of model that is no text: it is looked up in tables."""
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise absurd(
            tr("{name} is {value} in the model's configuration", name="model_type", value=one_line(repr(kind), 60)),
            tr("expected the name of a type of model"),
        )


def number(
    config: Mapping[str, Any], *names: str, low: float = 0.0, high: float = 1e12, default: float | None = None
) -> float:
    """Like `integer`, for real numbers; NaN is out of every range."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise absurd(
                tr("{name} is {value} in the model's configuration", name=name, value=one_line(repr(value), 60)),
                tr("expected a number between {low} and {high}", low=number_text(low), high=number_text(high)),
            )
        return float(value)
    if default is not None:
        return default
    raise Damaged(
        tr("the model's configuration has no {names}", names=names[0]),
        hint=tr("config.json is incomplete"),
        code="config.missing",
    )


def flag(config: Mapping[str, Any], name: str, default: bool) -> bool:
    """true or false; anything else is refused, so that a list or a word never passes for true."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise absurd(
            tr("{name} is {value} in the model's configuration", name=name, value=one_line(repr(value), 60)),
            tr("expected true or false: the file is damaged or not a model"),
        )
    return value


def require(config: Mapping[str, Any], name: str, value: bool) -> None:
    """Refuse a variant of the architecture in which `name` is not `value`, the only one that was released."""
    if flag(config, name, value) != value:
        raise Damaged(
            tr(
                "{name} is {config!r} in the model's configuration: no released model is built like that",
                name=name,
                config=config[name],
            ),
            hint="glmchat does not compute this variant of the architecture",
            code="config.unsupported",
        )


def token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id` as it is written (absent, one id, a list) as ids that the vocabulary holds."""
    values = value if isinstance(value, list) else [value]
    return tuple(
        dict.fromkeys(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < vocab_size)
    )


GENERATION = "glmchat_generation"  # what the files beside a config.json say of it, where it does not say itself
_ROLE = "<|user|>"  # a token of ChatGLM3; ChatGLM2 writes its turns in words
_LARGEST_SIGN = 4 * 2**20  # bytes of a file in which a sign is looked for


def settle_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, with what the tokenizer's files say of it: ChatGLM2 or ChatGLM3.

    Both have the same tensors and vocabulary, and a fine-tune that was exported lost the name in config.json. What is
    left are the tokenizer's name, its code, and the tokens of roles, which only ChatGLM3 has.
    """
    if config.get("model_type") != "chatglm":
        return dict(config)
    tokenizer = small_json(folder / "tokenizer_config.json")
    named = f"{tokenizer.get('name_or_path', '')} {tokenizer.get('auto_map', '')}".lower()
    told = next((family for family in ("chatglm3", "chatglm2") if family in named), None)
    code = _text(folder / "tokenization_chatglm.py")
    if told is None and ("[Round" in code) != (_ROLE in code):
        told = "chatglm3" if _ROLE in code else "chatglm2"
    words = json.dumps(tokenizer.get("added_tokens_decoder") or {}, ensure_ascii=False)
    words += _text(folder / "added_tokens.json")
    if told is None and "[gMASK]" in words:  # the tokens of this family are listed, all of them or none
        told = "chatglm3" if _ROLE in words else "chatglm2"
    return {**config, GENERATION: told} if told else dict(config)


def _text(path: Path) -> str:
    try:
        return read_text(path, _LARGEST_SIGN, errors="replace")
    except OSError:
        return ""
