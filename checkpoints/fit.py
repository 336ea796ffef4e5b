"""Whether a folder can be run here: refused before the engine starts, without torch, by its files or by the memory.

The engine would refuse it too, by the same functions, and also what only torch can tell (shapes, a pickle that holds
more than tensors).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from glmchat.checkpoints.architectures import refuse_no_generator, refuse_pipeline, refuse_settings
from glmchat.checkpoints.chat_template import check_template, template_of, unheard, variables_of
from glmchat.checkpoints.config import absurd, refuse_absurd, refuse_types, settle_generation
from glmchat.checkpoints.families import has_experts, is_native, is_quantisable, parse, spec_of
from glmchat.checkpoints.file_kinds import refuse_lone_weights, refuse_no_weights
from glmchat.checkpoints.gguf_file import PACKED, config_of, open_gguf
from glmchat.checkpoints.quantised import becomes_dense, described, is_read, packed_bits, refuse_unread
from glmchat.checkpoints.recipe import Recipe, is_ours_to_read, packed_bytes
from glmchat.checkpoints.safetensors_file import read_safetensors
from glmchat.checkpoints.spec import Layout, ModelSpec
from glmchat.checkpoints.tensor_fit import refuse_misfit, shapes_of
from glmchat.checkpoints.tokenizer_files import check_gguf_tokenizer, check_tokenizer
from glmchat.checkpoints.vocabularies import check_vocabulary
from glmchat.checkpoints.vocabulary_trial import try_vocabulary
from glmchat.checkpoints.weight_files import (
    folder_config,
    is_safetensors,
    refuse_adapter_folder,
    settle_head,
    weight_files,
    weight_paths,
)
from glmchat.core.errors import Damaged, DoesNotFit, GlmchatError, Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.machine import available_memory, has_bf16
from glmchat.core.text import human_bytes, one_line

_LEAST = 0.5  # bytes of a weight in the tightest format there is


@contextmanager
def _while_it_is_there(path: Path) -> Iterator[None]:
    """A folder that another program removes or moves while it is looked at is one line, as any other refusal."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(
            tr("{name} went away while it was looked at", name=one_line(path.name, 80)),
            hint=tr("another program moves or removes it: try again when that has finished"),
            code="weights.gone",
        ) from None


def check_folder(folder: Path) -> None:
    """Raise Damaged, Hostile or Usage for a folder or GGUF file that is no whole model, or a mixture of two."""
    with _while_it_is_there(folder):
        _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if not folder.exists():
        return  # who names a path looks whether it is there; the engine says so of one that has gone meanwhile
    if not folder.is_dir():
        refuse_no_weights(folder)
        refuse_lone_weights(folder)
        file = open_gguf(folder)
        config = config_of(file)
        refuse_absurd(config)
        file.check_tensors(parse(config))
        check_gguf_tokenizer(file)
        file.check_scales()
        try_vocabulary(folder)
        return
    refuse_pipeline(folder)
    config = folder_config(folder)
    refuse_absurd(config)
    refuse_types(config)
    refuse_adapter_folder(folder, config)
    natively = is_native(config)
    refuse_no_generator(config, natively)
    refuse_settings(config)
    refuse_unread(config)
    if natively or not isinstance(config.get("model_type"), str):
        parse(config)
    files = weight_files(folder)
    if not check_vocabulary(folder, config):
        check_tokenizer(folder, config, natively)
    _compare_sizes(config, files)
    refuse_misfit(config, *shapes_of(config, files))
    try_vocabulary(folder)


def check_weights(path: Path) -> None:
    """Raise Damaged or Hostile for weights that cannot be read, are not those of their configuration, or beside which
    another model's vocabulary lies, for work that takes no text: a folder without a vocabulary is fine."""
    with _while_it_is_there(path):
        _check_weights(path)


def _check_weights(path: Path) -> None:
    if not path.is_dir():
        file = open_gguf(path)
        file.check_tensors(parse(config_of(file)))
        return
    files, config = weight_files(path), folder_config(path)
    try:
        if not check_vocabulary(path, config):
            check_tokenizer(path, config, is_native(config))
    except Damaged as error:
        if error.code != "tokenizer.missing":
            raise
    refuse_misfit(config, *shapes_of(config, files))


def check_chat(folder: Path) -> None:
    """Raise Damaged for a model whose chat template cannot be read: it can only complete texts."""
    source = template_of(folder) if folder.exists() and not _has_own_format(folder) else None
    if source is not None:
        check_template(source)


def has_chat(folder: Path) -> bool:
    """Whether the model takes questions: by a format that its family has, or by a template that it brings."""
    return _has_own_format(folder) or template_of(folder) is not None


