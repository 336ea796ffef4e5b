"""What a run is told: the adapter's shape, how it learns, and how often it looks at itself. Plain numbers and words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

# What a run does where nobody says otherwise, where that is another thing than for LoRA (2e-4: between the LoRA guide's
# 1e-4, ptuning/README.md's 5e-4 and ChatGLM3's lora.yaml, 3e-4 and later 5e-5, which others found to change nothing).
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # ptuning/train.sh of ChatGLM2-6B and the scores in ChatGLM-6B's README; its train.sh has 1e-2, ChatGLM3's demo 3e-4
    "prefix": {"learning_rate": 2e-2},
    # as a prefix: it learns vectors before the text, too, and no script of these models names a rate of its own
    "prompt": {"learning_rate": 2e-2},
    # an order of magnitude below learning from answers, as is usual; no source names a figure for these models
    "dpo": {"learning_rate": 2e-5},
    # a tenth of a LoRA's (tinker-cookbook, pull request 81); ds_train_finetune.sh has 1e-4,
    # transformers 5e-5. A checkpoint is large.
    "full": {"learning_rate": 2e-5, "keep": 1},
    # CPM's train.py has 1.5e-4 behind 4,000 steps of warm-up, which `--like cpm` keeps
    "scratch": {"learning_rate": 1e-3, "keep": 1},
}
# A model no wider learns a LoRA with a larger step, measured here: in 60 steps the starter model learned none of four
# rows at 2e-4, all of them at 5e-4 (which ptuning/README.md has for ChatGLM-6B).
_NARROW, _NARROW_RATE = 1024, 5e-4
SCHEDULES = ("constant", "linear", "cosine")
ALL_LINEAR = "all-linear"
LOSSES = ("sigmoid", "ipo")
EPOCHS = 3  # where neither epochs nor steps are told


def targets_of(text: str) -> tuple[str, ...] | str:
    """Last names of layers with commas between them, or the one pattern that it is."""
    is_names = text != ALL_LINEAR and re.fullmatch(r"[\w.,-]+", text)
    return tuple(text.split(",")) if is_names else text


def targeted(targets: Sequence[str] | str, names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Those of the layers' names that are meant. known: last names, for the hint.

    Raises Usage where a target names none, and for a pattern that is none.
    """
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise Usage(
                tr("the pattern of the targets cannot be read: {error}", error=one_line(str(error), 120)),
                hint=tr("for example: {example}", example=r".*\.(q_proj|v_proj)"),
                code="tune.targets",
            ) from None
        found = [name for name in names if pattern.fullmatch(name)]
        missing = [] if found else [targets]
    else:
        ends = {name: [t for t in targets if name == t or name.endswith("." + t)] for name in names}
        found = [name for name in names if ends[name]]
        missing = [t for t in targets if not any(t in ended for ended in ends.values())]
    if missing:
        raise Usage(
            tr("no linear layer of this model is called {target}", target=one_line(missing[0], 80)),
            hint=tr("it has: {names}", names=", ".join(dict.fromkeys(known))),
            code="tune.targets",
        )
    return found


def usual(method: str, width: int) -> Mapping[str, Any]:
    """What of a run is not as `Settings()` has it where nobody says otherwise. width: the model's hidden size."""
    if method == "lora" and width <= _NARROW:
        return {"learning_rate": _NARROW_RATE}
    return _DEFAULTS.get(method, {})


@dataclass(frozen=True, slots=True)
class Settings:
    """See the fields; a `Settings()` is a run that most people want.

    method: of tuning/methods/__init__.py. rank, alpha, dropout, targets, rslora, dora: of the LoRA (tuning/lora.py).
    prefix_length, prefix_projection: of a prefix (tuning/methods/prefix.py); dropout is its, too.
    beta, loss: of preferences (tuning/methods/dpo.py).
    last_layers: so many learn, 0: all of the model; moments: "float32" or "bfloat16", of AdamW (tuning/optimiser.py).
    quant, dtype, device, threads: as the engine takes them; the base may be packed and stays so.
    learning_rate, schedule, warmup (steps, or a share of all steps below 1), betas, eps, weight_decay, clip (0: never):
    of AdamW. epochs, steps: whichever ends first, where both are told; 0: as many as the other gives, or EPOCHS.
    tokens_per_step: documents are gathered up to so many tokens and then make one step; rows_per_step, where it is not
    0, counts documents instead. row_tokens: so many tokens are in one pass, a longer document alone.
    checkpointing: compute layers twice instead of keeping what they were given; "auto": where memory asks for it.
    memory: bytes that may be used; 0: what the machine has free.
    save_every, evaluate_every, sample_every: steps; 0: only at the end. keep: checkpoints that stay.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] | str = "all-linear"
    rslora: bool = False
    dora: bool = False
    prefix_length: int = 128
    prefix_projection: bool = False
    beta: float = 0.1
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    last_layers: int = 0
    moments: Literal["float32", "bfloat16"] = "float32"
    quant: int | None = None
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    learning_rate: float = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    epochs: int = 0
    steps: int = 0
    tokens_per_step: int = 4096
    rows_per_step: int = 0
    row_tokens: int = 2048
    seed: int = 0
    shuffle: bool = True
    checkpointing: Literal["auto", "on", "off"] = "auto"
    memory: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    sample_every: int = 0
    sample_tokens: int = 128
    keep: int = 2
    extra: Mapping[str, Any] = field(default_factory=dict)  # what is written into the record of the run, and no more

    def __post_init__(self) -> None:
        """Raises Usage for numbers that make no run."""
        wrong = (
            ("rank", self.rank < 1),
            ("alpha", self.alpha <= 0),
            ("prefix_length", self.prefix_length < 1),
            ("dropout", not 0 <= self.dropout < 1),
            ("beta", not 0 < self.beta < 1e6),
            ("loss", self.loss not in LOSSES),
            ("learning_rate", not 0 < self.learning_rate < 100),
            ("schedule", self.schedule not in SCHEDULES),
            ("warmup", self.warmup < 0),
            ("epochs", not 0 <= self.epochs <= 100_000),
            ("tokens_per_step", self.tokens_per_step < 1),
            ("row_tokens", self.row_tokens < 1),
            ("keep", self.keep < 1),
            ("last_layers", self.last_layers < 0),
            ("moments", self.moments not in ("float32", "bfloat16")),
            ("steps", not 0 <= self.steps <= 10_000_000),
            ("rows_per_step", self.rows_per_step < 0),
        )
        for name, is_wrong in wrong:
            if is_wrong:
                raise Usage(
                    tr("{name} cannot be {value}", name=name, value=str(getattr(self, name))),
                    hint=tr("`glmchat tune --help` says what it may be"),
                    code="tune.setting",
                )

    @property
    def is_whole(self) -> bool:
        """Whether the base's own weights learn."""
        return self.method in ("full", "scratch")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Raises Usage for names that are none of these."""
        known = {each.name for each in fields(cls)}
        strange = sorted(set(data) - known)
        if strange:
            raise Usage(
                tr("a run has no setting {name}", name=strange[0]),
                hint=tr("it has: {names}", names=", ".join(sorted(known))),
                code="tune.setting",
            )
        given = dict(data)
        for name in ("betas", "targets"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        return cls(**given)
