"""The measures of a network as its checkpoint tells them, and what is counted from them: weights, shapes, bytes.

`show`, `show --fit`, the refusal before a load, the check of adapters and the loader's accounting ask here and nowhere
else, so they cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from glmchat.checkpoints.recipe import Recipe, packed_bytes
from glmchat.checkpoints.vocabularies import model_of_embedding
from glmchat.checkpoints.weight_files import PREFIX_ENCODER, refuse_names

Shape = tuple[int, ...]  # of a matrix: (outputs, inputs), also where the file holds it the other way round


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors of a network, by their checkpoint's names.

    stack: what the layers stand in, "model.layers": layer 3's tensors are "model.layers.3." and a name of `layer`.
    ends: the word embedding, and the head where it is a matrix of its own; both of `rest`.
    """

    stack: str
    layer: Mapping[str, Shape]
    rest: Mapping[str, Shape]
    ends: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The measures of a network, read from config.json or GGUF metadata and checked before memory is taken."""

    family: str  # "llama" | "chatglm" | "chatglm2" | "chatglm3" | "glm4" | "gpt2" | the transformers model_type
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context: int  # longest sequence, prompt and answer together
    causal: bool = True  # False: the prompt is read bidirectionally, a grown prompt is a fresh prefill
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    generation: str | None = None  # which of a family's vocabularies or revisions, in words for `glmchat show`
    extra: Mapping[str, Any] = field(default_factory=dict)  # what only this family's module needs (rope, epsilon, …)
    layout: Callable[[ModelSpec], Layout] | None = None  # None where transformers alone knows the tensors

    @property
    def prefix_length(self) -> int:
        """Positions of a P-Tuning prefix that is part of the checkpoint."""
        length: int = self.extra.get("prefix_length", 0)
        return length

    @property
    def prefix_width(self) -> int:
        """Numbers of one position of a prefix: keys and values of every layer."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def shapes(self) -> dict[str, Shape]:
        """Every tensor by its checkpoint's name; {} where they are not known."""
        if self.layout is None:
            return {}
        layout = self.layout(self)
        layers = {f"{layout.stack}.{n}.{name}": s for n in range(self.layers) for name, s in layout.layer.items()}
        return {**layers, **layout.rest}

    def linear_shapes(self) -> dict[str, list[Shape]]:
        """Last part of a linear layer's name -> its shapes; a name may stand for two of a layer (GPT-2's c_proj)."""
        shapes: dict[str, list[Shape]] = {}
        for name, shape in self.layout(self).layer.items() if self.layout is not None else ():
            if _is_matrix(name, shape):
                shapes.setdefault(name.split(".")[-2], []).append(shape)
        return shapes

    def matrices(self) -> dict[str, tuple[int, bool]]:
        """What quantising packs, by its checkpoint's name -> its inputs, and whether it is embedding or head.

        Position tables and P-Tuning encoders stay dense: they are small and used in full precision.
        """
        if self.layout is None:
            return {}
        layout = self.layout(self)
        layers = {f"{layout.stack}.{n}.{name}" for n in range(self.layers) for name in layout.layer}
        return {
            name: (shape[1], name in layout.ends)
            for name, shape in self.shapes().items()
            if name in layout.ends or (name in layers and _is_matrix(name, shape))
        }

    def ends(self) -> tuple[str, ...]:
        """The word embedding, and the head where it is a matrix of its own; () where they are not known."""
        return () if self.layout is None else self.layout(self).ends

    def parameters(self) -> int | None:
        """Weights of the network; None where its tensors are not known."""
        return sum(prod(shape) * times for _, shape, times in self._tensors()) or None

    def weight_bytes(self, recipe: Recipe | None = None, width: int = 2) -> int | None:
        """Bytes of the weights in memory, as they are or quantised; None where the tensors are not known.

        width: bytes of a weight that is not packed, the activations' own.
        """
        if self.layout is None:
            return None
        layout, total = self.layout(self), 0
        recipe = recipe and recipe.settled(self.family, [n for n, is_end in self.matrices().values() if not is_end])
        for name, shape, times in self._tensors():
            bits = group = 0
            if recipe is not None and (name in layout.ends or (name in layout.layer and _is_matrix(name, shape))):
                bits, group = recipe.choose(name, shape[1], name in layout.ends)
            dense = 4 if name.startswith(PREFIX_ENCODER) else width  # it stays in float32
            total += times * (packed_bytes(shape[0], shape[1], bits, group) if bits else prod(shape) * dense)
        return total

    def cache_bytes(self, tokens: int, width: int, cache_type: str | None = None) -> int:
        """Keys and values of every layer for so many tokens, and for a prefix of the checkpoint's own.

        width: bytes of an activation. cache_type: as `core.engine_options` names it; None: an activation's own.
        """
        width = {"float32": 4, "bfloat16": 2, "int8": 1}.get(cache_type or "", width)
        scales = 4 * self.prefix_width // max(self.head_dim, 1) if cache_type == "int8" else 0
        return (self.prefix_width * width + scales) * (tokens + self.prefix_length)

    def _tensors(self) -> Iterator[tuple[str, Shape, int]]:
        """Name, shape, and how often the network has it."""
        if self.layout is not None:
            layout = self.layout(self)
            yield from ((name, shape, self.layers) for name, shape in layout.layer.items())
            yield from ((name, shape, 1) for name, shape in layout.rest.items())


