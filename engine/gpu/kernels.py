"""What a decoder step is made of on a card, in Triton: product, attention, merge, lookup, candidates, unpacking.

One token runs one row through the network, so every kernel is bound by what it reads. Vectors between kernels are
float32. A product reads its words (32 bits: eight INT4 codes, four INT8 codes, two 16-bit weights or a float32) in the
order of the file, and its input in *planes*: of P codes in a word, all first ones together, then all second ones.
Element e of n lies at `(e % P) * (n / P) + e // P`, so that unpacking a word meets neighbouring numbers. Whoever writes
a vector knows the planes of its reader. Every program owns whole rows and adds in one order, without atomics: a replay
on the same model of card gives the same bits.

`state` is int32 on the card: token, filled positions of the cache, rotary position, second one (ChatGLM-6B).
Imported only where Triton is: torch's CUDA builds bring it. TRITON_INTERPRET=1 runs all of it on a CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit  # type: ignore[untyped-decorator]
def _wait_for_others(DEPENDENT: tl.constexpr):  # type: ignore[no-untyped-def]
    """With programmatic dependent launch: the next kernel may start; what earlier ones wrote is there behind this."""
    if DEPENDENT:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit  # type: ignore[untyped-decorator]
def _place(element, size, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where an element of a vector of `size` numbers lies when it is kept in planes."""
    return (element % PLANES) * (size // PLANES) + element // PLANES


@triton.jit  # type: ignore[untyped-decorator]
def _code(word, J: tl.constexpr, BITS: tl.constexpr, BFLOAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code J of a word as float32; of 16-bit words the weight itself."""
    if BITS == 32:
        return word.to(tl.float32, bitcast=True)
    if BITS == 4:
        return ((word >> (4 * J)) & 15).to(tl.float32)
    if BITS == 8:
        return ((word >> (8 * J)) & 255).to(tl.float32)
    if BFLOAT:  # bfloat16 is the upper half of a float32
        high = word << 16 if J == 0 else word & -65536
        return high.to(tl.float32, bitcast=True)
    return ((word >> (16 * J)) & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _activated(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACTIVATION == 1:
        return x * tl.sigmoid(x)
    if ACTIVATION == 2:  # x / 2 * (1 + tanh(z)) = x * sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x


@triton.jit  # type: ignore[untyped-decorator]
def product(  # type: ignore[no-untyped-def]
    x,  # float32 [inputs] in planes of this product
    words,  # int32 [outputs (twice with GATED), inputs / (32 / BITS)]
    pairs,  # [outputs, GROUPS, 2]: weight = code * scale + low
    bias,  # float32 [outputs]
    gain,  # float32 [inputs] in planes: the norm's weight
    shift,  # float32 [inputs] in planes: the norm's bias
    residual,  # float32 [outputs] in planes of RESIDUAL_PLANES
    low_rank,  # float32 [RANK]: what the adapters' first matrices made of x
    up,  # float32 [outputs (twice with GATED), RANK]: the adapters' second matrices, their scale in them
    y,  # float32 [outputs] in planes of OUT_PLANES
    normed,  # float32 [inputs]: the normalised input, where somebody needs it again
    inputs,
    outputs,
    eps,
    alpha,  # what the residual is multiplied by
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    NORM: tl.constexpr,
    KEEP_NORMED: tl.constexpr,  # numbers of `normed` that one program writes; 0: nobody needs it
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    OUT_PLANES: tl.constexpr,
    RESIDUAL_PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """y = epilogue(W norm(x)): one vector through a packed or 16-bit matrix, with all that stands around it.

    Epilogue, in this order: bias, low-rank change, activation (GATED: of the gate's row, times that of the row
    `outputs` below it), residual.
    """
    CODES: tl.constexpr = 32 // BITS
    program = tl.program_id(0)
    row = program * ROWS + tl.arange(0, ROWS)
    row_in = row < outputs
    width = tl.multiple_of(inputs // CODES, 4)  # words of a row; inputs come in multiples of 32: 16 bytes a load
    # Words come one tile ahead of their use: while one is multiplied, the next is on its way. Nobody writes weights, so
    # the first tile need not wait for the kernel before.
    column = tl.arange(0, BLOCK)
    tile_in = row_in[:, None] & (column < width)[None, :]
    word = tl.load(words + row[:, None] * width + column[None, :], mask=tile_in, other=0)
    if GATED:
        word_beside = tl.load(words + (row[:, None] + outputs) * width + column[None, :], mask=tile_in, other=0)
    _wait_for_others(DEPENDENT)
    mean, inverse = 0.0, 1.0
    if NORM != 0:
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, inputs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            total += tl.load(x + at, mask=at < inputs, other=0.0)
        if NORM == 2:
            mean = tl.sum(total) / inputs
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, inputs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            centred = tl.where(at < inputs, tl.load(x + at, mask=at < inputs, other=0.0) - mean, 0.0)
            squares += centred * centred
        inverse = tl.rsqrt(tl.sum(squares) / inputs + eps)
        if KEEP_NORMED > 0:
            at = program * KEEP_NORMED + tl.arange(0, KEEP_NORMED)
            kept = (tl.load(x + at, mask=at < inputs, other=0.0) - mean) * inverse
            kept *= tl.load(gain + at, mask=at < inputs, other=0.0)
            if NORM == 2:
                kept += tl.load(shift + at, mask=at < inputs, other=0.0)
            tl.store(normed + at, kept, mask=at < inputs)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    beside = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + column
        at_in = at < width
        tile_in = row_in[:, None] & at_in[None, :]
        ahead = at + BLOCK
        ahead_in = row_in[:, None] & (ahead < width)[None, :]
        following = tl.load(words + row[:, None] * width + ahead[None, :], mask=ahead_in, other=0)
        tile = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        inputs_sum = tl.zeros((BLOCK,), dtype=tl.float32)
        if GATED:
            after = words + (row[:, None] + outputs) * width + ahead[None, :]
            following_beside = tl.load(after, mask=ahead_in, other=0)
            tile_beside = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for j in tl.static_range(CODES):
            here = tl.load(x + j * width + at, mask=at_in, other=0.0)
            if NORM != 0:
                here = (here - mean) * inverse * tl.load(gain + j * width + at, mask=at_in, other=0.0)
                if NORM == 2:
                    here += tl.load(shift + j * width + at, mask=at_in, other=0.0)
            inputs_sum += here
            tile += _code(word, j, BITS, BFLOAT) * here[None, :]
            if GATED:
                tile_beside += _code(word_beside, j, BITS, BFLOAT) * here[None, :]
        if BITS >= 16:
            sums += tl.sum(tile, 1)
            if GATED:
                beside += tl.sum(tile_beside, 1)
        else:
            pair = pairs + 2 * (row[:, None] * GROUPS + (at[None, :] * CODES) // GROUP)
            scale = tl.load(pair, mask=tile_in, other=0.0).to(tl.float32)
            low = tl.load(pair + 1, mask=tile_in, other=0.0).to(tl.float32)
            sums += tl.sum(tile * scale + low * inputs_sum[None, :], 1)
            if GATED:
                pair += 2 * outputs * GROUPS
                scale = tl.load(pair, mask=tile_in, other=0.0).to(tl.float32)
                low = tl.load(pair + 1, mask=tile_in, other=0.0).to(tl.float32)
                beside += tl.sum(tile_beside * scale + low * inputs_sum[None, :], 1)
        word = following
        if GATED:
            word_beside = following_beside
    if HAS_BIAS:
        sums += tl.load(bias + row, mask=row_in, other=0.0)
        if GATED:
            beside += tl.load(bias + outputs + row, mask=row_in, other=0.0)
    if RANK > 0:
        rank = tl.arange(0, RANK_BLOCK)
        change = tl.load(low_rank + rank, mask=rank < RANK, other=0.0)[None, :]
        rank_in = row_in[:, None] & (rank < RANK)[None, :]
        sums += tl.sum(tl.load(up + row[:, None] * RANK + rank[None, :], mask=rank_in, other=0.0) * change, 1)
        if GATED:
            second = up + (row[:, None] + outputs) * RANK + rank[None, :]
            beside += tl.sum(tl.load(second, mask=rank_in, other=0.0) * change, 1)
    sums = _activated(sums, ACTIVATION)
    if GATED:
        sums *= beside
    if HAS_RESIDUAL:
        sums += alpha * tl.load(residual + _place(row, outputs, RESIDUAL_PLANES), mask=row_in, other=0.0)
    tl.store(y + _place(row, outputs, OUT_PLANES), sums, mask=row_in)


@triton.jit  # type: ignore[untyped-decorator]
def add_normed(  # type: ignore[no-untyped-def]
    part,  # float32 [size]
    gain,  # float32 [size]
    residual,  # float32 [size] in planes of RESIDUAL_PLANES
    y,  # float32 [size] in planes of OUT_PLANES
    size,
    eps,
    OUT_PLANES: tl.constexpr,
    RESIDUAL_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """y = residual + RMS norm(part), for layers that normalise what they add; each program reads the whole for it."""
    _wait_for_others(DEPENDENT)
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(part + at, mask=at < size, other=0.0)
        squares += value * value
    inverse = tl.rsqrt(tl.sum(squares) / size + eps)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    added = tl.load(part + at, mask=inside, other=0.0) * inverse * tl.load(gain + at, mask=inside, other=0.0)
    added += tl.load(residual + _place(at, size, RESIDUAL_PLANES), mask=inside, other=0.0)
    tl.store(y + _place(at, size, OUT_PLANES), added, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _rotated(  # type: ignore[no-untyped-def]
    vector,
    d,
    cos,
    sin,
    state,
    norm,
    eps,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
):
    """Elements d [..., D padded] of heads that begin at `vector`, normalised if NORMED, turned to their position."""
    inside = d < D
    value = tl.load(vector + d, mask=inside, other=0.0)
    inverse = 1.0
    if NORMED:
        inverse = tl.rsqrt(tl.sum(value * value, -1, keep_dims=True) / D + eps)
        value = value * inverse * tl.load(norm + d, mask=inside, other=0.0)
    if ROTARY != 0:
        WIDTH: tl.constexpr = D // 4 if ROTARY == 3 else ROTATED // 2  # pairs that one position rotates
        position = tl.load(state + 2)
        turns = d < ROTATED
        if ROTARY == 2:
            pair, partner, sign = d // 2, d ^ 1, tl.where(d % 2 == 0, -1.0, 1.0)
        else:
            inner = d
            if ROTARY == 3:
                inner = d % (D // 2)
                turns = inside
                position = tl.where(d < D // 2, position, tl.load(state + 3))
            low = inner < WIDTH
            pair, partner = inner % WIDTH, tl.where(low, d + WIDTH, d - WIDTH)
            sign = tl.where(low, -1.0, 1.0)
        turns = turns & inside
        other = tl.load(vector + partner, mask=turns, other=0.0)
        if NORMED:
            other = other * inverse * tl.load(norm + partner, mask=turns, other=0.0)
        at = position * WIDTH + pair
        turned = value * tl.load(cos + at, mask=turns, other=1.0) + sign * other * tl.load(
            sin + at, mask=turns, other=0.0
        )
        value = tl.where(turns, turned, value)
    return value


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    qkv,  # float32 [(HEADS + 2 * KV_HEADS) * D]: queries, keys, values of all heads; of each in turn if BY_HEAD
    cos,  # float32 [positions, pairs of a rotated part]
    sin,
    keys,  # the layer's cache [KV_HEADS, capacity, D]
    values,
    query_norm,  # float32 [D]
    key_norm,
    state,
    maxima,  # float32 [HEADS, splits]
    sums,  # float32 [HEADS, splits]
    partial,  # float32 [HEADS, splits, D]
    capacity,
    splits,
    scale,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    GROUP: tl.constexpr,  # query heads of a key head
    GROUP_BLOCK: tl.constexpr,  # the same as rows of a product: at least 16 where there are several
    BY_HEAD: tl.constexpr,
    ROTARY: tl.constexpr,
    ROTATED: tl.constexpr,
    NORMED: tl.constexpr,
    WIDE: tl.constexpr,  # products of several rows in float32, not in the cache's type
    SPLIT: tl.constexpr,  # positions of a split
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """One key head and one split of the cache: rotates, writes the new key and value, attends with its query heads.

    Splits have a fixed length, so sums have one order whatever the capacity; one that begins behind the filled part has
    nothing to do. The new position belongs to split 0, which takes it from registers: nobody reads what is written.
    """
    _wait_for_others(DEPENDENT)
    kv_head, split = tl.program_id(0), tl.program_id(1)
    length = tl.load(state + 1)
    first = split * SPLIT
    if (split > 0) & (first >= length):
        return
    d = tl.arange(0, D_BLOCK)
    d_in = d < D
    member = tl.arange(0, GROUP_BLOCK)
    member_in = member < GROUP
    head = kv_head * GROUP + tl.where(member_in, member, 0)
    STEP: tl.constexpr = 3 * D if BY_HEAD else D
    KEYS: tl.constexpr = D if BY_HEAD else HEADS * D
    VALUES: tl.constexpr = 2 * D if BY_HEAD else (HEADS + KV_HEADS) * D
    query = _rotated(
        qkv + head[:, None] * STEP, d[None, :], cos, sin, state, query_norm, eps, D, ROTARY, ROTATED, NORMED
    )  # [GROUP_BLOCK, D_BLOCK]
    kind = keys.dtype.element_ty
    cache = kv_head * capacity * D
    best = tl.full((GROUP_BLOCK,), float("-inf"), dtype=tl.float32)
    weight = tl.zeros((GROUP_BLOCK,), dtype=tl.float32)
    total = tl.zeros((GROUP_BLOCK, D_BLOCK), dtype=tl.float32)
    if split == 0:
        key = _rotated(
            qkv + KEYS + kv_head * STEP, d[None, :], cos, sin, state, key_norm, eps, D, ROTARY, ROTATED, NORMED
        ).to(kind)
        value = tl.load(qkv + VALUES + kv_head * STEP + d, mask=d_in, other=0.0).to(kind)
        tl.store(keys + cache + length * D + d[None, :], key, mask=d_in[None, :])
        tl.store(values + cache + length * D + d, value, mask=d_in)
        best = tl.sum(query * key.to(tl.float32), 1) * scale
        weight += 1.0
        total += value.to(tl.float32)[None, :]
    for start in range(first, min(first + SPLIT, length), BLOCK):
        at = start + tl.arange(0, BLOCK)
        at_in = at < min(first + SPLIT, length)
        tile_in = at_in[:, None] & d_in[None, :]
        key_tile = tl.load(keys + cache + at[:, None] * D + d[None, :], mask=tile_in, other=0.0)
        value_tile = tl.load(values + cache + at[:, None] * D + d[None, :], mask=tile_in, other=0.0)
        if GROUP_BLOCK == 1:
            scores = tl.sum(query * key_tile.to(tl.float32), 1)[None, :]
        elif WIDE:
            scores = tl.dot(query, tl.trans(key_tile.to(tl.float32)), input_precision="ieee")
        else:
            scores = tl.dot(query.to(kind), tl.trans(key_tile))
        scores = tl.where(at_in[None, :], scores * scale, float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - better)
        chances = tl.exp(scores - better[:, None])
        weight = weight * shrink + tl.sum(chances, 1)
        if GROUP_BLOCK == 1:
            seen = tl.sum(tl.trans(chances) * value_tile.to(tl.float32), 0)[None, :]
        elif WIDE:
            seen = tl.dot(chances, value_tile.to(tl.float32), input_precision="ieee")
        else:
            seen = tl.dot(chances.to(kind), value_tile)
        total = total * shrink[:, None] + seen
        best = better
    out = head * splits + split
    tl.store(maxima + out, best, mask=member_in)
    tl.store(sums + out, weight, mask=member_in)
    tl.store(partial + out[:, None] * D + d[None, :], total, mask=member_in[:, None] & d_in[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def merge(  # type: ignore[no-untyped-def]
    maxima,
    sums,
    partial,
    y,  # float32 [HEADS * D] in planes of OUT_PLANES
    state,
    splits,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    D_BLOCK: tl.constexpr,
    SPLIT: tl.constexpr,
    OUT_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The splits of one head, weighed by their maxima, become one vector."""
    _wait_for_others(DEPENDENT)
    head = tl.program_id(0)
    used = tl.maximum(1, tl.cdiv(tl.load(state + 1), SPLIT))
    d = tl.arange(0, D_BLOCK)
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    for start in range(0, used, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(maxima + head * splits + at, mask=at < used, other=float("-inf")))
    top = tl.max(best)
    weight = tl.zeros((BLOCK,), dtype=tl.float32)
    total = tl.zeros((D_BLOCK,), dtype=tl.float32)
    for start in range(0, used, BLOCK):
        at = start + tl.arange(0, BLOCK)
        row = head * splits + at
        factor = tl.exp(tl.load(maxima + row, mask=at < used, other=float("-inf")) - top)
        weight += factor * tl.load(sums + row, mask=at < used, other=0.0)
        tile_in = (at < used)[:, None] & (d < D)[None, :]
        total += tl.sum(factor[:, None] * tl.load(partial + row[:, None] * D + d[None, :], mask=tile_in, other=0.0), 0)
    tl.store(y + _place(head * D + d, HEADS * D, OUT_PLANES), total / tl.sum(weight), mask=d < D)


@triton.jit  # type: ignore[untyped-decorator]
def embed(  # type: ignore[no-untyped-def]
    words,
    pairs,
    positions,  # float32 [positions, inputs] (GPT-2's learnt ones)
    state,
    marks,  # uint8 [vocab]: the token has been said now
    y,  # float32 [inputs] in planes of OUT_PLANES
    inputs,
    BITS: tl.constexpr,
    BFLOAT: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    OUT_PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The row of the embedding for the token in `state`."""
    _wait_for_others(DEPENDENT)
    CODES: tl.constexpr = 32 // BITS
    width = inputs // CODES
    token = tl.load(state)
    if tl.program_id(0) == 0:
        tl.store(marks + token, 1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at_in = at < width
    word = tl.load(words + token.to(tl.int64) * width + at, mask=at_in, other=0)
    scale, low = 1.0, 0.0
    if BITS < 16:
        pair = pairs + 2 * (token.to(tl.int64) * GROUPS + (at * CODES) // GROUP)
        scale = tl.load(pair, mask=at_in, other=0.0).to(tl.float32)
        low = tl.load(pair + 1, mask=at_in, other=0.0).to(tl.float32)
    for j in tl.static_range(CODES):
        element = at * CODES + j
        value = _code(word, j, BITS, BFLOAT) * scale + low
        if HAS_POSITIONS:
            value += tl.load(positions + tl.load(state + 2) * inputs + element, mask=at_in, other=0.0)
        tl.store(y + _place(element, inputs, OUT_PLANES), value, mask=at_in)


@triton.jit  # type: ignore[untyped-decorator]
def _weight(word, scale, low, J: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    return _code(word, J, BITS, False) * scale + low


@triton.jit  # type: ignore[untyped-decorator]
def unpack(  # type: ignore[no-untyped-def]
    words, pairs, out, rows, inputs, BITS: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The weights [rows, inputs] in `out`'s type: a prompt's many rows go through the vendor's own product."""
    CODES: tl.constexpr = 32 // BITS
    width = tl.multiple_of(inputs // CODES, 4)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (at < width)[None, :]
    word = tl.load(words + row[:, None].to(tl.int64) * width + at[None, :], mask=inside, other=0)
    pair = pairs + 2 * (row[:, None].to(tl.int64) * GROUPS + (at[None, :] * CODES) // GROUP)
    scale = tl.load(pair, mask=inside, other=0.0).to(tl.float32)
    low = tl.load(pair + 1, mask=inside, other=0.0).to(tl.float32)
    if BITS == 8:
        even = tl.interleave(_weight(word, scale, low, 0, BITS), _weight(word, scale, low, 2, BITS))
        odd = tl.interleave(_weight(word, scale, low, 1, BITS), _weight(word, scale, low, 3, BITS))
    else:
        even = tl.interleave(_weight(word, scale, low, 0, BITS), _weight(word, scale, low, 4, BITS))
        odd = tl.interleave(_weight(word, scale, low, 1, BITS), _weight(word, scale, low, 5, BITS))
        second = tl.interleave(_weight(word, scale, low, 2, BITS), _weight(word, scale, low, 6, BITS))
        fourth = tl.interleave(_weight(word, scale, low, 3, BITS), _weight(word, scale, low, 7, BITS))
        even, odd = tl.interleave(even, second), tl.interleave(odd, fourth)
    value = tl.interleave(even, odd)  # [ROWS, CODES * BLOCK], as they stand in the row
    column = tl.program_id(1) * BLOCK * CODES + tl.arange(0, CODES * BLOCK)
    target = out + row[:, None].to(tl.int64) * inputs + column[None, :]
    inside = (row < rows)[:, None] & (column < inputs)[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _ordered(value):  # type: ignore[no-untyped-def]
    """An int32 that compares as the float32 does; NaN stands above everything."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit  # type: ignore[untyped-decorator]
def candidates(  # type: ignore[no-untyped-def]
    logits,  # float32 [vocab]
    marks,  # uint8 [vocab]: 1 where a repetition costs, 2 where an id is never chosen
    numbers,  # float32 [2]: the penalty, the temperature
    best,  # int64 [programs, TOP]: value and index in one number, descending
    exponents,  # float32 [programs, 2]: maximum, and the sum of exp(value - maximum), both at the temperature
    vocab,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The TOP largest logits of a piece of the vocabulary, and what the log-sum-exp of all needs of it.

    Of equal logits the lower index comes first, as `torch.argmax` has it. What was said is divided by the penalty where
    it is positive, multiplied where it is negative (Keskar et al. 2019); the row itself stays what it is.
    """
    _wait_for_others(DEPENDENT)
    program = tl.program_id(0)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    value = tl.load(logits + at, mask=inside, other=float("-inf"))
    mark = tl.load(marks + at, mask=inside, other=0)
    factor, temperature = tl.load(numbers), tl.load(numbers + 1)
    costly = tl.where(value > 0, tl.div_rn(value, factor), value * factor)
    value = tl.where(mark == 2, float("-inf"), tl.where(mark == 1, costly, value))
    warm = value / temperature
    top = tl.max(warm)
    tl.store(exponents + 2 * program, top)
    part = tl.where(inside & (value != float("-inf")), tl.exp(warm - top), 0.0)
    tl.store(exponents + 2 * program + 1, tl.sum(part))
    key = (_ordered(value).to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
    key = tl.where(inside, key, -0x8000000000000000)
    ordered = tl.sort(key, descending=True)
    place = tl.arange(0, BLOCK)
    tl.store(best + program * TOP + place, ordered, mask=place < TOP)


@triton.jit  # type: ignore[untyped-decorator]
def choose_best(  # type: ignore[no-untyped-def]
    best,
    exponents,
    result,  # float32 [1 + 2 * TOP]: log-sum-exp, the largest logits, their ids (exact: below 2**24)
    programs,
    TOP: tl.constexpr,
    PROGRAMS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The best of all pieces in one row, so that one small copy to the host is all that a token needs."""
    _wait_for_others(DEPENDENT)
    piece = tl.arange(0, PROGRAMS_BLOCK)
    top = tl.load(exponents + 2 * piece, mask=piece < programs, other=float("-inf"))
    total = tl.load(exponents + 2 * piece + 1, mask=piece < programs, other=0.0)
    maximum = tl.max(top)
    tl.store(result, maximum + tl.log(tl.sum(total * tl.exp(top - maximum))))
    at = tl.arange(0, BLOCK)
    key = tl.sort(tl.load(best + at, mask=at < programs * TOP, other=-0x8000000000000000), descending=True)
    bits = (key >> 32).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    index = 0x7FFFFFFF - (key & 0xFFFFFFFF).to(tl.int32)
    tl.store(result + 1 + at, value, mask=at < TOP)
    tl.store(result + 1 + TOP + at, index.to(tl.float32), mask=at < TOP)
