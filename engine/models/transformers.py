"""Every other architecture: transformers' own implementation behind our face, with transformers' own cache.

Nothing from the model folder runs: no remote code, no kernels that a config.json names, no network.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from glmchat.checkpoints.architectures import refuse_no_generator, unknown_type
from glmchat.checkpoints.config import integer, token_ids
from glmchat.checkpoints.quantised import refuse_unread
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.core.errors import Damaged, Failed
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint, Family
from glmchat.engine.formats.weights import open_folder
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.layers import prepare_embedding
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.prompts.template import template_prompt
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.loading import load_plain_tokenizer

if TYPE_CHECKING:
    from glmchat.engine.tokenizers.hf import HFTokenizer

# Fields by which a config.json reaches for code or kernels. They are dropped at every depth.
_REACHING = (
    "auto_map",
    "attn_implementation",
    "experts_implementation",
    "use_kernels",
    "kernel_config",
    "custom_pipelines",
)


# Types whose forward counts positions from 0 in every pass, whatever the cache holds; `generate` tells them.
_COUNT_FROM_ZERO = frozenset({"bamba", "kimi_linear"})


class TransformersCache(KVCache):
    """transformers' cache with the measures our decode loop asks for; it grows as it is filled."""

    def __init__(self, capacity: int, config: Any, can_go_back: bool, prefix: torch.Tensor | None = None) -> None:
        """can_go_back: False for layers that remember more than keys and values, which can only start again.
        prefix: [layers, 2, kv_heads, length, head_dim] that every beginning begins with."""
        self._config, self._can_go_back, self._rows = config, can_go_back, prefix
        self.prefix = self.shift = 0 if prefix is None else prefix.shape[3]
        self.capacity = capacity + self.prefix
        self.layout = None
        self._text = torch.empty(0, dtype=torch.long)
        self._empty()

    def _empty(self) -> None:
        from transformers import DynamicCache

        self.inner: Any = DynamicCache(config=self._config)
        self.length = self.prefix
        for layer, (keys, values) in enumerate(() if self._rows is None else self._rows):
            self.inner.update(keys[None], values[None], layer)

    def truncate(self, length: int) -> None:
        if length <= self.prefix or (length < self.length and not self._can_go_back):
            self._empty()
        elif self._can_go_back:
            for layer in self.inner.layers:  # one by one: a forward pass that was stopped has filled only the first
                if (more := layer.get_seq_length() - length) > 0:
                    layer.crop(-more)
            self.length = min(self.length, length)

    def again(self, ids: torch.Tensor, switch: int) -> torch.Tensor:
        """What has to be read so that the cache holds `ids` too: these, or the whole text where it goes beyond `switch`
        positions for the first time."""
        text = torch.cat((self._text[: self.length - self.prefix], ids)) if self.length > self.prefix else ids
        crosses = 0 < self.length <= switch < self.prefix + len(text)
        self._text = text
        if not crosses or self.length == self.prefix:
            return ids
        self._empty()
        return text

    def whole(self, ids: torch.Tensor) -> torch.Tensor:
        """The text so far with `ids`, for models that keep nothing between passes."""
        self._text = torch.cat((self._text[: self.length - self.prefix], ids))
        return self._text

    @property
    def nbytes(self) -> int:
        tensors = (getattr(layer, name, None) for layer in self.inner.layers for name in ("keys", "values"))
        return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


