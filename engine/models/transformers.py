"""Every other architecture: transformers reads the configuration and makes the network, we read the weights' files.

Packed matrices go into the layers they belong to as they are stored; transformers is given everything else. Nothing
from the model folder runs: no remote code, no kernels that a config.json names, no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from glmchat.checkpoints.architectures import refuse_no_generator, unknown_type
from glmchat.checkpoints.config import integer, token_ids
from glmchat.checkpoints.quantised import packing_of, refuse_unread
from glmchat.checkpoints.spec import ModelSpec
from glmchat.checkpoints.tensor_fit import refuse_misfit
from glmchat.checkpoints.vocabularies import damaged_vocabulary
from glmchat.checkpoints.weight_files import refuse_names
from glmchat.core.errors import Damaged, Failed, GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.families import Checkpoint, Family, Matrices
from glmchat.engine.formats.weights import WeightSource
from glmchat.engine.models.base import LanguageModel, PackedPlace
from glmchat.engine.models.transformers_model import Fallback, first_line, rope_types
from glmchat.engine.prompts.template import template_prompt
from glmchat.engine.quantize.replace import lies_across, quantisable, refuse_mostly_dense
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
# What would change only the form of what a forward returns, or is said of heads that answer with a class.
_OTHER_ANSWERS = ("return_dict", "output_hidden_states", "output_attentions", "id2label", "label2id", "problem_type")


def _clean(config: Any) -> Any:
    """The configuration without the fields that reach for code or for answers of another form; floats that JSON has no
    word for as transformers writes them, {"__float__": "Infinity"}.
    """
    if isinstance(config, list):
        return [_clean(part) for part in config]
    if isinstance(config, Mapping) and config.get("__float__") in ("Infinity", "-Infinity", "NaN"):
        return float(config["__float__"])
    if isinstance(config, Mapping):
        return {
            key: _clean(value) for key, value in config.items() if key.lstrip("_") not in (*_REACHING, *_OTHER_ANSWERS)
        }
    return config


def _known_config(config: Mapping[str, Any], *, without_packing: bool = False) -> Any:
    """without_packing: what config.json says of packed weights is left out, as transformers will see none."""
    from transformers import AutoConfig

    kind = str(config.get("model_type"))
    left_out = ("model_type", "gguf", *(("quantization_config", "quantization") if without_packing else ()))
    clean = {key: value for key, value in _clean(config).items() if key not in left_out}
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
        causal = _can_go_back(text) and not rope_types(text) & {"dynamic", "longrope"}
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


def _can_go_back(config: Any) -> bool:
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    # Before its first use a cache without declared layers makes plain ones.
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def load(checkpoint: Checkpoint, dtype: torch.dtype, source: WeightSource) -> tuple[LanguageModel, dict[str, str]]:
    """The model with all but its packed matrices, and which of those belongs where: parameter -> name in `source`.

    Raises Damaged if weights are missing or damaged, Failed if transformers cannot run the model here.
    """
    from transformers import AutoModelForCausalLM

    packed: frozenset[str] = getattr(source, "packed", frozenset())
    refuse_misfit(checkpoint.config, source.shapes(), packed)
    by_others = packing_of(checkpoint.config) is not None  # it may be said of tensors that are dense
    config = _known_config(checkpoint.config, without_packing=bool(packed) or by_others)
    refuse_unread(checkpoint.config)
    made_by: Any = AutoModelForCausalLM
    places: dict[str, str] = {}
    options: dict[str, Any] = {"config": config, "dtype": dtype, "attn_implementation": _attention(config)}
    if packed:  # what has no place of its own is unpacked: an embedding with a factor, one expert of many; and what
        # others packed lying the other way round, which keeps more of its minima than a kernel's float16
        empty = _without_weights(checkpoint)
        across = _lying_across(empty, packed) if by_others else frozenset[str]()
        made_by, places = type(empty.inner), _places(empty, packed - across)
        options["config"] = empty.inner.config  # of a model that also sees, its text part
        there = {name: source.read(name) for name in source.shapes() if name not in places.values()}
        dense = {n: t if isinstance(t, torch.Tensor) else t.dequantise() for n, t in there.items()}
        options["state_dict"] = {n: t.t().contiguous() if n in across else t for n, t in dense.items()}
        options["quantization_config"] = _preparing()(places)
    with _in_our_words(checkpoint):
        inner, info = made_by.from_pretrained(
            None if packed else str(checkpoint.path),
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    misshapen = sorted(f"{name} is {list(held)} instead of {list(own)}" for name, held, own in info["mismatched_keys"])
    refuse_names(checkpoint.spec.family, [], [], misshapen, None)
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
    return Fallback(checkpoint.spec, cast(nn.Module, inner)), {f"inner.{place}": name for place, name in places.items()}


@contextmanager
def _in_our_words(checkpoint: Checkpoint) -> Iterator[None]:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, GlmchatError):
        raise
    except Exception as error:  # noqa: BLE001 - hundreds of architectures, each with checks of its own
        raise Failed(
            tr(
                "transformers cannot load this {family} model: {error}",
                family=one_line(checkpoint.spec.family, 40),
                error=first_line(error),
            ),
            hint=tr("verify the files; a model that needs its own code or another package cannot be run"),
            code="fallback.load",
        ) from None


def _without_weights(checkpoint: Checkpoint) -> Fallback:
    """The network on the meta device. Raises Failed if transformers cannot make it."""
    from transformers import AutoModelForCausalLM

    config = _known_config(checkpoint.config, without_packing=True)
    with _in_our_words(checkpoint), torch.device("meta"):
        return Fallback(checkpoint.spec, AutoModelForCausalLM.from_config(config))


def _parameters(model: Fallback, names: Iterable[str]) -> tuple[dict[str, str], bool]:
    """A file's tensor -> the parameter of `model.inner` that it is; none of those that transformers does not use, or
    makes other tensors of. And whether there are such."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    inner = cast(Any, model.inner)
    rules, parameters = get_model_conversion_mapping(inner), inner.state_dict()
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    table, joined = {}, False
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, inner.base_model_prefix, parameters)
        if renamed not in parameters and name in parameters:
            renamed, pattern = name, None
        if pattern is None and renamed in parameters:
            table[name] = renamed
        joined = joined or pattern is not None
    return table, joined


