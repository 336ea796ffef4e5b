"""Prefixes: the keys and values that P-Tuning v2, prefix tuning and prompt tuning put in front of the cache.

THUDM stores an encoder, PEFT the finished rows; both lie as [length, layers, key and value, kv_heads, head_dim]
(Liu et al. 2021; Li and Liang 2021). Prompt tuning (Lester et al. 2021) stores embeddings; the network itself turns
them into keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from glmchat.checkpoints.adapter_settings import incomplete_adapter
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.weight_files import PREFIX_ENCODER
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.engine.adapters.files import Adapter
from glmchat.engine.adapters.lora import require_finite
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.prefix import key_values
from glmchat.engine.models.transformers_model import Fallback

_EMBEDDINGS = ("model.embed_tokens", "transformer.wte", "transformer.word_embeddings",
               "transformer.embedding.word_embeddings")  # fmt: skip
_WORDS = ("transformer.word_embeddings.weight", "transformer.embedding.word_embeddings.weight")


def check_prefix(adapter: Adapter, spec: ModelSpec, model: LanguageModel) -> None:
    """Raise Usage or Damaged if the prefix does not fit this model. Reads no numbers."""
    if isinstance(model, Fallback) and not spec.causal:
        raise Usage(
            tr("the cache of this {family} model holds more than keys and values, so it cannot use a prefix",
               family=spec.family),
            hint=tr("use a LoRA, or an adapter of another kind"),
            code="adapter.family",
        )  # fmt: skip
    shapes = adapter.tensors.shapes()
    if adapter.form == "thudm":
        if not spec.family.startswith("chatglm"):
            raise Usage(
                tr(
                    "this is a P-Tuning prefix for ChatGLM, but this model is of the family {family}",
                    family=spec.family,
                ),
                hint=tr("use it with the ChatGLM-6B or ChatGLM2-6B it was trained on"),
                code="adapter.family",
            )
        for name in _WORDS:  # the older form holds the whole checkpoint
            rows = shapes.get(name, (spec.vocab_size,))[0]
            if rows != spec.vocab_size:
                raise Usage(
                    tr(
                        "the checkpoint of this prefix has a vocabulary of {rows}, but this model has {vocab_size}",
                        rows=rows,
                        vocab_size=spec.vocab_size,
                    ),
                    hint=tr("it was trained on another revision of the model"),
                    code="adapter.vocabulary",
                )
        _check_encoder(shapes, spec)
        return
    if adapter.kind == "prompt":
        _expect(shapes["prompt_embeddings"][1], spec.hidden_size, "virtual tokens of hidden size")
    else:
        _expect(shapes["prompt_embeddings"][1], _width(spec), _what(spec))
    if adapter.length >= spec.context:
        raise Damaged(
            tr(
                "{length} virtual tokens leave no room in a context of {context}",
                length=adapter.length,
                context=spec.context,
            ),
            hint=tr("the configuration is damaged"),
            code="adapter.length",
        )


def _check_encoder(shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec) -> None:
    sizes = {
        name.removeprefix(PREFIX_ENCODER): shape for name, shape in shapes.items() if name.startswith(PREFIX_ENCODER)
    }
    width = _width(spec)
    embedded = sizes["embedding.weight"][1]
    if len(sizes) == 1:
        _expect(embedded, width, _what(spec))
        return
    outer = sizes.get("trans.2.weight", ())
    inner = sizes.get("trans.0.weight", ())
    expected = {"embedding.weight", "trans.0.weight", "trans.0.bias", "trans.2.weight", "trans.2.bias"}
    if set(sizes) != expected or len(outer) != 2 or len(inner) != 2 or inner != (outer[1], embedded):
        raise incomplete_adapter(
            tr(
                "the prefix encoder's parts do not match: {parts}",
                parts=", ".join(f"{k} {list(v)}" for k, v in sizes.items()),
            ),
            tr("the file is incomplete, or comes from two training runs"),
        )
    if sizes["trans.0.bias"] != (outer[1],) or sizes["trans.2.bias"] != (outer[0],):
        raise incomplete_adapter(tr("the prefix encoder's biases do not match"), tr("the file is damaged"))
    _expect(outer[0], width, _what(spec))


def _width(spec: ModelSpec) -> int:
    return spec.layers * 2 * spec.kv_heads * spec.head_dim


def _what(spec: ModelSpec) -> str:
    return f"a prefix for {spec.layers} layers of {spec.kv_heads} key heads with {spec.head_dim} numbers, of width"


def _expect(value: int, expected: int, what: str) -> None:
    if value != expected:
        raise Usage(
            tr(
                "this model needs {what} {wanted}, but the adapter has {found}", what=what, wanted=expected, found=value
            ),
            hint=tr("it was trained on a model of a different size"),
            code="adapter.shape",
        )


def read_prefix(adapter: Adapter, spec: ModelSpec, device: str) -> torch.Tensor:
    """[layers, 2, kv_heads, length, head_dim] in float32, or for a prompt its embeddings [length, hidden].

    Raises Damaged for numbers that are not finite.
    """
    if adapter.form == "thudm":
        parts = {
            name.removeprefix(PREFIX_ENCODER): _tensor(adapter, name)
            for name in adapter.tensors.shapes()
            if name.startswith(PREFIX_ENCODER)
        }
        rows = parts["embedding.weight"]
        if "trans.0.weight" in parts:
            inner = torch.tanh(torch.nn.functional.linear(rows, parts["trans.0.weight"], parts["trans.0.bias"]))
            rows = torch.nn.functional.linear(inner, parts["trans.2.weight"], parts["trans.2.bias"])
    else:
        rows = _tensor(adapter, "prompt_embeddings")
    if adapter.kind == "prompt":
        return rows.to(device)
    return key_values(rows, spec).to(device)


def _tensor(adapter: Adapter, name: str) -> torch.Tensor:
    stored = adapter.tensors.read(name)
    tensor = (stored if isinstance(stored, torch.Tensor) else stored.dequantise()).float()
    require_finite(name, tensor)
    return tensor.clone()


def keys_of_prompt(model: LanguageModel, rows: torch.Tensor) -> torch.Tensor:
    """What the network's cache holds after reading virtual tokens rows [length, hidden], as `read_prefix` gives it."""
    if isinstance(model, Fallback):
        return model.keys_of(rows.to(model.dtype))
    name = next(name for name in _EMBEDDINGS if _has(model, name))
    embedding = model.get_submodule(name)
    length = len(rows)
    cache = LanguageModel.new_cache(model, length, model.dtype)  # without the model's own prefix
    model.swap(name, FixedRows(rows.to(model.dtype), embedding))
    try:
        with torch.inference_mode():
            model(torch.arange(length, device=rows.device), cache, last_only=True)
    finally:
        model.swap(name, embedding)
    pairs = [torch.stack(pair).to(rows.device) for pair in zip(cache.keys, cache.values, strict=True)]
    return torch.stack(pairs).float()


class FixedRows(nn.Module):
    """An embedding for one forward pass, whose ids 0, 1, … are virtual tokens; a tied head still finds the real one."""

    def __init__(self, rows: torch.Tensor, base: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.base = base

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.rows[ids]


def _has(model: LanguageModel, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
