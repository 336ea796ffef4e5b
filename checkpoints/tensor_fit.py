"""Whether the tensors of a checkpoint are those that its configuration describes: names and shapes, without torch.

The engine asks here too, with the tensors as it puts them together. Before it is started, a matrix that was packed is
told by what stands beside it; of a form that does not tell its shape so, the name counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from glmchat.checkpoints.families import family_of, is_native
from glmchat.checkpoints.layer_shapes import layer_shapes
from glmchat.checkpoints.quantised import PARTS, Packing, grouped_shape, packing_of
from glmchat.checkpoints.safetensors_file import StoredTensor, read_safetensors
from glmchat.checkpoints.spec import Shape, match_tensors
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_files import is_safetensors, refuse_names
from glmchat.core.files import open_file

Shapes = Mapping[str, Shape | None]  # a checkpoint's names; None: of a packed matrix that does not tell


def _misshapen(name: str, shape: Shape, expected: Iterable[Shape]) -> str:
    return f"{name} is {list(shape)} instead of {' or '.join(str(list(one)) for one in sorted(expected))}"


def refuse_misfit(config: Mapping[str, Any], shapes: Shapes, upright: Collection[str] = ()) -> None:
    """Raise Damaged, with each tensor in the way, for tensors that are not those of a configuration.

    Of a type that runs through transformers those are compared whose shape its classes tell as text; what else the file
    holds is left alone, as there.
    """
    if is_native(config):
        family = family_of(config)

        def is_turned(parameter: str, name: str) -> bool:
            return family.transposed is not None and family.transposed(parameter) and name not in upright

        match_tensors(shapes, family.parse(config), family.name, family.rename, is_turned)
    elif not any(isinstance(value, Mapping) and "hidden_size" in value for value in config.values()):
        _refuse_other(config, shapes, upright)


_LAYER = re.compile(r"(?:^|\.)(\w+)\.(\d+)\.")


def _refuse_other(config: Mapping[str, Any], shapes: Shapes, upright: Collection[str]) -> None:
    known, misshapen = layer_shapes(config), []
    for name, shape in sorted(shapes.items(), key=lambda item: _in_order(item[0])):
        layer = name.split(".")[-2] if name.endswith(".weight") else ""
        expected = known.matrices.get(layer)
        if not expected or shape is None or len(shape) != 2 or ".experts." in name:
            continue
        shape = shape[::-1] if layer in known.across and name in upright else shape
        if shape not in expected:
            misshapen.append(_misshapen(name, shape, expected))
    missing = list(_missing(known.counts, sorted(shapes, key=_in_order)))
    refuse_names(str(config.get("model_type")), missing, [], misshapen, None)


def _in_order(name: str) -> list[str]:
    """For sorting: layer 10 behind layer 9."""
    return [part.rjust(8) if part.isdecimal() else part for part in name.split(".")]


def _missing(counts: Mapping[str, int], names: Sequence[str]) -> Iterator[str]:
    """The tensors of layers that a file has none of, named as those of its last layer."""
    places = [(name, match) for name in names if (match := _LAYER.search(name)) is not None]
    for attribute, count in counts.items():
        there = [int(match[2]) for _, match in places if match[1] == attribute]
        last = max(there, default=count)
        of_last = [(name, match) for name, match in places if match[1] == attribute and int(match[2]) == last]
        for number in range(last + 1, count):
            yield from (f"{name[: match.start(2)]}{number}{name[match.end(2) :]}" for name, match in of_last)


def shapes_of(config: Mapping[str, Any], files: Sequence[Path]) -> tuple[Shapes, frozenset[str]]:
    """Every tensor of a folder's weights as it will be when it is unpacked, and which of them were packed."""
    stored: dict[str, tuple[Path, StoredTensor] | None] = {}
    shapes: dict[str, Shape | None] = {}
    for file in files:
        if is_safetensors(file):
            tensors = read_safetensors(file)
            stored |= {name: (file, tensor) for name, tensor in tensors.items()}
            shapes |= {name: tensor.shape for name, tensor in tensors.items()}
        else:
            shapes |= {name: tensor.shape for name, tensor in read_torch_file(file).items()}
    packed = dict(_packed(shapes, packing_of(config), lambda name: _numbers(stored.get(name))))
    parts = {f"{name.removesuffix('weight')}{part}" for name in packed for part in _BESIDE}
    return {**{name: shape for name, shape in shapes.items() if name not in parts}, **packed}, frozenset(packed)


# What stands beside a packed matrix `x.weight` under the names `x.…`, of all forms.
_BESIDE = (
    *("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_offset"),
    *("qweight", "qzeros", "scales", "biases", "g_idx", "SCB", "weight_format", "W_q", "shape", "scale", "zero"),
    *("nbits", "group_size", "axis", "channel_wise", "compute_dtype", "encoded_state_dict", "offload_meta", "optimize"),
    *("packing", "quant_scale", "quant_zero", "round_zero", "stores_quant_config", "unpack_view_dtype"),
    *("view_as_float", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4"),
)


def _packed(
    shapes: Shapes, packing: Packing | None, numbers: Callable[[str], Shape | None]
) -> Iterator[tuple[str, Shape | None]]:
    """Matrix -> its shape. numbers: what a tensor of whole numbers holds."""
    grouped = PARTS.get(packing.method, ()) if packing is not None else ()
    for name, shape in shapes.items():
        stem, _, part = name.rpartition(".")
        if part == "weight_packed":
            yield f"{stem}.weight", numbers(f"{stem}.weight_shape")
        elif part == "W_q":
            yield f"{stem}.weight", numbers(f"{stem}.shape")
        elif part == "weight" and f"{stem}.SCB" in shapes:
            yield name, shape
        elif f"{name}.quant_map" in shapes or f"{name}_scale" in shapes:
            yield name, None
        elif packing is not None and grouped and part == grouped[0] and f"{stem}.scales" in shapes:
            yield f"{stem}.weight", grouped_shape(packing, shape or (), shapes[f"{stem}.scales"] or ())


def _numbers(tensor: tuple[Path, StoredTensor] | None) -> Shape | None:
    if tensor is None or tensor[1].dtype != "I64" or tensor[1].shape != (2,):
        return None
    with open_file(tensor[0]) as file:
        file.seek(tensor[1].start)
        data = file.read(16)
    return int.from_bytes(data[:8], "little", signed=True), int.from_bytes(data[8:], "little", signed=True)
