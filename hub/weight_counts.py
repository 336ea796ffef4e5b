"""How many weights a network has by its config.json, and how many bytes they take as they are and quantised.

The one place that knows: `show`, `show --fit` and the refusal before a load count here, without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LLAMA_TYPES = ("llama", "mistral", "qwen2", "qwen3", "smollm")  # as engine/models/llama.py reads them
_GROUPS = (128, 64, 32)  # inputs that share a scale at 4 bits: the largest that divides (engine/quantize/replace.py)
_USUAL_INPUTS = 4096  # of a matrix of which only the number of weights is known


@dataclass(frozen=True, slots=True)
class Matrix:
    """`times` matrices [outputs, inputs]."""

    outputs: int
    inputs: int
    times: int = 1

    @property
    def weights(self) -> int:
        return self.outputs * self.inputs * self.times

    def packed_bytes(self, bits: int) -> int:
        """In memory: codes and float16 scales, at 4 bits with a float16 minimum for each scale.

        One scale a group at 4 bits, one a row at 8. Inputs that no group divides stay at 8 bits.
        """
        group = next((size for size in _GROUPS if self.inputs % size == 0), None)
        if bits == 4 and group is not None:
            return self.weights // 2 + self.weights // group * 4
        return self.weights + self.outputs * self.times * 2


@dataclass(frozen=True, slots=True)
class WeightCounts:
    """layers: the matrices that quantising packs. ends: embedding and head, one matrix where they are tied. others:
    weights of biases, norms, position tables and P-Tuning prefixes, never packed.
    """

    layers: tuple[Matrix, ...]
    ends: tuple[Matrix, ...]
    others: int = 0
    family: str = ""  # the config's model_type

    @property
    def parameters(self) -> int:
        return sum(matrix.weights for matrix in (*self.layers, *self.ends)) + self.others

    def bytes_in_memory(self, bits: int | None, width: int = 2) -> int:
        """bits: 4, 8, or None for unpacked. width: bytes of a weight that is not packed, the activations' own."""
        if bits is None:
            return self.parameters * width
        # Other programs read Llama folders too, and want one width: at 4 bits embedding and head stay as they are.
        pack_ends = bits == 8 or self.family not in LLAMA_TYPES
        ends = sum(matrix.packed_bytes(8) if pack_ends else matrix.weights * width for matrix in self.ends)
        return sum(matrix.packed_bytes(bits) for matrix in self.layers) + ends + self.others * width


def guess_weights(parameters: int, config: Mapping[str, Any]) -> WeightCounts:
    """For a network that is not known: embedding and head as its config names them, all else in one usual matrix."""
    hidden, vocabulary = number(config, "hidden_size", "n_embd"), number(config, "padded_vocab_size", "vocab_size")
    ends = (vocabulary or 0) * (hidden or 0)
    first_generation = config.get("model_type") == "chatglm" and not config.get("multi_query_attention")
    tied = config.get("tie_word_embeddings", first_generation or config.get("model_type") == "gpt2")
    times = min(1 if tied else 2, parameters // ends) if ends else 0
    rest = parameters - ends * times
    layers = Matrix(rest // _USUAL_INPUTS, _USUAL_INPUTS)
    return WeightCounts(
        (layers,),
        (Matrix(vocabulary or 0, hidden or 0, times),),
        rest - layers.weights,
        str(config.get("model_type") or ""),
    )


def stored_width(config: Mapping[str, Any]) -> int:
    """Bytes of a weight in the files of a checkpoint that is not quantised."""
    return 4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2


def count_weights(family: str, config: Mapping[str, Any]) -> WeightCounts | None:
    """family: as checkpoints/describe.py names it. None for a family that is not counted, or a config that says too little."""
    layers = number(config, "num_layers", "num_hidden_layers", "n_layer")
    hidden, heads = number(config, "hidden_size", "n_embd"), number(config, "num_attention_heads", "n_head")
    vocabulary = number(config, "padded_vocab_size", "vocab_size")
    if layers is None or hidden is None or heads is None or vocabulary is None:
        return None
    ends = Matrix(vocabulary, hidden)
    if family == "chatglm":
        inner = number(config, "inner_hidden_size") or 4 * hidden
        prefix = (number(config, "pre_seq_len") or 0) * layers * 2 * hidden
        return WeightCounts(_gpt_layers(layers, hidden, inner), (ends,), _gpt_vectors(layers, hidden, inner) + prefix)
    if family == "gpt2":
        inner = number(config, "n_inner", "intermediate_size") or 4 * hidden
        positions = (number(config, "n_positions", "n_ctx") or 1024) * hidden
        vectors = _gpt_vectors(layers, hidden, inner)
        return WeightCounts(_gpt_layers(layers, hidden, inner), (ends,), vectors + positions, family)
    if family in ("chatglm2", "chatglm3", "glm4"):
        return _chatglm2(config, layers, hidden, heads, vocabulary)
    return _llama(family, config, layers, hidden, heads, ends) if family in LLAMA_TYPES else None


def _gpt_layers(layers: int, hidden: int, inner: int) -> tuple[Matrix, ...]:
    return Matrix(4 * hidden + inner, hidden, layers), Matrix(hidden, inner, layers)


def _gpt_vectors(layers: int, hidden: int, inner: int) -> int:
    """Biases of fused query, key and value, of output and of both feed-forward matrices; three norms with biases."""
    return layers * (3 * hidden + hidden + inner + hidden + 4 * hidden) + 2 * hidden


def _chatglm2(config: Mapping[str, Any], layers: int, hidden: int, heads: int, vocabulary: int) -> WeightCounts | None:
    groups = number(config, "multi_query_group_num") or heads
    width, inner = number(config, "kv_channels") or 128, number(config, "ffn_hidden_size") or 13696
    fused = (heads + 2 * groups) * width
    prefix = (number(config, "pre_seq_len") or 0) * layers * 2 * groups * width
    matrices = (
        Matrix(fused + 2 * inner, hidden, layers),
        Matrix(hidden, heads * width, layers),
        Matrix(hidden, inner, layers),
    )
    return WeightCounts(matrices, (Matrix(vocabulary, hidden, 2),), layers * (fused + 2 * hidden) + hidden + prefix)


def _llama(
    family: str, config: Mapping[str, Any], layers: int, hidden: int, heads: int, ends: Matrix
) -> WeightCounts | None:
    inner = number(config, "intermediate_size")
    if inner is None:
        return None
    kv_heads, width = number(config, "num_key_value_heads") or heads, number(config, "head_dim") or hidden // heads
    queries, fused = heads * width, (heads + 2 * kv_heads) * width
    matrices = (
        Matrix(fused + 2 * inner, hidden, layers),
        Matrix(hidden, queries, layers),
        Matrix(hidden, inner, layers),
    )
    bias = bool(config.get("attention_bias", family == "qwen2"))
    vectors = 2 * hidden
    vectors += fused if bias else 0
    vectors += hidden if config.get("attention_output_bias", bias and family != "qwen2") else 0
    vectors += 2 * inner + hidden if config.get("mlp_bias") else 0
    vectors += 2 * width if family == "qwen3" else 0
    if not config.get("tie_word_embeddings", False):
        ends = Matrix(ends.outputs, ends.inputs, 2)
    return WeightCounts(matrices, (ends,), layers * vectors + hidden, family)


def number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of `names` that is a sensible whole number."""
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32:
            return value
    return None
