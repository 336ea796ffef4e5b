"""LoRA that is being learned (Hu et al. 2021), on dense and on packed layers; rank-stabilised and DoRA, too.

Factors are float32 whatever the base is. They are multiplied in the type of the activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from glmchat.checkpoints.adapter_settings import GUIDE_ALPHA
from glmchat.core.errors import Damaged
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.engine.adapters.low_rank import row_lengths
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear
from glmchat.engine.quantize.replace import lies_across
from glmchat.tuning.products import Packed
from glmchat.tuning.settings import ALL_LINEAR, targeted

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HEADS = ("lm_head", "output_layer", "embed_out", "score")


@dataclass(frozen=True, slots=True)
class LoraShape:
    """What a LoRA is made of. targets: last names of layers, one regular expression for whole names, or
    "all-linear": every linear layer but the head."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = ALL_LINEAR
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """y = base(x) + scale * B A dropout(x); with DoRA each output then gets a learned length (Liu et al. 2024).

    lora_A [rank, in] and lora_B [out, rank] are float32, B is zero at the beginning. lora_magnitude [out].
    """

    def __init__(self, base: nn.Module, shape: LoraShape, noise: torch.Generator | None = None) -> None:
        super().__init__()
        self.base = base
        self.shape, self.is_on = shape, True
        inner = base.base if isinstance(base, Packed) else base
        self.in_features, self.out_features = measures_of(base)
        device = next(t.device for t in (*inner.parameters(), *inner.buffers()))
        drawn = torch.empty(shape.rank, self.in_features)
        if device.type != "meta":
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=noise)
        self.lora_A = nn.Parameter(drawn.to(device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, shape.rank, device=device))
        if shape.dora:
            nothing = torch.zeros(self.out_features, shape.rank, device=device)
            lengths = row_lengths(_upright(inner), torch.zeros_like(self.lora_A), nothing)
            self.lora_magnitude = nn.Parameter(lengths.clone())
            self.register_buffer("squares", lengths.square(), persistent=False)

    @property
    def bias(self) -> torch.Tensor | None:
        return cast("torch.Tensor | None", self.base.bias)

    @property
    def weight(self) -> torch.Tensor:
        """What the layer multiplies with, for networks that take a layer's matrix instead of calling it (Mamba)."""
        own = cast(torch.Tensor, self.base.weight)
        if not self.is_on:
            return own
        added = (self.shape.scale * self.lora_B @ self.lora_A).to(own.dtype)
        whole = own + (added.t() if lies_across(self.base) else added)
        if not self.shape.dora:
            return whole
        ratio = (self.lora_magnitude / self._lengths()).to(own.dtype)
        return whole * (ratio if lies_across(self.base) else ratio[:, None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        if not self.is_on:
            return cast(torch.Tensor, y)
        dropped = functional.dropout(x, self.shape.dropout, self.training) if self.shape.dropout else x
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        small = functional.linear(dropped, a) * self.shape.scale
        if not self.shape.dora:
            # In place: nobody keeps what a frozen layer gave.
            return cast(torch.Tensor, y.addmm_(small, b.t()) if y.dim() == 2 else y + functional.linear(small, b))
        added = functional.linear(small, b)
        ratio = (self.lora_magnitude / self._lengths()).to(y.dtype)
        if dropped is not x and self.training:  # as PEFT has it: what the lengths change is computed of what was left
            return cast(torch.Tensor, y + (ratio - 1) * self._without_bias(self.base(dropped)) + ratio * added)
        whole = (self._without_bias(y) + added) * ratio
        return whole if self.bias is None else whole + self.bias.to(y.dtype)

    def _without_bias(self, y: torch.Tensor) -> torch.Tensor:
        return y if self.bias is None else y - self.bias.to(y.dtype)

    @torch.no_grad()
    def product(self) -> tuple[torch.Tensor, torch.Tensor]:
        """down [in, rank] and up [rank, out] of what it adds to a product without bias, lengths of a DoRA included."""
        up = self.shape.scale * self.lora_B.t()
        return self.lora_A.t(), up * (self.lora_magnitude / self._lengths()) if self.shape.dora else up

    @torch.no_grad()
    def _lengths(self) -> torch.Tensor:
        """Of the rows of W + scale * B A, without W: of its product with the few rows of A alone. No gradient flows."""
        scale, b = self.shape.scale, self.lora_B
        inner = self.base.base if isinstance(self.base, Packed) else self.base
        crossed = inner(self.lora_A.to(_type_of(inner))).float()  # [rank, out]
        if self.bias is not None:
            crossed = crossed - self.bias.float()
        gram = self.lora_A @ self.lora_A.t()
        added = 2 * scale * (crossed.t() * b).sum(1) + scale * scale * ((b @ gram) * b).sum(1)
        return cast(torch.Tensor, (cast(torch.Tensor, self.squares) + added).clamp_min(1e-12).sqrt())


def measures_of(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, transformers' Conv1D too."""
    if lies_across(layer):
        return cast(int, layer.nx), cast(int, layer.nf)
    return cast(int, layer.in_features), cast(int, layer.out_features)


def _upright(layer: nn.Module) -> nn.Module:
    """The layer, or for a Conv1D a linear layer over the same numbers."""
    if not lies_across(layer):
        return layer
    with torch.device("meta"):
        plain = nn.Linear(*measures_of(layer), bias=False)
    plain.weight = nn.Parameter(cast(torch.Tensor, layer.weight).t(), requires_grad=False)
    return plain


def _type_of(layer: nn.Module) -> torch.dtype:
    weight = getattr(layer, "weight", None)
    return weight.dtype if isinstance(weight, torch.Tensor) else torch.float32


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | QuantLinear | Packed) or lies_across(module)


def targets_of(model: LanguageModel, targets: Sequence[str] | str) -> list[str]:
    """Names of the layers, first to last. Raises Usage where a target names none."""
    names = [name for name, module in model.named_modules() if is_linear(module) and not name.endswith(".base")]
    plain = {name: name.removeprefix("inner.") for name in names}
    if targets == ALL_LINEAR:
        rows = model.spec.vocab_size
        inside = [n for n in names if n.rpartition(".")[2] not in _HEADS]
        return [n for n in inside if measures_of(model.get_submodule(n))[1] != rows or ".layers." in n or ".h." in n]
    found = set(targeted(targets, list(plain.values()), (name.rpartition(".")[2] for name in names)))
    return [name for name in names if plain[name] in found]


def prepare(model: LanguageModel) -> None:
    """Let gradients pass through every packed layer; nothing of the base learns."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        holder = model.get_submodule(name.rpartition(".")[0])
        if type(module) is QuantLinear and not isinstance(holder, QuantEmbedding):
            model.swap(name, Packed(module))


def attach(model: LanguageModel, shape: LoraShape, seed: int) -> dict[str, LoraLinear]:
    """Put a LoRA on every target of a prepared model. Returns the layers by their names."""
    noise = torch.Generator().manual_seed(seed)
    found = {name: LoraLinear(model.get_submodule(name), shape, noise) for name in targets_of(model, shape.targets)}
    for name, layer in found.items():
        model.swap(name, layer)
    return found


@contextmanager
def switched_off(layers: Mapping[str, LoraLinear]) -> Iterator[None]:
    """Within it the layers answer as the base alone does."""
    for layer in layers.values():
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers.values():
            layer.is_on = True


def trainable(layers: Mapping[str, LoraLinear]) -> dict[str, nn.Parameter]:
    """The tensors that learn, by the names that they have in a file of PEFT's."""
    tensors: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        start = f"base_model.model.{name.removeprefix('inner.')}"
        tensors[f"{start}.lora_A.weight"] = layer.lora_A
        tensors[f"{start}.lora_B.weight"] = layer.lora_B
        if layer.shape.dora:
            tensors[f"{start}.lora_magnitude_vector"] = layer.lora_magnitude
    return tensors


def change_norm(layers: Mapping[str, LoraLinear]) -> float:
    """The length of all that the adapter adds to the weights: sqrt of the sum of |scale * B A|^2."""
    total = 0.0
    for layer in layers.values():
        a, b = layer.lora_A.detach(), layer.lora_B.detach()
        total += float(((b.t() @ b) * (a @ a.t())).sum()) * layer.shape.scale**2
    return math.sqrt(max(total, 0.0))


def count(model: nn.Module, layers: Mapping[str, LoraLinear]) -> tuple[int, int]:
    """(numbers that learn, all numbers of the model with them); a matrix that is embedding and head counts once."""
    learning = sum(p.numel() for p in trainable(layers).values())
    packed = {id(m.packed): m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantLinear)}
    own = {id(p): p.numel() for p in model.parameters()}
    return learning, sum(own.values()) + sum(packed.values())


# The adapter as a file that others read


def write_adapter(
    folder: Path,
    layers: Mapping[str, LoraLinear],
    shape: LoraShape,
    base: str,
    *,
    lies_in_out: bool = False,
    linears: Mapping[str, nn.Module] | None = None,
) -> None:
    """adapter_config.json and adapter_model.safetensors, float32. lies_in_out: the checkpoint's matrices are [in, out]
    (GPT-2's Conv1D). linears: all linear layers by name, to name the targets in as few words as are unambiguous."""
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in trainable(layers).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = _config(layers, shape, base, lies_in_out, linears or {})
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(
    layers: Mapping[str, LoraLinear], shape: LoraShape, base: str, lies_in_out: bool, linears: Mapping[str, nn.Module]
) -> dict[str, Any]:
    across = lies_in_out or any(lies_across(layer.base) for layer in layers.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": shape.rank,
        "lora_alpha": shape.alpha,
        "lora_dropout": shape.dropout,
        "target_modules": target_words(layers, linears),
        "bias": "none",
        "fan_in_fan_out": across,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": shape.rslora,
        "use_dora": shape.dora,
        "modules_to_save": None,
    }


def target_words(layers: Mapping[str, LoraLinear], linears: Mapping[str, nn.Module]) -> list[str]:
    """Last names where these mean exactly the layers that learn, whole names else."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    meant = {name for name, module in linears.items() if is_linear(module) and name.rpartition(".")[2] in ends}
    if meant <= set(layers):
        return ends
    return sorted(name.removeprefix("inner.") for name in layers)


def write_bare(path: Path, folder: Path) -> None:
    """The adapter of a folder as one file of tensors, as the LoRA guide for ChatGLM-6B saves it (`chatglm-6b-lora.pt`).

    Such a file says nothing of its scale: it is brought to the alpha that the guide, and whoever reads it, assumes.
    """
    config, tensors = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    rank, alpha = config["r"], config["lora_alpha"]
    times = alpha / (math.sqrt(rank) if config["use_rslora"] else rank) / (GUIDE_ALPHA / rank)
    torch.save(
        {
            name.removesuffix(".weight") + ".default.weight": value * times if ".lora_B." in name else value
            for name, value in tensors.items()
        },
        path,
    )


def read_into(folder: Path, layers: Mapping[str, LoraLinear]) -> None:
    """Put the numbers of a saved adapter into layers of the same shape. Raises Damaged where they do not fit."""
    read_tensors(load_file(folder / WEIGHTS), trainable(layers))


def read_tensors(saved: Mapping[str, torch.Tensor], own: Mapping[str, nn.Parameter]) -> None:
    """Put saved numbers into the tensors of the same names. Raises Damaged where they do not fit."""
    wrong = [name for name, value in own.items() if name not in saved or saved[name].shape != value.shape]
    if wrong or len(saved) != len(own):
        name = wrong[0] if wrong else next(name for name in saved if name not in own)
        raise Damaged(
            tr("the checkpoint has nothing that fits for {name}", name=one_line(name, 120)),
            hint=tr("it belongs to a run with other settings"),
            code="tune.checkpoint",
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(saved[name])
