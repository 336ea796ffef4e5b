"""adapter_config.json, read leniently where it does not matter and strictly where it changes the numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmchat.checkpoints.config import integer, number
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

LARGEST_RANK = 1 << 14
GUIDE_ALPHA = 32.0  # what the ChatGLM guides train with; files that they save do not say it
# Variants whose numbers need more than A and B. Absent, null, false and {} are all "not used".
_NOT_READ = (
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "target_parameters",
    "monteclora_config", "kasa_config", "velora_config",
)  # fmt: skip
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What of a LoRA's configuration decides its numbers.

    rank None: as the tensors say. targets: names, or None where the tensors alone say which (a regular expression, a
    raw file). excluded: names, or one pattern for whole names. enable: the blocks of a fused projection that old
    MergedLinear layers trained. ties_ends: embedding and head were trained as one. tokens: layer -> the ids whose rows
    were trained; "" is the embedding.
    """

    rank: int | None = None
    alpha: float = GUIDE_ALPHA
    alpha_known: bool = False
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | None = None
    all_linear: bool = False
    excluded: tuple[str, ...] | str = ()
    layers: frozenset[int] | None = None
    saved: tuple[str, ...] = ()
    enable: tuple[bool, ...] | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    ties_ends: bool = False
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def leaves_out(self, module: str) -> bool:
        """Whether a layer is no target though its name is: it is excluded, or trained as a whole."""
        if isinstance(self.excluded, str):
            out = re.fullmatch(self.excluded, module) is not None
        else:
            out = any(module == name or module.endswith("." + name) for name in self.excluded)
        return out or any(f".{name}." in f".{module}." for name in self.saved)

    def tokens_of(self, module: str) -> tuple[int, ...]:
        """The ids whose rows of this layer were trained; a head that is the embedding has the embedding's."""
        named = (ids for key, ids in self.tokens.items() if key and f".{module}".endswith(f".{key}"))
        return next(named, next(iter(self.tokens.values())) if len(self.tokens) == 1 else ())

    def rank_of(self, module: str) -> int | None:
        return next((rank for key, rank in self.ranks.items() if _matches(key, module)), self.rank)

    def scale_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised scaling (Kalajdzievski 2023)."""
        alpha = next((alpha for key, alpha in self.alphas.items() if _matches(key, module)), self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)


def parse_lora(config: Mapping[str, Any], alpha: float | None = None) -> LoraSettings:
    """Settings from adapter_config.json ({} for a raw file). alpha: overrides what it says.

    Raises Damaged for a field that is absurd and Usage for a variant that changes the numbers in a way not read here.
    """
    refuse_variants(config)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise Usage(
            tr(
                "this adapter was initialised with {start}, which changes the base model too", start=one_line(start, 40)
            ),
            hint=tr("convert it to plain LoRA: PEFT's save_pretrained(path_initial_model_for_weight_conversion=…)"),
            code="adapter.variant",
        )
    targets, all_linear = _targets(config.get("target_modules"))
    excluded: Any = config.get("exclude_modules")
    if isinstance(excluded, str) and not is_simple(excluded):
        targets, all_linear, excluded = None, False, None  # what it leaves out is then not looked up
    known = alpha is not None or config.get("lora_alpha") is not None
    rank = integer(config, "r", high=LARGEST_RANK) if config else None
    given = alpha if alpha is not None else number(config, "lora_alpha", high=1e6, default=GUIDE_ALPHA)
    return LoraSettings(
        rank=rank,
        alpha=given,
        alpha_known=known,
        rslora=config.get("use_rslora") is True,
        dora=config.get("use_dora") is True,
        targets=targets,
        all_linear=all_linear,
        excluded=excluded if isinstance(excluded, str) else _names({"exclude_modules": excluded}, "exclude_modules"),
        layers=_layers(config.get("layers_to_transform")),
        saved=_names(config, "modules_to_save"),
        enable=_enable(config.get("enable_lora")),
        ranks={k: integer({k: v}, k, high=LARGEST_RANK) for k, v in _patterns(config, "rank_pattern").items()},
        alphas={k: number({k: v}, k, high=1e6) for k, v in _patterns(config, "alpha_pattern").items()},
        ties_ends=config.get("ensure_weight_tying") is True,
        tokens=_tokens(config.get("trainable_token_indices")),
    )


def refuse_variants(config: Mapping[str, Any]) -> None:
    """Raise Usage for a setting that changes the numbers in a way not read here."""
    for name in _NOT_READ:
        if config.get(name):
            raise Usage(
                tr("this adapter uses {name}, a LoRA variant that glmchat does not compute", name=name),
                hint=tr("merge it with PEFT and use the merged model"),
                code="adapter.variant",
            )


def _targets(value: Any) -> tuple[tuple[str, ...] | None, bool]:
    if value is None or (isinstance(value, str) and value != "all-linear"):
        return None, False  # a regular expression: the tensors say what it matched
    if isinstance(value, str):
        return None, True
    if not isinstance(value, list) or len(value) > 10_000 or not all(isinstance(v, str) and v for v in value):
        raise absurd("target_modules", value, "a list of names, a pattern, or all-linear")
    return tuple(value), False


def _names(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = config.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > 1000 or not all(isinstance(v, str) for v in value):
        raise absurd(name, value, "a list of names")
    return tuple(value)


def _layers(value: Any) -> frozenset[int] | None:
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1000 for v in values):
        raise absurd("layers_to_transform", value, "layer numbers")
    return frozenset(values)


def _enable(value: Any) -> tuple[bool, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not 1 <= len(value) <= 16 or not all(isinstance(v, bool) for v in value):
        raise absurd("enable_lora", value, "a list of true and false")
    return tuple(value)


def _tokens(value: Any) -> Mapping[str, tuple[int, ...]]:
    """As PEFT takes them: ids of the embedding, or layer -> ids."""
    named = value if isinstance(value, Mapping) else {"": value} if value else {}
    for ids in named.values():
        if (
            not isinstance(ids, list)
            or not all(isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1 << 24 for each in ids)
            or len(set(ids)) < len(ids)
        ):
            raise absurd("trainable_token_indices", ids, "different token ids")
    return {str(name): tuple(ids) for name, ids in named.items()}


def _patterns(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping) or len(value) > 10_000:
        raise absurd(name, value, "an object")
    for key in value:
        if not is_simple(key):
            raise absurd(name, key, "names, or patterns without nested repetition")
    return value


def is_simple(pattern: str) -> bool:
    """Patterns come from outside: nested repetition can take for ever, so a group may not be repeated."""
    if len(pattern) > 300 or re.search(r"\)[*+?{]|\(\?", pattern) or len(re.findall(r"[*+?{]", pattern)) > 3:
        return False
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def absurd(name: str, value: Any, wanted: str) -> Damaged:
    """A field of adapter_config.json that cannot be right."""
    return Damaged(
        tr("{name} is {value} in adapter_config.json", name=name, value=one_line(repr(value), 60)),
        hint=tr("expected: {wanted}; the file is damaged", wanted=wanted),
        code="adapter.config",
    )


TOKENS = "trainable_tokens_delta"  # trained rows, which replace those of `trainable_token_indices`
_KINDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", TOKENS)
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.", "pretrained_model.")
Shape = tuple[int, ...]


@dataclass(slots=True)
class Names:
    """Where the parts of one layer's change stand in the file."""

    tensors: dict[str, str] = field(default_factory=dict)  # "lora_A", "lora_B.bias", TOKENS, … -> tensor name
    replaced: dict[str, str] = field(default_factory=dict)  # "weight", "bias" -> tensor name
    transposed: bool = False  # a replaced weight is stored [in, out] (GPT-2's Conv1D)
    paired: int = (
        0  # heads whose rows stand as llama.cpp rotates them, two neighbours a pair; 0: as checkpoints have them
    )

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.tensors

    def add(self, kind: str, name: str) -> None:
        table = self.tensors if kind.partition(".")[0] in _KINDS else self.replaced
        if kind not in table or "modules_to_save" not in name:  # PEFT saves a trained layer of a new size twice
            table[kind] = name


