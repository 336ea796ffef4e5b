"""One token through a whole network on a card: a fixed list of kernel launches over fixed addresses.

A list without a decision, an allocation or a wait in it can be captured once as a CUDA graph and replayed for each
token: what a token costs is then what its bytes cost. A model of a kind that is known says which of its modules do what
(`Parts`); whatever is not known is computed by torch as before. For a layer: product of queries, keys and values with
the norm inside, attention of a split of the cache, merge of the splits, output product with the residual, gate and up
with norm and activation inside, down with the residual. Without a card the same list runs in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import nn

from glmchat.checkpoints.spec import ModelSpec
from glmchat.engine.adapters.low_rank import AdaptedLinear, bare, side_by_side
from glmchat.engine.gpu.choose import SAID, TOP, Candidates, Choice
from glmchat.engine.gpu.words import BLOCK, CardWords, kernels, rows_of_a_program
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.parts import LayerParts, NotCompiled, Parts
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

SPLIT, ATTEND_BLOCK, MERGE_BLOCK = 128, 64, 8  # positions of a split, of a step inside it; splits merged at a time
ADD_BLOCK = 512  # numbers of a program that adds what a layer normalised
_WIDEST_SORT = 4096  # numbers that one program sorts
_STATE = 8


@dataclass(slots=True)
class Launch:
    """One kernel with its grid and everything that it is given."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    dependent: bool = False  # may start before the one in front of it has ended, and waits inside

    def __call__(self) -> None:
        early = {"DEPENDENT": True, "launch_pdl": True} if self.dependent else {}
        getattr(kernels(), self.kernel)[self.grid](*self.arguments, **self.constants, **early)

    def addresses(self) -> tuple[Any, ...]:
        """What it reads and writes, for comparing two runs."""
        return (
            self.kernel,
            self.grid,
            tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in self.arguments),
            tuple(sorted(self.constants.items())),
        )


@dataclass(slots=True)
class _Matrix:
    """Rows of one or several layers below each other, as `product` reads them."""

    words: torch.Tensor
    pairs: torch.Tensor
    bias: torch.Tensor | None
    outputs: int
    inputs: int
    bits: int
    group: int
    bfloat: bool = False
    down: _Matrix | None = None  # the active adapters' first matrices
    up: torch.Tensor | None = None
    hidden: torch.Tensor | None = field(default=None, repr=False)  # what `down` made of the input

    @property
    def planes(self) -> int:
        return 32 // self.bits

    @property
    def rank(self) -> int:
        return 0 if self.up is None else self.up.shape[1]


class CardSteps:
    """The steps of one model as it is now, over whichever cache it works on: each cache has addresses of its own.

    dependent: kernels start before the one in front has ended (programmatic dependent launch, Hopper and later); set
    by the self-test. Raises NotCompiled with the reason if there is something unknown to them.
    """

    dependent: ClassVar[bool] = False

    def __init__(self, parts: Parts, spec: ModelSpec) -> None:
        self._parts, self._spec = parts, spec
        self._places = places_of(parts)
        self._steps: list[CardStep] = []
        measures = (spec.layers, spec.kv_heads, spec.head_dim)
        small = KVCache(*measures, SPLIT, torch.float32, *map(str, self._places))
        chain_of(parts, spec, small)  # refuses what it must

    def takes(self, cache: KVCache) -> bool:
        return [keys.device for keys in cache.keys] == self._places and cache.length < cache.capacity

    def __call__(self, token: int, cache: KVCache, position: int, second_position: int = 0) -> torch.Tensor:
        """As `CardStep` gives them."""
        if not self._steps or not self._steps[0].takes(cache):
            self._steps = []  # their buffers are gone before there are others
            self._steps = chain_of(self._parts, self._spec, cache, dependent=self.dependent)
        return run_chain(self._steps, token, cache, position, second_position)


def places_of(parts: Parts) -> list[torch.device]:
    """Where each layer lies."""
    return [next(layer.input_norm.parameters()).device for layer in parts.layers]


def chain_of(parts: Parts, spec: ModelSpec, cache: KVCache, *, dependent: bool = False) -> list[CardStep]:
    """A step for each card, in the order in which a token passes them."""
    steps = []
    for device, span in spans(places_of(parts), _place(parts.head)):
        with current(device):
            steps.append(CardStep(parts, spec, cache, dependent=dependent, span=span, device=device))
    return steps