class Fallback(PrefixedModel):
    """One transformers model."""

    def __init__(self, spec: ModelSpec, inner: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.inner = inner
        self._between: Callable[[], None] | None = None
        self._stopped: Exception | None = None
        self._compute: Callable[..., Any] = inner.__call__
        accepted = inspect.signature(inner.forward).parameters
        self._short = "logits_to_keep" in accepted
        self._switch = _switch(getattr(inner, "config", None))
        # RWKV, the first GPT, MiniMax and CPM-Ant take no cache of these: their whole text is read for each token.
        self._caches = ("past_key_values" in accepted or "cache_params" in accepted) and _takes_our_cache(inner)
        self._count_from_zero = getattr(getattr(inner, "config", None), "model_type", None) in _COUNT_FROM_ZERO
        self._cache_name = "past_key_values" if "past_key_values" in accepted else "cache_params"
        for layer in _layers(inner, spec.layers):
            layer.register_forward_pre_hook(self._pass)

    def _pass(self, module: nn.Module, arguments: Any) -> None:
        if self._between is None:
            return
        try:
            self._between()
        except Exception as error:
            self._stopped = error  # what the caller raised to stop is the caller's own
            raise

    def compute_with(self, stand_in: nn.Module | None) -> None:
        """From now on this module computes, with the same face as `inner`; None: `inner` itself again."""
        self._compute = (self.inner if stand_in is None else stand_in).__call__

    def prepare(self, dtype: torch.dtype, device: str) -> None:
        for module in self.inner.modules():
            prepare_embedding(module, dtype)

    def new_cache(self, capacity: int, dtype: torch.dtype | None = None) -> KVCache:
        rows = self.prefix_key_values
        prefix = None if rows is None else rows.to(dtype or self.dtype)
        return TransformersCache(capacity, cast(Any, self.inner).config, self.spec.causal, prefix)

    def keys_of(self, rows: torch.Tensor) -> torch.Tensor:
        """What a cache holds after reading embeddings [length, hidden]: [layers, 2, kv_heads, length, head_dim]."""
        cache = TransformersCache(len(rows), cast(Any, self.inner).config, self.spec.causal)
        with torch.inference_mode():
            self._compute(inputs_embeds=rows[None], use_cache=True, **{self._cache_name: cache.inner})
        return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.inner.layers]).float()

    def forward(
        self,
        ids: torch.Tensor,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        between_layers: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        self._between = between_layers
        options: dict[str, Any] = {"logits_to_keep": 1} if last_only and self._short else {}
        if cache is None and self.prefix_key_values is not None:
            cache = self.new_cache(len(ids))
        try:
            if isinstance(cache, TransformersCache) and not self._caches:
                output = self._compute(input_ids=cache.whole(ids)[None], use_cache=False)
                cache.advance(ids.shape[0])
            elif isinstance(cache, TransformersCache):
                if self._switch is not None:
                    ids = cache.again(ids, self._switch)
                if self._count_from_zero:
                    options["position_ids"] = torch.arange(cache.length, cache.length + len(ids))[None].to(ids.device)
                output = self._compute(
                    input_ids=ids[None], use_cache=True, **{self._cache_name: cache.inner}, **options
                )
                cache.advance(ids.shape[0])
            else:
                output = self._compute(input_ids=ids[None], use_cache=False, **options)
        except Exception as error:
            if self._stopped is error or isinstance(error, MemoryError) or "memory" in str(error):
                raise
            raise Failed(
                tr(
                    "transformers cannot compute this {family} model: {error}",
                    family=one_line(self.spec.family, 40),
                    error=_first_line(error),
                ),
                hint=tr("the installed transformers cannot run it with these settings; use another model"),
                code="fallback.compute",
            ) from error
        finally:
            self._between = self._stopped = None
        logits: torch.Tensor = output.logits[0]
        return (logits[-1:] if last_only else logits[-ids.shape[0] :]).float()


def _takes_our_cache(inner: nn.Module) -> bool:
    """transformers knows most of the types that do not; CPM-Ant's forward puts its prompt before a cached one again."""
    supports = getattr(inner, "_supports_default_dynamic_cache", None)
    return supports is None or (bool(supports()) and getattr(inner, "base_model_prefix", "") != "cpmant")


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__, 160)