def match_tensors(
    stored: Mapping[str, Shape | None],
    spec: ModelSpec,
    family: str,
    rename: Callable[[str], str | None] = str,
    is_turned: Callable[[str, str], bool] = lambda parameter, name: False,
) -> dict[str, str]:
    """Parameter -> name, for every tensor that a checkpoint stores. Raises Damaged that names each that is in the way.

    stored: names and shapes, None for a packed matrix that does not tell its own. family: its name in what is said.
    rename: a stored name -> the parameter's, None for what is not read. is_turned: it is stored as [in, out].
    """
    shapes = spec.shapes()
    table: dict[str, str] = {}
    left_over: list[str] = []
    misshapen: dict[str, str] = {}
    other: str | None = None  # the published model that the embedding belongs to, if it is not this one
    renamed, ends = {name: rename(name) for name in stored}, spec.ends()
    ignored = spec.extra.get("ignored", ())
    if ignored and ends[0] not in renamed.values():  # a tied head that is stored alone is the embedding
        renamed = {name: ends[0] if parameter in ignored else parameter for name, parameter in renamed.items()}
    for name, shape in stored.items():
        parameter = renamed[name]
        if parameter is None or parameter in ignored:
            continue
        expected = shapes.get(parameter)
        if expected is None:
            left_over.append(name)
            continue
        if shape is not None and is_turned(parameter, name):
            shape = shape[::-1]
        if shape is not None and shape != expected:
            other = model_of_embedding(shape) if "word_embeddings" in name else other
            misshapen[parameter] = f"{name} is {list(shape)} instead of {list(expected)}"
        table[parameter] = name
    missing = [name for name in shapes if name not in table]
    in_order = [misshapen[name] for name in shapes if name in misshapen]  # files have any order
    refuse_names(family, missing, sorted(left_over), in_order, other)
    return table


def _is_matrix(name: str, shape: Shape) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def linear(name: str, outputs: int, inputs: int, bias: bool) -> dict[str, Shape]:
    """The tensors of a linear layer."""
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name: str, width: int, bias: bool) -> dict[str, Shape]:
    """The tensors of an RMSNorm, or with a bias of a LayerNorm."""
    return {f"{name}.weight": (width,), **({f"{name}.bias": (width,)} if bias else {})}


def prefix_encoder(name: str, length: int, width: int, embedding: int, inner: int | None) -> dict[str, Shape]:
    """The tensors of a P-Tuning v2 encoder; inner: width of its projection, None where it has none."""
    tensors: dict[str, Shape] = {f"{name}.embedding.weight": (length, embedding)} if length else {}
    if length and inner is not None:
        tensors |= linear(f"{name}.trans.0", inner, embedding, True) | linear(f"{name}.trans.2", width, inner, True)
    return tensors