def refuse_unheard(folder: Path, variables: Iterable[str]) -> None:
    """Raise Usage for a variable that the chat format of a model never looks at; one that it has none is not asked."""
    names = frozenset(variables)
    known = variables_at(folder) if names else None
    if known is not None and names - known and has_chat(folder):
        raise unheard(names - known, known)


def variables_at(folder: Path) -> frozenset[str] | None:
    """The variables that the chat format of a folder or GGUF file reads; None where nobody can tell."""
    if not folder.exists():
        return None
    source = None if _has_own_format(folder) else template_of(folder)
    return frozenset() if source is None else variables_of(source)


def _has_own_format(folder: Path) -> bool:
    return config_at(folder).get("model_type") == "chatglm"


def _compare_sizes(config: Mapping[str, Any], files: Sequence[Path]) -> None:
    """A network that could not be in these files even at four bits is not the one they hold."""
    network = spec_of(config)
    if network is None:
        return
    # Families whose parameters are not counted have at least one square matrix in each layer.
    least = _LEAST * (network.parameters() or network.layers * network.hidden_size**2)
    held = sum(file.stat().st_size for file in files)
    if least > held:
        raise absurd(
            tr(
                "config.json describes {layers} layers of width {width}, at least {least}; the weights "
                "have only {held}",
                layers=network.layers,
                width=network.hidden_size,
                least=human_bytes(int(least)),
                held=human_bytes(held),
            ),
            tr("config.json is damaged or belongs to another model: fetch it again"),
        )