def _layers(inner: nn.Module, count: int) -> list[nn.Module]:
    """The decoder's layers: the first list of modules that is as long as the config says."""
    lists = (module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


def _clean(config: Any) -> Any:
    """The configuration without the fields that reach for code; floats that JSON has no word for as transformers
    writes them, {"__float__": "Infinity"}."""
    if isinstance(config, list):
        return [_clean(part) for part in config]
    if isinstance(config, Mapping) and config.get("__float__") in ("Infinity", "-Infinity", "NaN"):
        return float(config["__float__"])
    if isinstance(config, Mapping):
        return {key: _clean(value) for key, value in config.items() if key.lstrip("_") not in _REACHING}
    return config


def _known_config(config: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    clean = {key: value for key, value in _clean(config).items() if key not in ("model_type", "gguf")}
    try:
        return AutoConfig.for_model(kind, **clean)
    except (ValueError, KeyError):
        raise unknown_type(kind, "auto_map" in config) from None
    except Exception as error:  # the strict classes of its configurations raise plain subclasses of it
        if isinstance(error, MemoryError):
            raise
        raise _not_described(kind, error) from None


def _not_described(kind: str, error: Exception) -> Damaged:
    return Damaged(
        tr(
            "config.json does not describe a {kind} model: {error}",
            kind=one_line(kind, 40),
            error=one_line(str(error), 100),
        ),
        hint=tr("pull the model again; if that does not help, the installed transformers cannot run it"),
        code="config.damaged",
    )


def _measure(config: Any, name: str) -> Any:
    """A measure of the network; the largest where its layers differ (Gemma 3n, Gemma 4)."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers' way of saying that each layer has one of its own
        value = [getattr(layer, name, None) for layer in config.per_layer_config]
    if isinstance(value, list | tuple):
        return max((number for number in value if isinstance(number, int)), default=None)
    return value


def parse(config: Mapping[str, Any]) -> ModelSpec:
    """Measures as transformers names them. Raises Damaged for an architecture that it does not know either."""
    refuse_no_generator(config, natively=False)
    known = _known_config(config)
    try:
        text = known.get_text_config()
        causal = _can_go_back(text) and not _rope_types(text) & {"dynamic", "longrope"}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _not_described(str(config["model_type"]), error) from None
    found = {
        name: _measure(text, name)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                     "head_dim", "intermediate_size", "max_position_embeddings")
    }  # fmt: skip
    hidden = integer(found, "hidden_size", high=2**17)
    heads = integer(found, "num_attention_heads", high=2048, default=1)
    vocab = integer(found, "vocab_size", high=2**22)
    head_dim = integer(found, "head_dim", high=2**13, default=max(hidden // heads, 1))
    return ModelSpec(
        family=str(config["model_type"]),
        vocab_size=vocab,
        hidden_size=hidden,
        layers=integer(found, "num_hidden_layers", high=1000),
        heads=heads,
        kv_heads=integer(found, "num_key_value_heads", high=2048, default=heads),
        head_dim=head_dim,
        ffn_size=integer(found, "intermediate_size", high=2**20, default=4 * hidden),
        context=integer(found, "max_position_embeddings", high=2**26, default=2048),
        # A cache with windows or running states cannot be cut back to a common prefix.
        causal=causal,
        eos_ids=token_ids(config.get("eos_token_id", getattr(known, "eos_token_id", None)), vocab),
        bos_id=next(iter(token_ids(config.get("bos_token_id"), vocab)), None),
        generation="through transformers",
    )


def _rope_types(config: Any) -> set[str]:
    """Of every kind of layer. Two look at how long the whole text is, so what was read is right for that text alone."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, Mapping))]
    return {str(part["rope_type"]) for part in parts if part.get("rope_type")}


def _switch(config: Any) -> int | None:
    """Positions up to which Phi's longrope takes its short factors. transformers' `generate` reads the whole text anew
    where an answer goes beyond them (`prepare_inputs_for_generation`); None for models that never do."""
    if getattr(config, "model_type", None) not in ("phi3", "phimoe", "phi4_multimodal"):
        return None
    length = getattr(config, "original_max_position_embeddings", None)
    return length if isinstance(length, int) and "longrope" in _rope_types(config) else None


def _can_go_back(config: Any) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    # Before its first use a cache without declared layers makes plain ones.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def load(checkpoint: Checkpoint, dtype: torch.dtype) -> LanguageModel:
    """Raises Damaged if weights are missing or damaged, Failed if transformers cannot run the model here."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    refuse_unread(checkpoint.config, natively=False)
    # Pointers, missing shards and paths that lead elsewhere are refused in our words.
    open_folder(checkpoint.path)
    config = _known_config(checkpoint.config)
    try:
        inner, info = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.path),
            config=config,
            dtype=dtype,
            attn_implementation=_attention(config),
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # noqa: BLE001 - hundreds of architectures, each with checks of its own
        raise Failed(
            tr(
                "transformers cannot load this {family} model: {error}",
                family=one_line(checkpoint.spec.family, 40),
                error=_first_line(error),
            ),
            hint=tr("verify the files; a model that needs its own code or another package cannot be run"),
            code="fallback.load",
        ) from None
    missing = sorted(map(str, info["missing_keys"]))
    if missing:
        raise Damaged(
            tr(
                "{missing} tensors are missing: {missing2}",
                missing=len(missing),
                missing2=one_line(", ".join(missing), 100000),
            ),
            hint=tr("config.json and the weights belong to different models: pull the model again"),
            code="weights.names",
        )
    return Fallback(checkpoint.spec, cast(nn.Module, inner))


def _attention(config: Any) -> str:
    """torch's own attention where the model takes it, plain arithmetic else; never what a config.json asks for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        return "sdpa" if getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False) else "eager"
    except KeyError:
        return "sdpa"


def _build(spec: ModelSpec) -> LanguageModel:
    raise AssertionError("the fallback loads itself")


def _load_tokenizer(folder: Path, spec: ModelSpec) -> Tokenizer:
    if (folder / "tokenizer.json").is_file() or not any(
        (folder / name).is_file() for name in ("vocab.json", "vocab.txt")
    ):
        return load_plain_tokenizer(folder, spec)
    return _converted(folder)


def _converted(folder: Path) -> HFTokenizer:
    """Older folders: vocab.json and merges.txt, put together by transformers."""
    from transformers import AutoTokenizer

    from glmchat.engine.tokenizers.hf import wrap

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True, use_fast=True
        )
        return wrap(tokenizer.backend_tokenizer)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, AttributeError, TypeError) as error:
        raise damaged_vocabulary(
            tr(
                "the vocabulary in {folder} cannot be read: {error}",
                folder=one_line(str(folder)),
                error=one_line(str(error), 120),
            ),
            tr("pull the model again; a tokenizer that needs its own code cannot be used"),
        ) from None


FAMILY = Family(
    name="transformers",
    build=_build,
    rename=lambda name: name,
    load_tokenizer=_load_tokenizer,
    prompt=template_prompt,
    load=load,
    parse=parse,
)
