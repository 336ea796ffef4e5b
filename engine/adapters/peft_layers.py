"""Adapters that PEFT computes, on models that transformers computes: LoHa, LoKr, IA3, VeRA, OFT and the like.

PEFT exchanges layers in the model that it is given. It is given a twin that shares every weight with the loaded model,
which therefore stays as it is. Files are read by our own readers; PEFT sees neither a path nor the name of a hub.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from glmchat.checkpoints.adapter_settings import absurd
from glmchat.checkpoints.peft_kinds import KINDS, settings
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.files import Adapter
from glmchat.engine.adapters.lora import read_number, refuse_strangers
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.transformers_model import Fallback
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

_FAILURES = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    ImportError,
    IndexError,
)


@dataclass(frozen=True, slots=True)
class PeftWeights:
    """An adapter that fits the model: its configuration as PEFT takes it, and its tensors under the file's names."""

    adapter: Adapter
    tensors: Mapping[str, torch.Tensor]

    @property
    def label(self) -> str:
        return KINDS[self.adapter.kind].name


def read_weights(adapter: Adapter, model: LanguageModel) -> PeftWeights:
    """Check every tensor by name and shape against what PEFT makes of this model, then read the numbers.

    Raises Usage or Damaged with the reason; the model stays as it is.
    """
    fallback = require_transformers(adapter, model)
    kind = KINDS[adapter.kind].name
    if any(isinstance(module, QuantLinear | QuantEmbedding) for module in model.modules()):
        raise Usage(
            tr("PEFT computes a {kind} only on weights in 16 or 32 bits, and these are quantised", kind=kind),
            hint=tr("start the model without --quant, or merge the adapter with PEFT"),
            code="adapter.quantised",
        )
    # On the meta device first, so that a file that claims layers of absurd size costs nothing.
    peft_model = _with_layers(_twin(fallback), [adapter])
    expected = _state(peft_model, 0)
    _compare(adapter, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    device = next(model.parameters()).device
    return PeftWeights(adapter, {n: read_number(adapter, n, device, like.dtype) for n, like in expected.items()})


def require_transformers(adapter: Adapter, model: LanguageModel) -> Fallback:
    """Raise Usage for a model that glmchat computes itself, where PEFT has no layers to exchange."""
    if isinstance(model, Fallback):
        return model
    raise Usage(
        tr(
            "this is a {kind}, and glmchat computes {family} models itself, without PEFT",
            kind=KINDS[adapter.kind].name,
            family=model.spec.family,
        ),
        hint=tr(
            "LoRA, DoRA, prefixes and virtual tokens run here; the other kinds need a model that runs "
            "through transformers"
        ),
        code="adapter.family",
    )


def stand_in(model: Fallback, parts: Sequence[tuple[PeftWeights, float]]) -> nn.Module:
    """The network with these adapters active, every one with its weight; it shares all weights with `model`.

    Raises Usage for what PEFT cannot combine.
    """
    twin = _twin(model)
    peft_model = _with_layers(twin, [part.adapter for part, _ in parts])
    from peft import set_peft_model_state_dict

    for number, (part, weight) in enumerate(parts):
        with _in_our_words(part.label):
            # low_cpu_mem_usage puts the tensors in, where copying would write into weights that are shared.
            set_peft_model_state_dict(
                peft_model, dict(part.tensors), adapter_name=_name(number), low_cpu_mem_usage=True
            )
        if weight != 1:
            _weigh(peft_model, number, KINDS[part.adapter.kind].weighed, weight)
    with _in_our_words(parts[0][0].label):
        peft_model.base_model.set_adapter([_name(number) for number in range(len(parts))], inference_mode=True)
    return twin.requires_grad_(False).eval()


def _twin(model: Fallback) -> nn.Module:
    """A copy of the modules, not of their weights; its layers report to the same `model` between layers."""
    shared = (*model.parameters(), *model.buffers(), model)
    twin: nn.Module = copy.deepcopy(model.inner, {id(one): one for one in shared})
    return twin


def _with_layers(twin: nn.Module, adapters: Sequence[Adapter]) -> Any:
    """PEFT's model around `twin`, its own parameters on the meta device."""
    from peft import PeftModel

    peft_model: Any = None
    for number, adapter in enumerate(adapters):
        with _in_our_words(KINDS[adapter.kind].name):
            config = _config(adapter, twin)
            if peft_model is None:
                peft_model = PeftModel(twin, config, adapter_name=_name(number), low_cpu_mem_usage=True)
            else:
                peft_model.add_adapter(_name(number), config, low_cpu_mem_usage=True)
            if adapter.kind == "adalora":
                _prune(twin, number, adapter.config.get("rank_pattern") or {})
    twin.requires_grad_(False)  # PEFT has made biases of the base trainable, and these are the model's own
    return peft_model


def _config(adapter: Adapter, twin: nn.Module) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    made = PEFT_TYPE_TO_CONFIG_MAPPING[adapter.kind.upper()]
    plain = settings(adapter.kind, adapter.config, adapter.tensors.shapes())
    fields = {field.name for field in dataclasses.fields(made) if field.init}
    if adapter.kind == "adalora":
        plain.pop("rank_pattern", None)  # PEFT prunes by it only where the numbers are there: see _prune
    config = made(**{name: value for name, value in plain.items() if name in fields}, inference_mode=True)
    rows = twin.config.vocab_size  # type: ignore[union-attr]
    if any(not 0 <= index < rows for index in getattr(config, "token_indices", ())):
        raise Damaged(
            tr("adapter_config.json names tokens beyond the {rows} of this model", rows=rows),
            hint=tr("it was trained on another vocabulary"),
            code="adapter.tokens",
        )
    return config


def _prune(twin: nn.Module, number: int, ranks: Mapping[str, Any]) -> None:
    """Leave of each AdaLoRA layer the ranks that its training kept (Zhang et al. 2023, as PEFT saves it)."""
    for name, rows in ranks.items():
        layer: Any = twin.get_submodule(name.partition(".lora_E")[0])
        if not isinstance(rows, list) or len(rows) != layer.r[_name(number)]:
            raise absurd("rank_pattern", rows, "true or false for each rank")
        rank = sum(row is True for row in rows)
        for part, side in (("lora_A", 0), ("lora_B", 1), ("lora_E", 0)):
            held = getattr(layer, part)
            held[_name(number)] = nn.Parameter(held[_name(number)].narrow(side, 0, rank), requires_grad=False)


def _state(peft_model: Any, number: int) -> dict[str, torch.Tensor]:
    """What PEFT would save of this adapter, by the names in its files; the numbers are not looked at."""
    from peft import get_peft_model_state_dict

    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        peft_model, adapter_name=_name(number), save_embedding_layers=False
    )
    return state