# Bytes: interpreter, torch, server, vocabulary and thread pools 200 MB, the pages of their libraries 105 MB, and what
# the allocator keeps of freed scratch, some 15 MB (torch 2.13, x86-64); then the process that renders chat templates,
# which the families with formats of their own do without.
RUNTIME = 320_000_000
HELPER = 20_000_000
_NO_TEMPLATE = ("chatglm", "gpt2")
SCRATCH_TOKENS = 512  # a prompt is read in pieces of at most this many rows
LONGEST_CONTEXT = 32_768  # tokens of what a model allows, unless more is asked for: the cache is reserved in one piece
_EASILY = 0.4  # of the free memory: what dense float32 weights may take before bfloat16 is chosen
_ROOMY = 0.7  # of the free memory: what packed weights and a full float32 cache may take before it is
_USUAL_INPUTS = 4096  # of a matrix of which only the number of weights is known
FIT_CONTEXTS = (2048, 8192, 32768)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that loading and answering take."""

    weights: int
    cache: int
    scratch: int
    runtime: int = RUNTIME + HELPER

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.scratch + self.runtime


@dataclass(frozen=True, slots=True)
class Fit:
    """One line of the table: these weights at this context on this device, and whether there is room there.

    fits None: nobody knows.
    """

    quant: str
    context: int
    memory: Memory
    free: int | None
    device: str = "cpu"

    @property
    def fits(self) -> bool | None:
        return None if self.free is None else self.memory.total <= self.free

    def to_json(self) -> dict[str, Any]:
        parts = {f"{name}_bytes": size for name, size in asdict(self.memory).items()}
        return {
            "device": self.device,
            "quant": self.quant,
            "context": self.context,
            **parts,
            "total_bytes": self.memory.total,
            "free_bytes": self.free,
            "fits": self.fits,
        }


def fit_table(folder: Path, contexts: Sequence[int] = FIT_CONTEXTS) -> list[Fit]:
    """Every way to load `folder` into the memory of this machine: see `ways`. Empty where the files say too little."""
    free = available_memory()
    return [
        Fit(label, context, memory, free)
        for quant, label, context in ways(folder, contexts)
        if (memory := estimate(folder, quant, context=context)) is not None
    ]


def ways(folder: Path, contexts: Sequence[int] = FIT_CONTEXTS) -> list[tuple[int | None, str, int]]:
    """(bits to quantise to, words for that, context): as it is and quantised, at several contexts and the model's own.

    Weights that are quantised already have one way.
    """
    config = config_at(folder)
    spec = spec_of(config)
    own = min(spec.context, LONGEST_CONTEXT) if spec is not None else LONGEST_CONTEXT
    lengths = sorted({min(length, own) for length in contexts} | {own})
    plain = str(config.get("torch_dtype") or config.get("dtype") or "as it is")
    bits = (None, *(() if _is_quantised(folder, config) else (8, 4)))
    return [(quant, f"int{quant}" if quant else plain, context) for quant in bits for context in lengths]


def memory_words(model: str, needed: int, free: int, smaller: Sequence[tuple[str, int]] = ()) -> DoesNotFit:
    """ "needs 13.4 GB, 8.0 GB free: try `--quant 4`, needs 4.1 GB".

    smaller: (flags, bytes) of other ways to load it; the first that fits is named.
    """
    fitting = next(((flags, size) for flags, size in smaller if size <= free), None)
    if fitting:
        hint = tr("try `{flags}`, needs {size}", flags=fitting[0], size=human_bytes(fitting[1]))
    else:
        hint = tr("close other programs, or use a smaller model")
    return DoesNotFit(
        tr(
            "{model} needs {needed}, but only {free} are free",
            model=model,
            needed=human_bytes(needed),
            free=human_bytes(free),
        ),
        hint=hint,
        code="memory.preflight",
    )


def estimate(
    folder: Path,
    quant: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    cache_type: str | None = None,
) -> Memory | None:
    """What loading `folder` (or a GGUF file) takes; None where its files say too little, or it cannot be quantised."""
    stored = stored_bytes(folder)
    if not stored:
        return None
    config = config_at(folder)
    spec = spec_of(config)
    if quant is not None and not is_quantisable(config):
        return None
    length = context or min(spec.context if spec is not None else LONGEST_CONTEXT, LONGEST_CONTEXT)
    counted = counted_spec(spec, config, stored)
    free, wide_cache = available_memory(), counted.cache_bytes(length, 4, cache_type)
    packed, wide = packed_weights(folder, config, stored, 4), counted.weight_bytes(width=4) or 0
    if packed is None and quant is not None:
        packed = counted.weight_bytes(Recipe(quant), 4)
    if dtype is not None:
        width = 4 if dtype == "float32" else 2
    elif packed is not None:
        width = 4 if packed_fits_in_float32(packed, wide_cache, free) else 2
    else:
        width = 4 if not has_bf16() and (folder.is_file() or fits_in_float32(wide, free)) else 2
    weights = packed_weights(folder, config, stored, width)
    if weights is None:
        weights = counted.weight_bytes(Recipe(quant) if quant is not None else None, width) or 0
    runtime = RUNTIME + (0 if config.get("model_type") in _NO_TEMPLATE else HELPER)
    cache, scratch = counted.cache_bytes(length, width, cache_type), _scratch(counted, length, width)
    if cache != counted.cache_bytes(length, width):  # one layer of it as its activations, and on the way there
        scratch += 2 * counted.cache_bytes(length, 4) // max(counted.layers, 1)
    return Memory(weights, cache, scratch, runtime)


def fits_in_float32(weights: int, free: int | None) -> bool:
    """The rule by which a CPU without bfloat16 instructions computes dense weights in float32, where it is faster.

    weights: bytes of them in float32.
    """
    return free is None or weights < _EASILY * free


def packed_fits_in_float32(weights: int, cache: int, free: int | None) -> bool:
    """The same for activations beside packed weights. cache: bytes of the whole context in float32."""
    return free is None or weights + cache <= _ROOMY * free


def smaller_hint(folder: Path, quant: int | None, context: int | None) -> str | None:
    """A next step for somebody whose engine ran out of memory: "try `--quant 4`, needs 4.1 GB"."""
    now = estimate(folder, quant, context=context)
    if now is None or quant == 4:
        return None
    smaller = estimate(folder, 4, context=context)
    if smaller is None or smaller.total > 0.8 * now.total:
        return None
    return tr("try `{flags}`, needs {size}", flags="--quant 4", size=human_bytes(smaller.total))


def refuse_cache_type(cache_type: str | None, config: Mapping[str, Any], device: str) -> None:
    """Raise Usage where keys and values have one type only: on a card, and where transformers keeps them."""
    if cache_type is None or (device == "cpu" and is_native(config)):
        return
    raise Usage(
        tr("a cache in {cache_type} is for models that glmchat computes itself, on a CPU", cache_type=cache_type),
        hint="--cache-type auto" if device == "cpu" else tr("--cache-type auto, or --device cpu"),
        code="cache_type.device" if device != "cpu" else "cache_type.family",
    )


def check(
    model: str,
    folder: Path,
    quant: int | None = None,
    dtype: str | None = None,
    context: int | None = None,
    cache_type: str | None = None,
) -> Memory | None:
    """For the CPU. Refuse before anything loads: Damaged, Hostile or Usage for what is no model, DoesNotFit
    with the numbers and the nearest thing that fits (exit 4)."""
    check_folder(folder)
    needed, free = estimate(folder, quant, dtype, context, cache_type), available_memory()
    if needed is None or free is None or needed.total <= free:
        return needed
    others = []
    for bits in (8, 4):
        other = estimate(folder, bits, dtype, context, cache_type) if quant is None or bits < quant else None
        if other is not None:
            others.append((f"--quant {bits}", other.total))
    if (short := estimate(folder, 4, dtype, 2048, cache_type)) is not None and not context:
        others.append(("--quant 4 --context 2048", short.total))
    narrow = estimate(folder, quant, dtype, context, "int8") if cache_type is None else None
    if narrow is not None and is_native(config_at(folder)):
        others.append(("--cache-type int8", narrow.total))
    raise memory_words(model, needed.total, free, others)


def stored_bytes(path: Path) -> int:
    """Bytes of the weight files of a folder, or of a GGUF file."""
    return sum(file.stat().st_size for file in weight_paths(path))


def config_at(path: Path) -> dict[str, Any]:
    """config.json of a folder, or a GGUF file's header in the same words; {} where neither can be read."""
    if path.is_file():
        try:
            return config_of(open_gguf(path))
        except (GlmchatError, OSError):
            return {}
    return settle_head(path, settle_generation(path, small_json(path / "config.json")))


