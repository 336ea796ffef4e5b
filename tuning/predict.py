"""What a run will need, before its first step: memory from what a short document keeps, time from two real passes.

What autograd keeps for the backward pass grows with the tokens, and where attention is written out with their square;
a prefix, and copies of weights in a shorter type, are kept whatever the length. Three short documents tell all three;
the longest pass of the run is then arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glmchat.core.errors import DoesNotFit
from glmchat.core.files import open_file, read_text
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, peak_memory
from glmchat.core.text import human_bytes
from glmchat.engine.formats.weights import trim
from glmchat.tuning.forward import Flat, layers_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.products import logit_rows

_SHORT = 24  # tokens of the shortest document that is measured; the others have so many and twice so many more
_MORE = 12
_MARGIN = 1.05  # what the allocator does not give back
_KINDS = 32  # of lengths: oneDNN makes kernels for what is left behind whole blocks of rows, some 20 MB for each rest


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes and seconds. resident: with the base loaded, kernels made and nothing learned; kept: for the backward pass;
    passing: what lives for a moment; learning: gradients and moments. peak: all of it. seconds: of the whole run."""

    resident: int
    kept: int
    passing: int
    learning: int
    by_layer: bool
    tokens_per_second: float = 0.0
    seconds: float = 0.0

    @property
    def peak(self) -> int:
        return self.resident + int(_MARGIN * (self.kept + self.passing + self.learning))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes that a pass keeps: per token, per square of a document's tokens, per token where only what goes into each
    layer is kept, and always; the widest output of a layer in numbers."""

    per_token: float
    per_square: float
    inputs_per_token: int
    layers: int
    widest: int
    vocabulary: int
    learning: int
    always: float = 0.0
    per_document: int = 0  # behind the first: each layer puts the prefix before its keys and values once more
    words: int = 0  # virtual tokens of each document
    unread: int = 0  # bytes of weights that the short documents did not read
    kernels: int = 0  # bytes of the code that is made for lengths that come up

    def kept(self, lengths: Sequence[int], *, by_layer: bool) -> int:
        lengths = [self.words + length for length in lengths]
        tokens, squares = sum(lengths), sum(length * length for length in lengths)
        whole = self.per_token * tokens + self.per_square * squares
        whole += self.per_document * (len(lengths) - 1)
        if by_layer:
            whole = self.inputs_per_token * tokens + whole / self.layers
        return int(self.always + whole)

    def passing(self, lengths: Sequence[int]) -> int:
        """Four float32 copies of the widest output, or the logits of a chunk of the head three times over."""
        rows = min(sum(lengths), logit_rows(self.vocabulary))
        return max(16 * (sum(lengths) + self.words * len(lengths)) * self.widest, 14 * rows * self.vocabulary)


def measure(method: Method, start: Sequence[int], lengths: Iterable[int] = ()) -> Growth:
    """start: ids that any document of the model begins with (ChatGLM-6B cannot read without its own). lengths: of the
    passes and documents to come."""
    model, learning = method.model, list(method.parameters.values())
    device = learning[0].device
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *learning)}
    short = max(_SHORT, len(start) + 2)
    counts = sorted({min(short + more, model.spec.context - method.virtual) for more in (0, _MORE, 2 * _MORE)})
    sizes: list[float] = []
    held_then: list[int] = []  # by the process, behind each document
    documents = 2 if method.learns_pairs else 1
    for count in counts:
        ids = torch.tensor([*start, *([start[-1]] * count)][:count], device=device)
        rows = torch.arange(len(ids) - 1, device=device)
        rows = torch.cat([rows + number * len(ids) for number in range(documents)])
        flat = Flat(ids.repeat(documents), (len(ids),) * documents, rows, ids[1:].repeat(documents))
        sizes.append(_kept(method, flat, held) / documents)
        trim()
        held_then.append(resident_bytes(str(device)))
    words = method.virtual if method.learns_words else 0
    always, per_token, square = _through([words + count for count in counts], sizes)
    outputs = (getattr(layer, "out_features", None) for layer in model.modules())
    wide = max(out for out in outputs if isinstance(out, int) and out != model.spec.vocab_size)
    width = 4 if model.wide_residual else torch.finfo(model.dtype).bits // 8
    kinds = len({length % _KINDS for length in lengths})
    return Growth(
        per_token=per_token,
        per_square=square,
        inputs_per_token=len(layers_of(model)) * model.spec.hidden_size * width,
        layers=len(layers_of(model)),
        widest=wide,
        vocabulary=model.spec.vocab_size,
        learning=method.state_bytes(),
        always=always,
        per_document=(method.virtual - words) * model.spec.prefix_width * torch.finfo(model.dtype).bits // 8,
        words=words,
        unread=unread_bytes((*model.parameters(), *model.buffers())),
        kernels=kinds * max(0, held_then[-1] - held_then[-2]) if len(held_then) > 1 else 0,
    )


def _through(counts: Sequence[int], sizes: Sequence[float]) -> tuple[float, float, float]:
    """What is always there, per token and per square of the tokens, of sizes at three lengths; of fewer, all of it is
    the tokens'."""
    if len(counts) < 3:
        return 0.0, sizes[-1] / counts[-1], 0.0
    (n, m, o), (first, second, third) = counts, sizes
    steep, steeper = (second - first) / (m - n), (third - second) / (o - m)
    square = max(0.0, (steeper - steep) / (o - n))
    per_token = max(0.0, (third - first) / (o - n) - square * (n + o))
    return max(0.0, first - per_token * n - square * n * n), per_token, square