def incomplete_adapter(sentence: str, hint: str) -> Damaged:
    """The error for an adapter of which a part is missing, or of which two parts do not belong together."""
    return Damaged(sentence, hint=hint, code="adapter.incomplete")


def other_vocabulary(theirs: int, ours: int) -> tuple[str, str]:
    """Why an adapter with an embedding or a head of another height does not fit, and the way out."""
    return (
        tr("it was trained with {theirs} words, but this model has {ours}", theirs=theirs, ours=ours),
        tr("resize the base to {theirs} words, merge the adapter into it with PEFT, and use the result", theirs=theirs),
    )


def words_of_two(words: Mapping[str, int]) -> Usage:
    """The error for adapters of which one has words of its own while another changes words, too. words: of each."""
    return Usage(
        tr(
            "these adapters change words and cannot be active at once: {names}",
            names=one_line(", ".join(f"{name} ({number})" for name, number in words.items()), 200),
        ),
        hint=tr("one of them brings words of its own: use one at a time"),
        code="adapter.words",
    )


def formats_of_two(names: Sequence[str]) -> Usage:
    """The error for adapters that were trained with different chat templates or words."""
    return Usage(
        tr(
            "these adapters bring different chat templates or tokenizers, so they cannot be active at once: {names}",
            names=one_line(", ".join(names), 200),
        ),
        hint=tr("use one at a time"),
        code="adapter.formats",
    )


