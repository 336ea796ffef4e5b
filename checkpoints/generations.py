"""Which generation a config.json with model_type "chatglm" is of: the engine and `glmchat show` must say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_VOCABULARY = 150344  # tokens of the first generation (March 2023), 20,000 image tokens included
GLM4_ENDOFTEXT = 151329  # first special id of GLM-4; a vocabulary that reaches it is GLM-4's
WORDS = {
    "first": "first, March 2023, with image tokens",
    "slim": "slim, April 2023 and later",
    "chatglm2": "ChatGLM2",
    "chatglm3": "ChatGLM3",
    "glm4": "GLM-4",
    "cpm": "CPM, Chinese",
}
# Rows of the embedding by which a published model is known.
_MODELS = {
    150528: "ChatGLM-6B of the first generation (March 2023, revision 096f3de6)",
    130528: "ChatGLM-6B, slim (April 2023 and later)",
    65024: "ChatGLM2-6B or ChatGLM3-6B",
    151552: "GLM-4",
}
_LONG = {16.0: "chatglm2", 50.0: "chatglm3"}  # rope_ratio of chatglm2-6b-32k and of chatglm3-6b-32k, as published


def generation(config: Mapping[str, Any]) -> str:
    """A key of WORDS; "first" and "slim" are the two of ChatGLM-6B. Never raises.

    ChatGLM2 and 3 have the same tensors and the same vocabulary file. What tells them apart is what config.json says
    of itself: a name, the repository of its code (which a fine-tune keeps), the rope_ratio of the two published 32k
    models, else the library version it was written with (4.27 and 4.30).
    """
    if "multi_query_attention" not in config and "padded_vocab_size" not in config:
        vocabulary = _whole(config.get("vocab_size"))
        early = vocabulary is None or vocabulary >= FIRST_VOCABULARY or config.get("bos_token_id") == 150004
        return "first" if early else "slim"
    if (_whole(config.get("padded_vocab_size")) or _whole(config.get("vocab_size")) or 0) > GLM4_ENDOFTEXT:
        return "glm4"
    names = f"{config.get('_name_or_path', '')} {config.get('name_or_path', '')}", f"{config.get('auto_map', '')}"
    for named in map(str.lower, names):
        for family in ("chatglm3", "chatglm2"):
            if family in named:
                return family
    ratio = config.get("rope_ratio")
    if isinstance(ratio, int | float) and ratio in _LONG:
        return _LONG[ratio]
    version = str(config.get("transformers_version", "")).split(".")
    early = len(version) > 1 and version[0] == "4" and version[1].isdigit() and int(version[1]) < 30
    return "chatglm2" if early else "chatglm3"


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def is_cpm(config: Mapping[str, Any]) -> bool:
    """The Chinese GPT-2 of CPM, which is known by its 30,000 rows."""
    return config.get("model_type") == "gpt2" and config.get("vocab_size") == 30_000


def model_of_embedding(shape: tuple[int, ...]) -> str | None:
    """Which published model has an embedding of this shape, in words; None if none is known."""
    return _MODELS.get(shape[0]) if len(shape) == 2 else None
