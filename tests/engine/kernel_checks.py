"""The card's kernels against float64, in Triton's interpreter: a program that tests/engine/test_gpu_kernels.py starts.

`python -P kernel_checks.py NAME` runs the function of that name and prints "right". Inputs are random, outputs are
poisoned with NaN first, and what lies behind the filled part of a cache is NaN too. With KERNEL_CHECKS_DEVICE=cuda and
without the interpreter the same runs on a card (benchmarks/gpu_check.py).
"""

from __future__ import annotations

import math
import os
import sys
from itertools import product as every

import torch
from torch.nn import functional

from glmchat.engine.gpu import kernels, words
from glmchat.engine.quantize.kernels import self_test

RMS_NORM, LAYER_NORM = 1, 2
SILU, GELU_TANH = 1, 2
NO_ROTARY, HALVES, NEIGHBOURS, TWO_POSITIONS = 0, 1, 2, 3  # as the kernels number them
DEVICE = os.environ.get("KERNEL_CHECKS_DEVICE", "cpu")
torch.set_default_device(DEVICE)
NOISE = torch.Generator(DEVICE).manual_seed(5)
NEAR = 1 if DEVICE == "cpu" else 5  # a card's exp and rsqrt are approximations to about 1e-6
NAN = float("nan")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=NOISE)


def in_planes(vector: torch.Tensor, planes: int) -> torch.Tensor:
    return vector.view(-1, planes).t().reshape(-1).contiguous()


def in_order(vector: torch.Tensor, planes: int) -> torch.Tensor:
    return vector.view(planes, -1).t().reshape(-1)


def power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """The largest difference as a share of the largest number; NaN is never small."""
    return float((found.double() - right).abs().max() / right.abs().max())


