"""How other programs pack a matrix: the tensors they store, and the matrix that these mean.

Codes are drawn at random, so that every one occurs; the dense matrix is put together from them as the format's own
description says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

GROUP = 32
Tensors = dict[str, torch.Tensor]
# QLoRA (Dettmers et al. 2023), appendix E: the quantiles of a normal distribution.
NF4 = torch.tensor([-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0, 0.0795803,
                    0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0])  # fmt: skip


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of the last axis in int32 words, the first in the lowest bits: shifted and added, one by one."""
    count = 32 // bits
    parts = codes.long().view(*codes.shape[:-1], -1, count)
    total = sum(parts[..., n] << (bits * n) for n in range(count))
    assert isinstance(total, torch.Tensor)
    return torch.where(total >= 2**31, total - 2**32, total).int()


def drawn(weight: torch.Tensor, bits: int, group: int = GROUP) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random codes [out, in], and zero points and scales [out, groups] in float16."""
    noise = torch.Generator().manual_seed(weight.numel())
    rows, columns = weight.shape
    groups = columns // group if group else 1
    codes = torch.randint(0, 2**bits, weight.shape, generator=noise)
    points = torch.randint(2 ** (bits - 1) - 3, 2 ** (bits - 1) + 3, (rows, groups), generator=noise)
    scales = ((torch.rand(rows, groups, generator=noise) + 0.5) * 0.8 / 2**bits).half()
    return codes, points, scales


def spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values.float().repeat_interleave(columns // values.shape[1], 1)


def gptq(
    weight: torch.Tensor, bits: int = 4, one_less: int = 1, shuffled: bool = False, symmetric: bool = False
) -> Any:
    codes, points, scales = drawn(weight, bits)
    if symmetric:
        points = torch.full_like(points, 2 ** (bits - 1))
    index = torch.arange(weight.shape[1]) // GROUP
    if shuffled:
        index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(4))]
    stored = {
        "qweight": words(codes, bits).t().contiguous(),
        "qzeros": words((points - one_less).t().contiguous(), bits),
        "scales": scales.t().contiguous(),
        "g_idx": index.int(),
    }
    return stored, (codes.float() - points[:, index]) * scales.float()[:, index]


def awq(weight: torch.Tensor) -> Any:
    codes, points, scales = drawn(weight, 4)
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def packed(values: torch.Tensor) -> torch.Tensor:
        return words(values.view(len(values), -1, 8)[..., order].flatten(1), 4)

    stored = {
        "qweight": packed(codes.t().contiguous()),
        "qzeros": packed(points.t().contiguous()),
        "scales": scales.t().contiguous(),
    }
    return stored, (codes - spread(points, weight.shape[1])) * spread(scales, weight.shape[1])


def mlx(weight: torch.Tensor, bits: int = 4) -> Any:
    codes, points, scales = drawn(weight, bits)
    low = (-points * scales.float() + 0.013).half()
    stored = {"weight": words(codes, bits).view(torch.uint32), "scales": scales, "biases": low}
    return stored, codes * spread(scales, weight.shape[1]) + spread(low, weight.shape[1])


def nf4(weight: torch.Tensor, nested: bool = False) -> Any:
    codes, _, _ = drawn(weight, 4)
    blocks = weight.numel() // 64
    noise = torch.Generator().manual_seed(blocks)
    absmax = torch.rand(blocks, generator=noise) + 0.2
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    flat = codes.flatten().to(torch.uint8)
    stored = {
        "weight": ((flat[0::2] << 4) | flat[1::2])[:, None],
        "weight.quant_map": NF4.clone(),
        "weight.absmax": absmax,
    }
    if nested:
        table = torch.linspace(-1, 1, 256)
        inner = torch.randint(0, 256, (blocks,), generator=noise)
        outer = torch.rand(-(-blocks // 16), generator=noise) * 0.3
        absmax = table[inner] * outer.repeat_interleave(16)[:blocks] + 0.7
        state |= {"nested_blocksize": 16, "nested_offset": 0.7, "nested_dtype": "float32"}
        stored |= {"weight.absmax": inner.byte(), "weight.nested_absmax": outer, "weight.nested_quant_map": table}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    stored["weight.quant_state.bitsandbytes__nf4"] = text
    return stored, NF4[codes] * absmax.repeat_interleave(64).view(weight.shape)


def hqq(weight: torch.Tensor, bits: int = 4, axis: int = 1, as_float: bool = False) -> Any:
    codes, points, scales = drawn(weight, bits)
    rows, columns = weight.shape
    zeros = (points + 0.25).half()
    if axis == 1:
        lines, zeros, scales = codes.view(-1, GROUP), zeros.view(-1, 1), scales.view(-1, 1)
    else:
        lines, zeros, scales = codes.view(GROUP, -1), zeros.view(1, -1), scales.view(1, -1)
    dense = ((lines - zeros.float()) * scales.float()).view(rows, columns)
    count = 10 if bits == 3 else 8 // bits
    lines = torch.cat((lines, lines.new_zeros(-len(lines) % count, lines.shape[1])))
    parts = lines.chunk(count)  # the first part in the highest bits
    total = sum(part << (bits * (count - 1 - n)) for n, part in enumerate(parts))
    assert isinstance(total, torch.Tensor)
    stored = {"W_q": total.int() if bits == 3 else total.byte(), "scale": scales, "zero": zeros}
    if as_float:
        stored["W_q"] = stored["W_q"].view(torch.float16)
    numbers = {"nbits": bits, "group_size": GROUP, "axis": axis, "view_as_float": int(as_float)}
    stored |= {name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()}
    packing = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}[bits]
    return stored | {
        "shape": torch.tensor([rows, columns]),
        "packing": torch.tensor(list(packing.encode()), dtype=torch.uint8),
        "encoded_state_dict": torch.tensor(1, dtype=torch.uint8),
    }, dense


def said_by_hqq(bits: int = 4, axis: int = 1) -> dict[str, Any]:
    inner = {"weight_quant_params": {"nbits": bits, "group_size": GROUP, "axis": axis}}
    return said("hqq", quant_config=inner, skip_modules=["lm_head"])


def rows_of_int8(weight: torch.Tensor) -> Any:
    codes, _, scales = drawn(weight, 8, 0)
    codes = (codes - 128).to(torch.int8)
    return {"weight": codes, "SCB": scales.float()[:, 0] * 127}, codes.float() * scales.float()


def said(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, "group_size": GROUP, **more}}


FORMS: dict[str, tuple[Callable[[torch.Tensor], Any], dict[str, Any]]] = {
    "GPTQ": (gptq, said("gptq", bits=4, desc_act=False, sym=False)),
    "GPTQ, second format": (lambda w: gptq(w, one_less=0), said("gptq", bits=4, checkpoint_format="gptq_v2")),
    "GPTQ in activation order": (lambda w: gptq(w, shuffled=True), said("gptq", bits=4, desc_act=True)),
    "GPTQ, 8 bits": (lambda w: gptq(w, 8), said("gptq", bits=8)),
    "GPTQ, 8 bits, symmetric": (lambda w: gptq(w, 8, symmetric=True), said("gptq", bits=8, sym=True)),
    "AWQ": (awq, said("awq", bits=4, zero_point=True, version="gemm")),
    "MLX": (mlx, {"quantization": {"group_size": GROUP, "bits": 4}}),
    "MLX, both fields": (mlx, {f: {"group_size": GROUP, "bits": 4} for f in ("quantization", "quantization_config")}),
    "MLX, 8 bits": (lambda w: mlx(w, 8), {"quantization": {"group_size": GROUP, "bits": 8, "mode": "affine"}}),
    "NF4": (nf4, said("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "NF4 with scales quantised": (lambda w: nf4(w, True), said("bitsandbytes", load_in_4bit=True)),
    "LLM.int8": (rows_of_int8, said("bitsandbytes", load_in_8bit=True)),
    "HQQ": (hqq, said_by_hqq()),
    "HQQ, bytes as float16": (lambda w: hqq(w, as_float=True), said_by_hqq()),
    "HQQ, groups across rows": (lambda w: hqq(w, axis=0), said_by_hqq(axis=0)),
    "HQQ, 8 bits": (lambda w: hqq(w, 8), said_by_hqq(8)),
    "HQQ, 3 bits": (lambda w: hqq(w, 3), said_by_hqq(3)),
    "HQQ, 2 bits": (lambda w: hqq(w, 2), said_by_hqq(2)),
}