def spec_at(path: Path) -> ModelSpec | None:
    """The measures of the network in a folder or GGUF file; None where its files say too little."""
    return spec_of(config_at(path))


def counted_spec(spec: ModelSpec | None, config: Mapping[str, Any], stored: int) -> ModelSpec:
    """A spec whose weights can be counted: of a network that is not known, from the bytes of its files.

    Then the embedding and the head are taken out, and the rest is one matrix of a usual width.
    """
    if spec is not None and spec.layout is not None:
        return spec
    return guess_spec(spec, config, stored // (4 if config.get("torch_dtype", config.get("dtype")) == "float32" else 2))


def guess_spec(spec: ModelSpec | None, config: Mapping[str, Any], parameters: int) -> ModelSpec:
    """As `counted_spec`, where the number of weights is known."""
    if spec is None:
        spec = ModelSpec(str(config.get("model_type") or ""), 0, 0, 0, 0, 0, 0, 0, LONGEST_CONTEXT)
    matrix, layers = (spec.vocab_size, spec.hidden_size), max(spec.layers, 1)
    count = min(1 if config.get("tie_word_embeddings") else 2, parameters // (prod(matrix) or parameters + 1))
    left = parameters - count * prod(matrix)
    rows = left // layers // _USUAL_INPUTS
    ends = {f"ends.{number}.weight": matrix for number in range(count)}
    rest = {**ends, "rest": (left - layers * rows * _USUAL_INPUTS,)}
    guess = Layout("layers", {"linear.weight": (rows, _USUAL_INPUTS)}, rest, tuple(ends))
    return replace(spec, layers=layers, layout=lambda _: guess)


def _is_quantised(folder: Path, config: Mapping[str, Any]) -> bool:
    if folder.is_file() or any(folder.glob("*.gguf")):
        return True
    return bool(described(config)) or bool(config.get("quantization_bit"))


def packed_weights(path: Path, config: Mapping[str, Any], stored: int, width: int) -> int | None:
    """Bytes in memory of weights that their file holds quantised; None where it holds none.

    width: bytes of an activation, in which everything else is kept.
    """
    if not path.is_file():
        if becomes_dense(config) or (is_read(config) and not is_native(config) and _is_unpacked(config)):
            spec = spec_of(config)
            known = spec.weight_bytes(width=width) if spec is not None else None
            return known if known is not None else stored * 8 * width // packed_bits(config)
        return stored + _widened(path, width) if _is_quantised(path, config) else None
    try:
        file = open_gguf(path)
    except (GlmchatError, OSError):
        return stored
    tensors = list(file.tensors.values())
    packed = [tensor for tensor in tensors if tensor.type_name in PACKED and len(tensor.shape) == 2]
    dense = width * (sum(prod(t.shape) for t in tensors) - sum(prod(t.shape) for t in packed))
    held = (packed_bytes(t.shape[0], t.shape[1], PACKED[t.type_name], 32) for t in packed)
    return dense + sum(held) if packed else None


def _is_unpacked(config: Mapping[str, Any]) -> bool:
    """Whether transformers takes matrices as numbers that others packed: experts, all in one, and those that lie the
    other way round in the file (its Conv1D)."""
    turned = config.get("model_type") in ("gpt2", "openai-gpt") and not is_ours_to_read(config)
    return bool(described(config)) and (has_experts(config) or turned)


def _widened(folder: Path, width: int) -> int:
    """Bytes that matrices and norms which a quantised folder leaves as they are take in memory beyond their file's."""
    more = 0
    for path in filter(is_safetensors, weight_paths(folder)):
        try:
            tensors = read_safetensors(path)
        except (GlmchatError, OSError):
            continue
        for name, tensor in tensors.items():
            if name.endswith((".weight", ".bias")) and tensor.dtype in ("F16", "BF16", "F32"):
                more += prod(tensor.shape) * width - (tensor.end - tensor.start)
    return more


def _scratch(spec: ModelSpec, context: int, width: int) -> int:
    """One piece of a prompt on its way through a layer: the attention's scores, or what the feed-forward part holds."""
    rows = min(SCRATCH_TOKENS, context)
    scores = rows * context * (spec.heads or 1) * 4
    feeding = rows * 2 * (spec.ffn_size or 4096) * width
    return max(scores, feeding) + (spec.vocab_size or 65_000) * 4 * 4