def _kept(method: Method, flat: Flat, held: set[int]) -> int:
    """Bytes of the tensors that one forward pass keeps for its backward pass."""
    seen: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no storage is freed and its address counted twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = method.loss(flat)
    torch.autograd.backward(loss)  # brings the weights that only the backward pass reads into memory, too
    for parameter in method.parameters.values():
        parameter.grad = None
    return sum(seen.values())


def resident_bytes(device: str) -> int:
    """What this process holds now."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated()
    try:
        return int(read_text(Path("/proc/self/statm")).split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def unread_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of weights that lie in a mapped file and were not read yet: rows of an embedding that no measured document
    had. 0 where the system does not tell which pages are in memory."""
    page, unread, done = os.sysconf("SC_PAGE_SIZE"), 0, 0
    ranges = sorted((t.data_ptr() // page, -(-(t.data_ptr() + t.nbytes) // page)) for t in tensors if t.is_cpu)
    try:
        with open_file(Path("/proc/self/pagemap")) as file:  # 8 bytes for each page; the highest bit: it is there
            for start, end in ranges:
                start, done = max(start, done), max(end, done)  # views of one another
                file.seek(8 * start)
                flags = np.frombuffer(file.read(8 * max(0, end - start)), dtype="<u8")
                unread += page * int((flags >> 63 == 0).sum())
    except OSError:
        return 0
    return unread


def predict(growth: Growth, worst: Sequence[int], *, by_layer: bool, device: str) -> Prediction:
    """worst: lengths of the documents of the pass that needs most."""
    return Prediction(
        resident_bytes(device) + growth.unread + growth.kernels,
        growth.kept(worst, by_layer=by_layer),
        growth.passing(worst),
        growth.learning,
        by_layer,
    )


def choose(
    growth: Growth, worst: Sequence[int], wanted: str, memory: int, device: str, *, sides: int = 1
) -> Prediction:
    """The prediction, with layers computed twice if that was asked for or is needed. memory: bytes that may be used in
    all; 0: what is free now. sides: documents that stay together, as the two of a pair. Raises DoesNotFit with the
    setting that would fit."""
    allowed = memory or _allowed(device)
    fast = predict(growth, worst, by_layer=False, device=device)
    small = predict(growth, worst, by_layer=True, device=device)
    if wanted == "on" or (wanted == "auto" and allowed is not None and fast.peak > allowed):
        chosen = small
    else:
        chosen = fast
    if allowed is None or chosen.peak <= allowed:
        return chosen
    raise DoesNotFit(
        tr(
            "learning needs {needed}, and {allowed} may be used: the longest pass has {tokens:,} tokens",
            needed=human_bytes(chosen.peak),
            allowed=human_bytes(allowed),
            tokens=sum(worst),
        ),
        hint=_way_out(growth, worst, small, wanted, allowed, device, sides),
        code="tune.memory",
    )


def _way_out(
    growth: Growth, worst: Sequence[int], small: Prediction, wanted: str, allowed: int, device: str, sides: int
) -> str:
    if wanted == "off" and small.peak <= allowed:
        return tr("with --checkpointing on it needs {needed}", needed=human_bytes(small.peak))
    by_layer = wanted != "off"
    longest = sides * max(worst)
    for tokens in (sum(worst) * share // 16 for share in range(15, 0, -1)):
        part = [longest] * (tokens // longest) + [tokens % longest]
        if tokens and predict(growth, part, by_layer=by_layer, device=device).peak <= allowed:
            if tokens >= longest:
                return tr("--row-tokens {tokens} would fit", tokens=tokens)
            most = tokens // sides
            return tr("--row-tokens {tokens} and --max-length {most} would fit", tokens=tokens, most=most)
    return tr("no length would fit: take a smaller model, or a quantised one (--quant 4)")


def _allowed(device: str) -> int | None:
    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_allocated()
    free_here = available_memory()
    return None if free_here is None else free_here + resident_bytes(device)


def timed(found: Prediction, tokens_per_second: float, seconds: float) -> Prediction:
    return replace(found, tokens_per_second=tokens_per_second, seconds=seconds)


def peak_bytes(device: str) -> int:
    """The most that this process has held so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return peak_memory()