def matrices(checkpoint: Checkpoint, names: Iterable[str]) -> Matrices:
    """What is known of a file's tensors. Raises Usage where most weights are no plain matrices."""
    model = _without_weights(checkpoint)
    table, joined = _parameters(model, names)
    found = quantisable(model)
    refuse_mostly_dense(model, [name for name, _, _ in found])
    places = {f"{place.removeprefix('inner.')}.weight": (inputs, is_end) for place, inputs, is_end in found}
    shapes = {key: tuple(value.shape) for key, value in model.inner.state_dict().items()}
    return Matrices(
        {name: places[parameter] for name, parameter in table.items() if parameter in places},
        {name: shapes[parameter] for name, parameter in table.items()},
        _lying_across(model, table),
        joined,
    )


def _places(model: Fallback, packed: Iterable[str]) -> dict[str, str]:
    """Parameter -> the packed matrix that belongs there, of layers that compute nothing but a product or a lookup."""
    plain = {f"{place.removeprefix('inner.')}.weight" for place, _, _ in quantisable(model)}
    names = {place: name for name, place in _parameters(model, packed)[0].items() if place in plain}
    tied = cast(Any, model.inner).all_tied_weights_keys
    names |= {place: names[other] for place, other in tied.items() if place in plain and other in names}
    return names


def _lying_across(model: Fallback, names: Iterable[str]) -> frozenset[str]:
    """Those of a file's matrices that a Conv1D holds [in, out]; what is packed is [out, in] as of a plain layer."""
    places = {f"{path}.weight" for path, module in model.inner.named_modules() if lies_across(module)}
    return frozenset(name for name, place in _parameters(model, names)[0].items() if place in places)


@cache
def _preparing() -> Any:
    """A quantizer, transformers' own way to let others exchange layers before weights are read: ours only makes room
    in them."""
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @register_quantization_config("glmchat")
    class Places(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, places: Mapping[str, str]) -> None:
            self.quant_method = "glmchat"
            self.places = places

    @register_quantizer("glmchat")
    class Preparing(HfQuantizer):  # type: ignore[misc]
        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for place in self.quantization_config.places:
                path = place.removesuffix(".weight")
                model.set_submodule(path, PackedPlace(model.get_submodule(path)))
            tied = model.all_tied_weights_keys
            for place in [place for place in tied if place in self.quantization_config.places]:
                del tied[place]

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self.remove_quantization_config(model)

        is_serializable = is_trainable = property(lambda self: False)

    return Places


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
    matrices=matrices,
    parse=parse,
)