def spans(places: Sequence[torch.device], head: torch.device) -> list[tuple[torch.device, range]]:
    """Which card computes which layers, in order. A head that lies elsewhere than the last layers (an embedding that
    is the head too) is a part of its own, without layers."""
    starts = [number for number, place in enumerate(places) if number == 0 or place != places[number - 1]]
    ends = [*starts[1:], len(places)]
    parts = [(places[start], range(start, end)) for start, end in zip(starts, ends, strict=True)]
    return parts if places[-1] == head else [*parts, (head, range(len(places), len(places)))]


def run_chain(
    steps: Sequence[CardStep], token: int, cache: KVCache, position: int, second_position: int = 0
) -> torch.Tensor:
    """As `CardStep` gives them, by steps that follow each other: what one hands on is copied to the next one's card."""
    if len(steps) == 1:
        return steps[0](token, cache, position, second_position)
    for number, step in enumerate(steps):
        with current(step.device):
            if number:
                step.incoming.copy_(steps[number - 1].outgoing, non_blocking=True)
                step.note(token)
            step.run(token, cache.length, position, second_position)
    return steps[-1].row()


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Inside, Triton launches on this card; afterwards on the one on which it did before."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield


class CardStep:
    """One model as it is now over one cache. Raises NotCompiled with the reason if there is something unknown to it.

    span: the layers that it computes, of several cards' the ones that lie on `device`; None: all. The first step looks
    the token up, any other finds in `incoming` what the one before it left in `outgoing`; the last one has the head.
    """

    def __init__(
        self,
        parts: Parts,
        spec: ModelSpec,
        cache: KVCache,
        *,
        dependent: bool = False,
        span: range | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._spec, self._parts, self._cache, self._dependent = spec, parts, cache, dependent
        self._keys = cache.keys[0]  # a cache that has grown lies elsewhere
        self._span = range(len(parts.layers)) if span is None else span
        self.device = self._device = self._keys.device if device is None else device
        self._launches: list[Launch] = []
        self._graph: Any = None
        self._unused = torch.zeros(1, device=self._device)
        heads, kv_heads, size = spec.heads, spec.kv_heads, spec.head_dim
        if bare(parts.head).out_features != spec.vocab_size:
            raise NotCompiled("an adapter brings other words")
        if size > 256 or heads % kv_heads:
            raise NotCompiled(f"{heads} heads of {size} over {kv_heads}")
        self._splits = -(-cache.capacity // SPLIT)
        self._state = self._empty(_STATE, torch.int32)
        self._on_cuda = self._device.type == "cuda"
        self._state_host = torch.zeros(_STATE, dtype=torch.int32, pin_memory=self._on_cuda)
        self._state_numbers = self._state_host.numpy()
        self._sent: Any = None  # reached when the state of the token before is on the card
        if self._on_cuda:
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._maxima, self._sums = self._empty(heads * self._splits), self._empty(heads * self._splits)
        self._partial = self._empty(heads * self._splits * size)
        self._tables = self._rotary()
        self._choice: Choice | None = None  # whose marks and numbers lie on the card
        self._marks = torch.zeros(spec.vocab_size, dtype=torch.uint8, device=self._device)
        self._numbers = torch.ones(2, device=self._device)
        own = [parts.layers[number] for number in self._span]
        layers = [self._matrices(layer) for layer in own]
        has_head = self._span.stop == len(parts.layers) and (device is None or device == _place(parts.head))
        reader = parts.layers[self._span.stop].qkv[0] if self._span.stop < len(parts.layers) else parts.head
        planes = [first.planes for first, *_ in layers[1:]] + [32 // _bits(reader)]  # of what each layer hands on
        hidden = spec.hidden_size
        x, h = self._empty(hidden), self._empty(hidden)
        # Not one buffer for both: the graph's first token runs its launches twice.
        self.incoming, self.outgoing = self._empty(hidden) if self._span.start else x, x
        normed = [self._empty(hidden), self._empty(hidden)] if parts.alpha is not None else None
        qkv, attended = self._empty((heads + 2 * kv_heads) * size), self._empty(heads * size)
        inner = self._empty(layers[0][3].inputs if layers else 1)
        if not self._span.start:
            self._embed(parts, x, layers[0][0].planes)
        entering = self.incoming
        for number, layer, matrices, following in zip(self._span, own, layers, planes[: len(own)], strict=True):
            first, output, second, down = matrices
            self._product(first, entering, qkv, norm=layer.input_norm, keep=normed[0] if normed else None)
            self._attention(layer, number, qkv, attended, output.planes)
            residual = (normed[0] if normed else entering, first.planes)
            self._sum(output, attended, h, second.planes, residual, layer.attention_norm)
            self._product(
                second, h, inner, planes=down.planes, norm=layer.second_norm, keep=normed[1] if normed else None,
                activation=parts.activation, gated=parts.gated,
            )  # fmt: skip
            residual = (normed[1] if normed else h, second.planes)
            self._sum(down, inner, x, following, residual, layer.feed_forward_norm)
            entering = x
        if has_head:
            self.logits = self._empty(spec.vocab_size)
            self._product(self._fused([parts.head]), entering, self.logits, norm=parts.last_norm)
            self._choose(spec.vocab_size)

    # Running

    def takes(self, cache: KVCache) -> bool:
        return cache is self._cache and cache.keys[0] is self._keys and cache.length < cache.capacity

    def __call__(self, token: int, cache: KVCache, position: int, second_position: int = 0) -> torch.Tensor:
        """float32 logits [vocab] behind `token`, still on the card, in a buffer that the next one overwrites.

        Keys and values of the token are in the cache, whose length has not moved. What chooses the next token asks the
        row for its `candidates`.
        """
        self.run(token, cache.length, position, second_position)
        return self.row()

    def run(self, token: int, length: int, position: int, second_position: int) -> None:
        """All launches for one token, on the current card."""
        if self._sent is not None:
            self._sent.synchronize()
        self._state_numbers[:4] = token, length, position, second_position
        self._state.copy_(self._state_host, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
            self._replay()
        else:
            _run(self._launches)

    def note(self, token: int) -> None:
        """Mark a token that another card looks up."""
        if self._choice is not None and self._choice.penalty != 1.0:
            self._marks[token].fill_(SAID)

    def row(self) -> torch.Tensor:
        """The logits of the token that was run."""
        row = self.logits.view(-1)  # a tensor of its own, so that what is told of it is of this token
        row.candidates = self.candidates  # type: ignore[attr-defined]
        return row

    def candidates(self, choice: Choice) -> Candidates:
        """The best of the last token's row. What an answer's tokens are chosen by goes to the card with its first."""
        with torch.inference_mode():  # as the step is: its buffers are changed only there
            if self._choice is not choice:
                self._marks.copy_(choice.marks(self._spec.vocab_size))
                self._numbers.copy_(torch.tensor((choice.penalty, choice.temperature)))
                with current(self._device):
                    _run(self._launches[-2:])
                self._choice = choice
            self._result_host.copy_(self._result, non_blocking=True)
            if self._on_cuda:
                torch.cuda.current_stream(self._device).synchronize()
            numbers = self._result_host.clone()
        if self._spec.vocab_size < TOP:
            numbers = torch.cat((numbers[: 1 + self._spec.vocab_size], numbers[1 + TOP :][: self._spec.vocab_size]))
        return Candidates.of(numbers)

    def launches(self) -> list[Launch]:
        """What one token runs, in order."""
        return list(self._launches)

    def _replay(self) -> None:
        """The graph of all launches; captured at its first token, after one run that compiles what is new."""
        if self._graph is None:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(stream):
                _run(self._launches)
            torch.cuda.current_stream(self._device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):  # of this card: torch's own belongs to the first that captured
                _run(self._launches)
            self._graph = graph
        self._graph.replay()

    # Building

    def _empty(self, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def _add(self, kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        given = tuple(self._unused if argument is None else argument for argument in arguments)
        self._launches.append(Launch(kernel, grid, given, constants, self._dependent))

    def _matrices(self, layer: LayerParts) -> tuple[_Matrix, _Matrix, _Matrix, _Matrix]:
        return (
            self._fused(layer.qkv),
            self._fused([layer.o_proj]),
            self._fused(layer.gate_up),
            self._fused([layer.down_proj]),
        )

    def _fused(self, modules: Sequence[nn.Module]) -> _Matrix:
        """Layers that read one input below each other, once in memory: the layers keep views."""
        bases = [bare(module) for module in modules]
        if any(type(module) not in (nn.Linear, QuantLinear, AdaptedLinear) for module in modules):
            raise NotCompiled(f"a layer is a {type(modules[0]).__name__}")
        if len(bases) > 1 and all(isinstance(base, QuantLinear) for base in bases):
            whole = QuantLinear.fused(cast("list[QuantLinear]", bases))
            if whole is None:
                raise NotCompiled("matrices of one input are packed in different ways")
            matrix = self._of(whole)
        elif len(bases) == 1:
            matrix = self._of(bases[0])
        else:
            linears = cast("list[nn.Linear]", bases)
            if any(type(base) is not nn.Linear for base in linears):
                raise NotCompiled("matrices of one input are packed and not")
            whole_weight = _stacked(linears)
            bias = None
            if any(base.bias is not None for base in linears):
                bias = torch.cat(
                    [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias for base in linears]
                )
            matrix = self._dense(whole_weight, bias)
        change = side_by_side(modules)
        if change is not None:
            if change.gain is not None or change.offset is not None:
                raise NotCompiled("an adapter scales or shifts its layer")
            if change.down.shape[1]:
                padded = torch.nn.functional.pad(change.down.t(), (0, -change.down.shape[0] % 32))
                matrix.down = self._dense(padded.contiguous().float().to(self._device), None)
                matrix.up = change.up.t().contiguous().float().to(self._device)
                matrix.hidden = self._empty(matrix.rank)
        return matrix

    def _of(self, base: nn.Module) -> _Matrix:
        if isinstance(base, QuantLinear):
            if not isinstance(base.kernel, CardWords):
                raise NotCompiled(f"kernel {base.kernel.name}")
            bias = None if base.bias is None else base.bias.float()
            shape = base.shape
            words, pairs = base.packed["codes"], base.packed["pairs"]
            return _Matrix(words, pairs, bias, shape.out_features, shape.in_features, shape.bits, shape.group)
        linear = cast(nn.Linear, base)
        return self._dense(linear.weight, linear.bias)

    def _dense(self, weight: torch.Tensor, bias: torch.Tensor | None) -> _Matrix:
        outputs, inputs = weight.shape
        bits = 8 * weight.element_size()
        if inputs % 32 or not weight.is_contiguous() or bits not in (16, 32):
            raise NotCompiled(f"a matrix of {inputs} inputs in {weight.dtype}")
        words = weight.detach().view(torch.int32)
        wide = None if bias is None else bias.detach().float()
        bfloat = weight.dtype == torch.bfloat16
        return _Matrix(words, self._unused, wide, outputs, inputs, bits, inputs, bfloat)

    def _planes(self, vector: torch.Tensor, planes: int) -> torch.Tensor:
        return vector.detach().float().view(-1, planes).t().contiguous().view(-1).to(self._device)

    def _product(
        self,
        matrix: _Matrix,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        planes: int = 1,
        norm: nn.Module | None = None,
        keep: torch.Tensor | None = None,
        activation: str | None = None,
        gated: bool = False,
        residual: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        """planes: of the output, which are those of its reader. keep: where the normalised input is written."""
        kind, gain, shift, eps = self._norm(norm, matrix.planes)
        if matrix.down is not None:
            assert matrix.hidden is not None
            if matrix.down.planes != matrix.planes:
                matrix.down = self._in_planes_of(matrix.down, matrix.planes)
            self._launch(matrix.down, x, matrix.hidden, kind, gain, shift, eps)
        outputs = matrix.outputs // (2 if gated else 1)
        rows = rows_of_a_program(outputs)
        programs = -(-outputs // rows)
        self._launch(
            matrix, x, y, kind, gain, shift, eps, planes=planes, gated=gated, activation=activation, residual=residual,
            normed=keep, kept=_power(-(-matrix.inputs // programs)) if keep is not None else 0,
        )  # fmt: skip

    def _sum(
        self,
        matrix: _Matrix,
        x: torch.Tensor,
        y: torch.Tensor,
        planes: int,
        residual: tuple[torch.Tensor, int],
        norm: nn.Module | None,
    ) -> None:
        """y = residual + W x; norm: of what is added, where the layer has one."""
        if norm is None:
            self._product(matrix, x, y, planes=planes, residual=residual)
            return
        kind, gain, _, eps = self._norm(norm, 1)
        if kind != 1:
            raise NotCompiled("a norm of what a layer adds is no RMS norm")
        part, (stream, stream_planes) = self._empty(matrix.outputs), residual
        self._product(matrix, x, part)
        self._add(
            "add_normed", (-(-matrix.outputs // ADD_BLOCK),), part, gain, stream, y, matrix.outputs, eps,
            OUT_PLANES=planes, RESIDUAL_PLANES=stream_planes, BLOCK=ADD_BLOCK,
        )  # fmt: skip

    def _launch(
        self,
        matrix: _Matrix,
        x: torch.Tensor,
        y: torch.Tensor,
        kind: int,
        gain: torch.Tensor | None,
        shift: torch.Tensor | None,
        eps: float,
        *,
        planes: int = 1,
        gated: bool = False,
        activation: str | None = None,
        residual: tuple[torch.Tensor, int] | None = None,
        normed: torch.Tensor | None = None,
        kept: int = 0,
    ) -> None:
        outputs = matrix.outputs // (2 if gated else 1)
        rows = rows_of_a_program(outputs)
        added, added_planes = residual or (None, 1)
        alpha = 1.0 if self._parts.alpha is None else self._parts.alpha
        self._add(
            "product", (-(-outputs // rows),), x, matrix.words, matrix.pairs, matrix.bias, gain, shift, added,
            matrix.hidden, matrix.up, y, normed, matrix.inputs, outputs, eps, alpha, BITS=matrix.bits,
            BFLOAT=matrix.bfloat, GROUP=matrix.group, GROUPS=matrix.inputs // matrix.group, NORM=kind,
            KEEP_NORMED=kept, GATED=gated, ACTIVATION={None: 0, "silu": 1, "gelu": 2}[activation],
            HAS_BIAS=matrix.bias is not None, HAS_RESIDUAL=added is not None, RANK=matrix.rank,
            RANK_BLOCK=_power(max(matrix.rank, 1)), OUT_PLANES=planes, RESIDUAL_PLANES=added_planes, ROWS=rows,
            BLOCK=BLOCK,
        )  # fmt: skip

    def _in_planes_of(self, down: _Matrix, planes: int) -> _Matrix:
        """An adapter's first matrix for an input in other planes: its columns in that order, read as if in one."""
        weight = down.words.view(torch.float32)
        ordered = weight.view(weight.shape[0], -1, planes).transpose(1, 2).reshape(weight.shape).contiguous()
        return self._dense(ordered, None)

    def _norm(self, norm: nn.Module | None, planes: int) -> tuple[int, torch.Tensor | None, torch.Tensor | None, float]:
        if norm is None:
            return 0, None, None, 0.0
        gain = self._planes(cast(torch.Tensor, norm.weight), planes)
        if isinstance(norm, nn.LayerNorm):
            bias = norm.bias if norm.bias is not None else torch.zeros_like(norm.weight)
            return 2, gain, self._planes(bias, planes), norm.eps
        return 1, gain, None, cast(float, norm.eps)

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [positions, pairs] of every position that the cache can hold, as torch's forward has them."""
        frequencies = self._parts.frequencies
        if frequencies is None:
            return self._unused, self._unused
        positions = torch.arange(self._cache.capacity + 1, dtype=torch.float32)
        angles = torch.outer(positions, frequencies.float().cpu())
        return angles.cos().to(self._device), angles.sin().to(self._device)

    def _attention(self, layer: LayerParts, number: int, qkv: torch.Tensor, y: torch.Tensor, planes: int) -> None:
        spec, parts = self._spec, self._parts
        group, size = spec.heads // spec.kv_heads, spec.head_dim
        keys, values = self._cache.keys[number], self._cache.values[number]
        room = keys.shape[1]  # more than the others' where memory ran out while the cache grew
        norms = layer.query_norm is not None
        gains = [
            None if norm is None else cast(torch.Tensor, norm.weight).float()
            for norm in (layer.query_norm, layer.key_norm)
        ]
        eps = 0.0 if layer.query_norm is None else cast(float, layer.query_norm.eps)
        rotated = 0 if parts.frequencies is None else 2 * len(parts.frequencies)
        kinds = {None: 0, "halves": 1, "interleaved": 2, "two positions": 3}
        wide = keys.dtype == torch.float32 or keys.device.type == "cpu"  # the interpreter has no bfloat16 products
        self._add(
            "attend", (spec.kv_heads, self._splits), qkv, *self._tables, keys, values, *gains, self._state,
            self._maxima, self._sums, self._partial, room, self._splits, size**-0.5, eps,
            HEADS=spec.heads, KV_HEADS=spec.kv_heads, D=size, D_BLOCK=_power(size), GROUP=group,
            GROUP_BLOCK=1 if group == 1 else max(16, _power(group)), BY_HEAD=parts.by_head,
            ROTARY=kinds[parts.rotary], ROTATED=rotated, NORMED=norms, WIDE=wide, SPLIT=SPLIT,
            BLOCK=attend_block(self._device, wide=wide),
        )  # fmt: skip
        self._add(
            "merge", (spec.heads,), self._maxima, self._sums, self._partial, y, self._state, self._splits,
            HEADS=spec.heads, D=size, D_BLOCK=_power(size), SPLIT=SPLIT, OUT_PLANES=planes, BLOCK=MERGE_BLOCK,
        )  # fmt: skip

    def _embed(self, parts: Parts, x: torch.Tensor, planes: int) -> None:
        embedding = parts.embedding
        if type(embedding) is QuantEmbedding:
            matrix = self._of(embedding.linear)
        elif type(embedding) is nn.Embedding:
            matrix = self._dense(embedding.weight, None)
        else:
            raise NotCompiled(f"an embedding is a {type(embedding).__name__}")
        learnt = None if parts.positions is None else cast(torch.Tensor, parts.positions.weight).float().contiguous()
        words = matrix.inputs // matrix.planes
        block = min(256, _power(words))
        self._add(
            "embed", (-(-words // block),), matrix.words, matrix.pairs, learnt, self._state, self._marks, x,
            matrix.inputs,
            BITS=matrix.bits, BFLOAT=matrix.bfloat, GROUP=matrix.group, GROUPS=matrix.inputs // matrix.group,
            HAS_POSITIONS=learnt is not None, OUT_PLANES=planes, BLOCK=block,
        )  # fmt: skip

    def _choose(self, vocab: int) -> None:
        block = max(256, _power(-(-vocab * TOP // _WIDEST_SORT)))
        programs = -(-vocab // block)
        best = self._empty(programs * TOP, torch.int64)
        exponents = self._empty(2 * programs)
        self._result = self._empty(1 + 2 * TOP)
        self._result_host = torch.empty(1 + 2 * TOP, pin_memory=self._on_cuda)
        self._add(
            "candidates", (programs,), self.logits, self._marks, self._numbers, best, exponents, vocab, TOP=TOP,
            BLOCK=block,
        )  # fmt: skip
        self._add(
            "choose_best", (1,), best, exponents, self._result, programs, TOP=TOP, PROGRAMS_BLOCK=_power(programs),
            BLOCK=_power(programs * TOP),
        )  # fmt: skip


def attend_block(device: torch.device, *, wide: bool) -> int:
    """Positions of a step of attention: few where products of several rows are sums in registers, which spill else."""
    if device.type != "cuda":
        return ATTEND_BLOCK
    return 16 if wide or torch.cuda.get_device_capability(device) < (8, 0) else ATTEND_BLOCK


def _bits(module: nn.Module) -> int:
    """Of a weight as `product` reads it."""
    base = bare(module)
    return base.shape.bits if isinstance(base, QuantLinear) else 8 * cast(torch.Tensor, base.weight).element_size()


def _place(module: nn.Module) -> torch.device:
    base = bare(module)
    weight = next(iter(base.packed.values())) if isinstance(base, QuantLinear) else cast(torch.Tensor, base.weight)
    return weight.device


def _power(number: int) -> int:
    """The next power of two, which Triton's ranges need."""
    return 1 << (number - 1).bit_length()


def _run(launches: Sequence[Launch]) -> None:
    for launch in launches:
        launch()


def _stacked(linears: Sequence[nn.Linear]) -> torch.Tensor:
    """The weights below each other; the layers become views of it, so that memory holds them once."""
    weights = [linear.weight for linear in linears]
    places = [weight.data_ptr() for weight in weights]
    ends = [place + weight.nbytes for place, weight in zip(places, weights, strict=True)]
    height, width = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if places[1:] == ends[:-1] and len({weight.untyped_storage().data_ptr() for weight in weights}) == 1:
        return weights[0].detach().as_strided((height, width), (width, 1))  # so they were left the last time
    whole = torch.cat([weight.detach() for weight in weights])
    for linear, view in zip(linears, torch.split(whole, [weight.shape[0] for weight in weights]), strict=True):
        linear.weight = nn.Parameter(view, requires_grad=False)
    return whole
