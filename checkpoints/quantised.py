"""Folders that another program quantised: by which method, and whether its codes, scales and zero points are read here.

Known without torch, so that a folder that is not read is refused by its method's name before an engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from glmchat.checkpoints.recipe import METHOD, is_ours_to_read
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

# By the quant_method of config.json: its name, and the package with which transformers reads it.
_METHODS: Mapping[str, tuple[str, str]] = {
    "gptq": ("GPTQ", "gptqmodel"),
    "awq": ("AWQ", "gptqmodel"),
    "mlx": ("MLX", ""),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    METHOD: (METHOD, "compressed_tensors"),
    "hqq": ("HQQ", "hqq"),
    "aqlm": ("AQLM", "aqlm"),
    "quanto": ("Quanto", "optimum.quanto"),
    "torchao": ("torchao", "torchao"),
    "eetq": ("EETQ", "kernels"),
    "higgs": ("HIGGS", "flute"),
    "spqr": ("SpQR", "spqr_quant"),
    "vptq": ("VPTQ", "vptq"),
    "auto-round": ("AutoRound", "auto_round"),
    "exl2": ("ExLlamaV2", ""),
    "exl3": ("ExLlamaV3", ""),
    "bitnet": ("BitNet", ""),
    "mxfp4": ("MXFP4", ""),
    "fp8": ("FP8", ""),
}
# Of a matrix `x.weight` with groups: what it is stored as, under `x.…`; the words come first.
PARTS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
    "mlx": ("weight", "scales", "biases"),
}
_BY_TRANSFORMERS = ("fp8", "mxfp4", "bitnet")  # with nothing but torch


@dataclass(frozen=True, slots=True)
class Packing:
    """How the matrices of a folder are stored. method: "gptq", "awq", "mlx", "hqq" or "bitsandbytes".

    group: inputs that share a scale, 0 for one scale a row. one_less: zero points are stored less one (GPTQ's first
    format). A method whose tensors tell the rest says 0 bits.
    """

    method: str
    bits: int = 0
    group: int = 0
    one_less: bool = False


def described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the quantisation, wherever; {} where it says nothing. mlx_lm names no method."""
    said = config.get("quantization_config")
    said = said if isinstance(said, Mapping) and said else config.get("quantization")
    if not isinstance(said, Mapping) or not said:
        return {}
    is_mlx = "quant_method" not in said and "bits" in said and "group_size" in said
    return {"quant_method": "mlx", **said} if is_mlx else said


def packing_of(config: Mapping[str, Any]) -> Packing | None:
    """How to read the matrices; None where nothing is packed, or not in a way that is read here."""
    said = described(config)
    method, bits, group = said.get("quant_method"), said.get("bits"), said.get("group_size")
    group = 0 if group in (-1, None) else group
    if not isinstance(group, int):
        return None
    if method == "gptq" and bits in (4, 8) and said.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2"):
        return Packing("gptq", bits, group, said.get("checkpoint_format", "gptq") == "gptq")
    if method == "awq" and bits == 4 and str(said.get("version", "gemm")).lower() == "gemm":
        return Packing("awq", 4, group)
    if method == "mlx" and bits in (4, 8) and said.get("mode", "affine") == "affine" and group:
        return Packing("mlx", bits, group)
    if method == "hqq":
        return Packing("hqq", _hqq_bits(said))
    if method == "bitsandbytes":
        return Packing("bitsandbytes", 4 if said.get("load_in_4bit") else 8)
    return None


def grouped_shape(packing: Packing, words: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int] | None:
    """The matrix [out, in] that GPTQ, AWQ or MLX packed into words and scales of these shapes; None where they do not
    belong together."""
    if len(words) != 2 or len(scales) != 2:
        return None
    if packing.method == "mlx":
        return words[0], scales[1] * packing.group
    outputs, inputs = words[1] if packing.method == "gptq" else words[1] * 8, words[0]
    inputs *= 32 // packing.bits if packing.method == "gptq" else 1
    return (outputs, inputs) if outputs == scales[1] and scales[0] and inputs % scales[0] == 0 else None


def becomes_dense(config: Mapping[str, Any]) -> bool:
    """Whether the matrices take their full width in memory: codes that are no equal steps of groups in a row."""
    said, packing = described(config), packing_of(config)
    if packing is None:
        return False
    if packing.method == "gptq":
        apart = said.get("desc_act") is True and said.get("static_groups") is not True and packing.group > 0
        return apart or (packing.bits == 8 and said.get("sym") is not True)
    if packing.method == "hqq":
        return packing.bits == 8 or _hqq_params(said).get("axis") == 0
    return (packing.method, packing.bits) in (("mlx", 8), ("bitsandbytes", 4))


def _hqq_params(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of all layers; {} where layers have settings of their own."""
    inner = said.get("quant_config")
    params = inner.get("weight_quant_params") if isinstance(inner, Mapping) else None
    return params if isinstance(params, Mapping) else {}


def _hqq_bits(said: Mapping[str, Any]) -> int:
    """0 where layers have settings of their own."""
    bits = _hqq_params(said).get("nbits")
    return bits if bits in (1, 2, 3, 4, 8) else 0


def is_read(config: Mapping[str, Any]) -> bool:
    """Whether a folder's weights are dense, or packed in a way that glmchat reads itself."""
    return not described(config) or is_ours_to_read(config) or packing_of(config) is not None


def label(config: Mapping[str, Any]) -> str | None:
    """ "int4" or "int8" where codes are read as such, else the method's own word: "nf4", "hqq", "fp8"; None for weights
    that nobody quantised."""
    said = described(config)
    if not said:
        return None
    packing = packing_of(config)
    if packing is not None and packing.bits and packing.method != "bitsandbytes":
        return f"int{packing.bits}"
    if packing is not None and packing.bits == 4:
        return one_line(str(said.get("bnb_4bit_quant_type") or "fp4"), 20).lower()
    kind = "fp8" if said.get("format") == "float-quantized" else said.get("quant_method")
    return "int8" if packing is not None and packing.bits else one_line(str(kind or "?"), 20).lower()


def method_name(config: Mapping[str, Any]) -> str:
    """What people call the method that config.json names."""
    method = str(described(config).get("quant_method") or "?")
    return _METHODS[method][0] if method in _METHODS else one_line(method, 40)


def packed_bits(config: Mapping[str, Any]) -> int:
    """Of a matrix in a folder that is read here."""
    packing = packing_of(config)
    if packing is not None:
        return packing.bits or 4
    groups = described(config).get("config_groups")
    return max((group["weights"]["num_bits"] for group in groups.values()), default=8) if groups else 8


def refuse_unread(config: Mapping[str, Any]) -> None:
    """Raise Usage, with the method's name, for weights that neither glmchat nor the installed transformers reads."""
    said = described(config)
    if is_read(config):
        return
    method = str(said.get("quant_method") or "?")
    package = _METHODS[method][1] if method in _METHODS else ""
    if method in _BY_TRANSFORMERS or (package and _installed(package)):
        return
    base = config.get("_name_or_path")
    known = isinstance(base, str) and base.count("/") == 1 and not base.startswith(("/", ".", "~"))
    raise Usage(
        tr("these weights were quantised with {name}, which glmchat does not read here", name=method_name(config)),
        hint=tr("pull the original, {base}, and run it with --quant 4", base=one_line(str(base), 80))
        if known
        else tr("pull the repository that they were made from, and run it with --quant 4"),
        code="quant.method",
    )


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
