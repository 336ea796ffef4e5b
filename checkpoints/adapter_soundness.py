"""What an adapter must be by itself, whatever model it is for: whole pairs of one rank, numbers that are finite.

Asked before torch is imported: an adapter that no model could take never comes into the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from glmchat.checkpoints.adapter_settings import LoraSettings
from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import one_line

_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "pretrained_model.")
Shape = tuple[int, ...]


@dataclass(slots=True)
class Names:
    """Where the parts of one layer's change stand in the file."""

    tensors: dict[str, str] = field(default_factory=dict)  # "lora_A", "lora_B", "lora_B.bias", … -> tensor name
    replaced: dict[str, str] = field(default_factory=dict)  # "weight", "bias" -> tensor name

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.tensors

    def add(self, kind: str, name: str) -> None:
        (self.tensors if kind.startswith("lora_") else self.replaced)[kind] = name


def incomplete_adapter(sentence: str, hint: str) -> Damaged:
    """The error for an adapter of which a part is missing, or of which two parts do not belong together."""
    return Damaged(sentence, hint=hint, code="adapter.incomplete")


def split_name(name: str) -> tuple[str, str | None]:
    """Tensor name -> (layer as its model calls it, kind): "lora_A", "lora_B.bias", "weight" or "bias"."""
    for wrapper in _WRAPPERS:
        name = name.rpartition(wrapper)[2] if wrapper == "base_model.model." else name.removeprefix(wrapper)
    parts = [p for p in name.split(".") if p not in ("base_layer",)]
    for index, part in enumerate(parts):
        if part in _KINDS:
            tail = parts[index + 1 :]
            if len(tail) > 2:
                return name, None
            return ".".join(parts[:index]), f"{part}.bias" if tail and tail[-1] == "bias" else part
    if "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        parts = parts[:index] + parts[-1:]
    if "original_module" in parts or parts[-1] not in ("weight", "bias"):
        return name, None
    return ".".join(parts[:-1]), parts[-1]


def check_lora(shapes: Mapping[str, Shape], settings: LoraSettings) -> None:
    """Raise Damaged for half a pair, factors that do not multiply, or a rank that the configuration denies."""
    layers: dict[str, Names] = {}
    for name in shapes:
        layer, kind = split_name(name)
        if kind is not None:
            layers.setdefault(layer, Names()).add(kind, name)
    for layer, names in layers.items():
        for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if one in names.tensors and other in names.tensors:
                changed_shape(layer, shapes[names.tensors[one]], shapes[names.tensors[other]], settings)
            elif one in names.tensors or other in names.tensors:
                there, lacking = (one, other) if one in names.tensors else (other, one)
                raise incomplete_adapter(
                    tr(
                        "the adapter has {there} of {layer} but lacks its {lacking}",
                        there=there,
                        layer=one_line(layer, 120),
                        lacking=lacking,
                    ),
                    tr("the file is incomplete: fetch it again"),
                )


def changed_shape(layer: str, a: Shape, b: Shape, settings: LoraSettings) -> tuple[int, int]:
    """[out, in] of the matrix that these two factors change. Raises Damaged if no matrix is changed like this."""
    groups, blocks = (sum(settings.enable), len(settings.enable)) if settings.enable is not None else (1, 1)
    flat = b[:2] if settings.enable is not None and len(b) == 3 and b[2] == 1 else b  # of a convolution of width 1
    if len(a) != 2 or len(flat) != 2 or not groups or a[0] != flat[1] * groups or flat[0] % groups:
        raise Damaged(
            tr("A {a} and B {b} of {layer} cannot be multiplied", a=list(a), b=list(b), layer=one_line(layer, 120)),
            hint=tr("their ranks differ: the file is damaged, or comes from two training runs"),
            code="adapter.rank",
        )
    rank, out, width = flat[1], flat[0] // groups * blocks, a[1]
    declared = settings.rank_of(layer)
    if declared is not None and declared != rank:
        raise Damaged(
            tr(
                "adapter_config.json gives rank {declared}, but {layer} has {rank}",
                declared=declared,
                layer=one_line(layer, 120),
                rank=rank,
            ),
            hint=tr("the configuration and the weights come from two different training runs"),
            code="adapter.rank",
        )
    if not 0 < rank <= min(out, width):
        raise Damaged(
            tr(
                "a rank of {rank} for {layer} of [{out}, {width}]",
                rank=rank,
                layer=one_line(layer, 120),
                out=out,
                width=width,
            ),
            hint=tr("no LoRA looks like this: the file is damaged"),
            code="adapter.rank",
        )
    return out, width