def _compare(adapter: Adapter, expected: Mapping[str, tuple[int, ...]]) -> None:
    shapes = adapter.tensors.shapes()
    refuse_strangers([name for name in shapes if name not in expected], len(shapes))
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise Damaged(
            tr(
                "the adapter lacks {n} of the {total} tensors that it needs on this model: {names}",
                n=len(missing),
                total=len(expected),
                names=one_line(", ".join(missing[:3]), 300),
            ),
            hint=tr("the file is incomplete, or was trained on a model with fewer layers"),
            code="adapter.incomplete",
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise Usage(
                tr(
                    "{name} is {shape} in the adapter, but {wanted} in this model",
                    name=one_line(name, 120),
                    shape=list(shapes[name]),
                    wanted=list(shape),
                ),
                hint=tr("it was trained on a model of a different size"),
                code="adapter.shape",
            )


def _weigh(peft_model: Any, number: int, attribute: str | None, weight: float) -> None:
    """Multiply what this adapter adds by `weight`; `attribute` of a layer holds a factor or a parameter by name."""
    assert attribute is not None
    name = _name(number)
    for module in peft_model.modules():
        held = getattr(module, attribute, None)
        if not isinstance(held, Mapping | nn.ParameterDict) or name not in held:
            continue
        value = held[name]
        held[name] = (  # type: ignore[index]
            nn.Parameter(value.detach() * weight, requires_grad=False)
            if isinstance(value, nn.Parameter)
            else value * weight
        )


def _name(number: int) -> str:
    """PEFT's name of an adapter: a store's name may hold dots, which names of modules may not."""
    return f"glmchat{number}"


@contextmanager
def _in_our_words(kind: str) -> Iterator[None]:
    """PEFT's refusals as ours; its advice to trainers is nobody's here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _FAILURES as error:
        words = str(error).strip() or type(error).__name__
        raise Usage(
            tr("PEFT cannot use this {kind} on this model: {error}", kind=kind, error=one_line(words, 300)),
            hint=tr("it was trained on another model, or with another version of PEFT"),
            code="adapter.peft",
        ) from None