def weighted_words(name: str) -> Usage:
    """The error for an adapter with words of its own that is not to be used in full."""
    return Usage(
        tr("{name} brings words of its own, so its weight can only be 1", name=one_line(name, 80)),
        hint=tr("leave out the weight; it is 1 by default"),
        code="adapter.words",
    )


def split_name(name: str) -> tuple[str, str | None]:
    """Tensor name -> (layer as its model calls it, kind): "lora_A", "lora_B.bias", "weight", "bias" or "original".

    original: the base's own tensor, which PEFT saves beside a trained one when the vocabulary has grown.
    """
    for wrapper in _WRAPPERS:
        name = name.rpartition(wrapper)[2] if wrapper == "base_model.model." else name.removeprefix(wrapper)
    parts = [p for p in name.split(".") if p not in ("base_layer", "token_adapter")]
    for index, part in enumerate(parts):
        if part in _KINDS:
            tail = parts[index + 1 :]
            if len(tail) > 2:
                return name, None
            return ".".join(parts[:index]), f"{part}.bias" if tail and tail[-1] == "bias" else part
    if "original_module" in parts:
        return ".".join(parts[: parts.index("original_module")]), "original"
    if "modules_to_save" in parts:
        index = parts.index("modules_to_save")
        named = index + 2 < len(parts) and parts[index + 1] == "default"  # older PEFT kept the adapter's name
        parts = parts[:index] + parts[index + 1 + named :]
    if parts[-1] not in ("weight", "bias"):
        return name, None
    return ".".join(parts[:-1]), parts[-1]


def check_lora(shapes: Mapping[str, Shape], settings: LoraSettings) -> None:
    """Raise Damaged for half a pair, factors that do not multiply, or a rank that the configuration denies."""
    layers: dict[str, Names] = {}
    for name in shapes:
        layer, kind = split_name(name)
        if kind not in (None, "original"):
            layers.setdefault(layer, Names()).add(kind, name)
    for layer, names in layers.items():
        for one, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if one in names.tensors and other in names.tensors:
                changed_shape(layer, shapes[names.tensors[one]], shapes[names.tensors[other]], settings)
            elif one in names.tensors or other in names.tensors:
                there, lacking = (one, other) if one in names.tensors else (other, one)
                raise incomplete_adapter(
                    tr(
                        "the adapter has {there} of {layer} but lacks its {lacking}",
                        there=there,
                        layer=one_line(layer, 120),
                        lacking=lacking,
                    ),
                    tr("the file is incomplete: fetch it again"),
                )


def changed_shape(layer: str, a: Shape, b: Shape, settings: LoraSettings) -> tuple[int, int]:
    """[out, in] of the matrix that these two factors change. Raises Damaged if no matrix is changed like this."""
    groups, blocks = (sum(settings.enable), len(settings.enable)) if settings.enable is not None else (1, 1)
    flat = b[:2] if settings.enable is not None and len(b) == 3 and b[2] == 1 else b  # of a convolution of width 1
    if len(a) != 2 or len(flat) != 2 or not groups or a[0] != flat[1] * groups or flat[0] % groups:
        raise Damaged(
            tr("A {a} and B {b} of {layer} cannot be multiplied", a=list(a), b=list(b), layer=one_line(layer, 120)),
            hint=tr("their ranks differ: the file is damaged, or comes from two training runs"),
            code="adapter.rank",
        )
    rank, out, width = flat[1], flat[0] // groups * blocks, a[1]
    declared = settings.rank_of(layer)
    if declared is not None and declared != rank:
        raise Damaged(
            tr(
                "adapter_config.json gives rank {declared}, but {layer} has {rank}",
                declared=declared,
                layer=one_line(layer, 120),
                rank=rank,
            ),
            hint=tr("the configuration and the weights come from two different training runs"),
            code="adapter.rank",
        )
    if not 0 < rank <= LARGEST_RANK:  # more than a side of the matrix is no use, but it is well defined
        raise Damaged(
            tr(
                "a rank of {rank} for {layer} of [{out}, {width}]",
                rank=rank,
                layer=one_line(layer, 120),
                out=out,
                width=width,
            ),
            hint=tr("no LoRA looks like this: the file is damaged"),
            code="adapter.rank",
        )
    return out, width
