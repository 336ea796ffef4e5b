"""The measures of a network as its checkpoint tells them: the one place that counts its weights and its cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The measures of a network, read from config.json or GGUF metadata and checked before memory is taken."""

    family: str  # "llama" | "chatglm" | "chatglm2" | "chatglm3" | "glm4" | "gpt2" | the transformers model_type
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context: int  # longest sequence, prompt and answer together
    causal: bool = True  # False: the prompt is read bidirectionally, a grown prompt is a fresh prefill
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    generation: str | None = None  # which of a family's vocabularies or revisions, in words for `glmchat show`
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only this family's module needs (rope, epsilon, …)