def matrix(outputs: int, inputs: int, bits: int, group: int, *, bfloat: bool = False, exact: bool = False):
    """(words, pairs, the weights in float64) of a random matrix. exact: float32 scales."""
    if bits >= 16:
        kind = torch.float32 if bits == 32 else torch.bfloat16 if bfloat else torch.float16
        weight = (drawn(outputs, inputs) * 0.1).to(kind)
        return weight.view(torch.int32), torch.zeros(1), weight.double()
    codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=NOISE)
    scale = torch.rand(outputs, inputs // group, generator=NOISE) * 0.01 + 0.01
    low = -scale * torch.rand(scale.shape, generator=NOISE) * (1 << bits)
    pairs = torch.stack((scale, low), -1)
    pairs = pairs if exact else pairs.half()
    wide = pairs.double().repeat_interleave(group, 1)
    per_word = 32 // bits
    words = sum(codes.view(outputs, -1, per_word)[..., j] << (bits * j) for j in range(per_word))
    return (words - (words >> 31 << 32)).to(torch.int32), pairs, codes.double() * wide[..., 0] + wide[..., 1]


def normalised(x: torch.Tensor, norm: int, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    if norm == RMS_NORM:
        return x * torch.rsqrt(x.square().mean() + 1e-5) * gain
    if norm == LAYER_NORM:
        return functional.layer_norm(x, x.shape, gain, shift, 1e-5)
    return x


def check_product(
    bits: int,
    outputs: int,
    inputs: int,
    group: int,
    *,
    bfloat: bool = False,
    exact: bool = False,
    norm: int = 0,
    gated: bool = False,
    activation: int = 0,
    residual: bool = False,
    bias: bool = True,
    rank: int = 0,
    rows: int = 8,
    block: int = 32,
) -> None:
    count = outputs * (2 if gated else 1)
    words, pairs, weight = matrix(count, inputs, bits, group, bfloat=bfloat, exact=exact)
    x, gain, shift, added = drawn(inputs) + 0.3, drawn(inputs) * 0.2 + 1, drawn(inputs), drawn(outputs)
    biases, change, up = drawn(count), drawn(max(rank, 1)), drawn(count, max(rank, 1))
    planes, out_planes, residual_planes = 32 // bits, 2 if outputs % 2 == 0 else 1, 4 if outputs % 4 == 0 else 1
    programs = -(-outputs // rows)
    y, normed = torch.full((outputs,), NAN), torch.full((inputs,), NAN)
    kernels.product[(programs,)](
        in_planes(x, planes), words, pairs, biases, in_planes(gain, planes), in_planes(shift, planes),
        in_planes(added, residual_planes), change, up, y, normed, inputs, outputs, 1e-5, 7.5,
        BITS=bits, BFLOAT=bfloat, GROUP=group, GROUPS=inputs // group, NORM=norm,
        KEEP_NORMED=power_of_two(math.ceil(inputs / programs)) if norm else 0, GATED=gated, ACTIVATION=activation,
        HAS_BIAS=bias, HAS_RESIDUAL=residual, RANK=rank, RANK_BLOCK=power_of_two(max(rank, 1)), OUT_PLANES=out_planes,
        RESIDUAL_PLANES=residual_planes, ROWS=rows, BLOCK=block,
    )  # fmt: skip
    right = normalised(x.double(), norm, gain.double(), shift.double())
    if norm:
        assert off(in_order(normed, planes), right) < 1e-6 * NEAR
    right = weight @ right
    if bias:
        right += biases.double()
    if rank:
        right += up.double() @ change.double()
    beside = right[outputs:] if gated else 1.0
    right = right[:outputs]
    if activation == SILU:
        right = functional.silu(right)
    elif activation == GELU_TANH:
        right = functional.gelu(right, approximate="tanh")
    right = right * beside
    if residual:
        right += 7.5 * added.double()
    error = off(in_order(y, out_planes), right)
    assert error < 3e-6 * NEAR, (bits, outputs, inputs, group, norm, gated, activation, residual, rank, error)


def products() -> None:
    """Every width, group and form; sizes that are no multiple of rows or blocks."""
    for bits, group in every((4, 8), (32, 64, 128, 384)):
        check_product(bits, 70, 384, group)
        check_product(bits, 33, 384, group, exact=True, rows=4, bias=False)
    for bits, norm, gated in every((4, 8, 16, 32), (0, 1, 2), (False, True)):
        check_product(bits, 36, 160, 160, norm=norm, gated=gated, activation=1 if gated else 0, residual=True)
    for bits, activation, rank in every((4, 16), (0, 1, 2), (1, 5, 16)):
        check_product(bits, 40, 128, 64, activation=activation, rank=rank, rows=16, block=16, bfloat=True)
    check_product(4, 24, 128, 128, norm=1, gated=True, activation=1, rank=6, rows=4)
    check_product(16, 50, 96, 96, bfloat=True, norm=2, residual=True)


def turned(heads: torch.Tensor, kind: int, rotated: int, first: int, second: int) -> torch.Tensor:
    """Rotary embedding of [n, D] by its definition: pairs (a, b) become a cos - b sin, b cos + a sin."""
    if kind == TWO_POSITIONS:
        half = heads.shape[-1] // 2
        parts = ((heads[:, :half], first), (heads[:, half:], second))
        return torch.cat([turned(part, HALVES, half, position, 0) for part, position in parts], -1)
    if kind == NO_ROTARY:
        return heads
    angles = first * frequencies(rotated)
    moving, still = heads[:, :rotated], heads[:, rotated:]
    if kind == HALVES:
        a, b = moving.chunk(2, -1)
        done = torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)
    else:
        a, b = moving[:, 0::2], moving[:, 1::2]
        pairs = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin())
        done = torch.stack(pairs, -1).flatten(-2)
    return torch.cat((done, still), -1)


def frequencies(rotated: int) -> torch.Tensor:
    return 10000.0 ** (-torch.arange(0, rotated, 2).double() / rotated)


def check_attention(
    heads: int, kv_heads: int, size: int, kind: int, rotated: int, length: int, dtype: torch.dtype, *, norms: bool,
    by_head: bool = False, block: int = 32,
) -> None:  # fmt: skip
    capacity, split, group = 200, 64, heads // kv_heads
    splits, first, second = -(-capacity // split), length + 3, 5
    table = size // 2 if kind == TWO_POSITIONS else max(rotated, 2)
    angles = torch.outer(torch.arange(capacity + 8).double(), frequencies(table))
    qkv = drawn((heads + 2 * kv_heads) * size)
    keys, values = drawn(kv_heads, capacity, size).to(dtype), drawn(kv_heads, capacity, size).to(dtype)
    keys[:, length:] = values[:, length:] = NAN
    old_keys, old_values = keys[:, :length].double(), values[:, :length].double()
    query_norm, key_norm = drawn(size) * 0.2 + 1, drawn(size) * 0.2 + 1
    state = torch.tensor([7, length, first, second, 0, 0, 0, 0], dtype=torch.int32)
    maxima, sums = torch.full((heads, splits), NAN), torch.full((heads, splits), NAN)
    partial, y = torch.full((heads, splits, size), NAN), torch.full((heads * size,), NAN)
    padded = power_of_two(size)
    given = qkv.view(3, heads, size).transpose(0, 1).contiguous() if by_head else qkv
    kernels.attend[(kv_heads, splits)](
        given, angles.cos().float(), angles.sin().float(), keys, values, query_norm, key_norm, state, maxima, sums,
        partial, capacity, splits, size**-0.5, 1e-6, HEADS=heads, KV_HEADS=kv_heads, D=size, D_BLOCK=padded,
        GROUP=group, GROUP_BLOCK=1 if group == 1 else max(16, power_of_two(group)), BY_HEAD=by_head,
        ROTARY=kind, ROTATED=rotated, NORMED=norms, WIDE=dtype != torch.float16, SPLIT=split, BLOCK=block,
    )  # fmt: skip
    kernels.merge[(heads,)](
        maxima, sums, partial, y, state, splits, HEADS=heads, D=size, D_BLOCK=padded, SPLIT=split, OUT_PLANES=4, BLOCK=2
    )
    query, key, value = qkv.double().view(-1, size).split((heads, kv_heads, kv_heads))
    if norms:
        query = query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6) * query_norm.double()
        key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + 1e-6) * key_norm.double()
    query, key = turned(query, kind, rotated, first, second), turned(key, kind, rotated, first, second)
    exact = {torch.float32: 2e-6 * NEAR, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert off(keys[:, length], key) < exact
    assert off(values[:, length], value) < exact
    all_keys = torch.cat((old_keys, keys[:, length : length + 1].double()), 1)
    all_values = torch.cat((old_values, values[:, length : length + 1].double()), 1)
    right = functional.scaled_dot_product_attention(query.view(kv_heads, group, size), all_keys, all_values)
    error = off(in_order(y, 4), right.reshape(-1))
    assert error < exact, (heads, kv_heads, size, kind, length, dtype, error)


def attention() -> None:
    """Lengths around a split's end, the cache's edge, every rotary kind, shared and single key heads."""
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for length in (0, 1, 63, 64, 65, 128, 199):
        check_attention(8, 2, 64, HALVES, 64, length, f32, norms=False)
        check_attention(3, 3, 32, TWO_POSITIONS, 32, length, f32, norms=False, by_head=True)
    check_attention(4, 4, 96, NEIGHBOURS, 48, 66, f32, norms=False)
    check_attention(32, 2, 128, NEIGHBOURS, 64, 130, bf16, norms=False)
    check_attention(8, 2, 128, HALVES, 128, 70, f16, norms=True)
    check_attention(6, 1, 64, HALVES, 32, 64, f16, norms=True, block=16)
    check_attention(2, 2, 64, NO_ROTARY, 0, 100, f16, norms=False)


def sums() -> None:
    """What a layer adds, normalised, on its residual stream."""
    for size, eps in ((512, 1e-5), (96, 1e-2), (1032, 1e-6)):
        part, gain, stream, y = drawn(size), drawn(size), drawn(size), torch.full((size,), NAN)
        kernels.add_normed[(-(-size // 256),)](
            part, gain, in_planes(stream, 4), y, size, eps, OUT_PLANES=8, RESIDUAL_PLANES=4, BLOCK=256
        )
        right = functional.rms_norm(part.double(), (size,), gain.double(), eps) + stream.double()
        assert off(in_order(y, 8), right) < 1e-6 * NEAR


def lookups() -> None:
    """A row of the embedding, with and without learnt positions, and whole matrices unpacked for prompts."""
    for bits, group, bfloat, learnt in ((4, 32, False, False), (4, 128, False, True), (8, 256, False, False),
                                        (16, 256, False, True), (16, 256, True, False)):  # fmt: skip
        words, pairs, weight = matrix(9, 256, bits, group, bfloat=bfloat)
        said = torch.zeros(9, dtype=torch.uint8)
        positions, y = drawn(5, 256), torch.full((256,), NAN)
        state = torch.tensor([6, 2, 3, 0, 0, 0, 0, 0], dtype=torch.int32)
        kernels.embed[(4,)](
            words, pairs, positions, state, said, y, 256, BITS=bits, BFLOAT=bfloat, GROUP=group, GROUPS=256 // group,
            HAS_POSITIONS=learnt, OUT_PLANES=8, BLOCK=256 * bits // 32 // 4,
        )  # fmt: skip
        right = weight[6] + (positions[3].double() if learnt else 0.0)
        assert off(in_order(y, 8), right) < 1e-6
        assert said.tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0]
        if bits < 16:
            out = torch.full((9, 256), NAN, dtype=torch.float16)
            kernels.unpack[(3, 2)](
                words, pairs, out, 9, 256, BITS=bits, GROUP=group, GROUPS=256 // group, ROWS=4, BLOCK=256 * bits // 64
            )
            assert off(out, weight) < 1e-3


def chosen(logits: torch.Tensor, marks: torch.Tensor, penalty: float, temperature: float) -> torch.Tensor:
    """What both kernels make of a row: log-sum-exp, the 64 best, their ids."""
    programs = -(-len(logits) // 128)
    best = torch.zeros(programs, 64, dtype=torch.int64)
    exponents, result = torch.full((programs, 2), NAN), torch.full((129,), NAN)
    before, numbers = logits.clone(), torch.tensor([penalty, temperature])
    kernels.candidates[(programs,)](logits, marks, numbers, best, exponents, len(logits), TOP=64, BLOCK=128)
    kernels.choose_best[(1,)](
        best, exponents, result, programs, TOP=64, PROGRAMS_BLOCK=power_of_two(programs),
        BLOCK=power_of_two(64 * programs),
    )  # fmt: skip
    assert torch.equal(logits, before) or bool(logits.isnan().any()), "the row stays what it is"
    return result


def choice() -> None:
    """The best 64 and the log-sum-exp; ties go to the lower id; the penalty is transformers' own; bans hold."""
    from transformers import RepetitionPenaltyLogitsProcessor

    for vocab, penalty, temperature in ((64, 1.0, 1.0), (257, 1.3, 0.7), (1000, 0.8, 1.9), (1000, 1.0, 0.3)):
        logits = drawn(vocab) * 4
        logits[3] = logits[vocab - 1] = logits.max() + 1
        ids = torch.randint(4, vocab - 1, (20,), generator=NOISE)
        marks = torch.zeros(vocab, dtype=torch.uint8)
        marks[ids] = 1
        right = RepetitionPenaltyLogitsProcessor(penalty)(ids[None], logits[None].clone())[0]
        if vocab > 64:
            marks[int(right.argsort()[-3])] = 2
            right[int(right.argsort()[-3])] = -torch.inf
        result = chosen(logits, marks, penalty, temperature)
        values, order = torch.sort(right, descending=True, stable=True)
        assert torch.equal(result[1:65], values[:64])
        assert torch.equal(result[65:].long(), order[:64])
        assert abs(float(result[0] - torch.logsumexp(right.double() / temperature, 0))) < 1e-5
    banned = drawn(129)  # the last piece holds one id, and that one is banned
    marks = torch.zeros(129, dtype=torch.uint8)
    marks[128] = 2
    result = chosen(banned, marks, 1.0, 1.0)
    assert abs(float(result[0] - torch.logsumexp(banned[:128].double(), 0))) < 1e-5
    broken = torch.full((70,), 1.0)
    broken[40] = NAN
    assert math.isnan(chosen(broken, torch.zeros(70, dtype=torch.uint8), 1.0, 1.0)[1]), "no number stands first"


def layers() -> None:
    """Whole packed layers at one row and at many, unpacked in one piece and in several, as a load tries them."""
    for bits, scratch in ((4, words.SCRATCH), (8, words.SCRATCH), (4, 50 * 256)):
        words.SCRATCH = scratch
        assert self_test(words.CardWords(), DEVICE, bits) is None


CHECKS = {
    "products": products, "attention": attention, "lookups": lookups, "sums": sums, "choice": choice, "layers": layers,
}  # fmt: skip

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
    print("right")
