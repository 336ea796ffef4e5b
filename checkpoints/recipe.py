"""How a model is quantised: which widths, groups and zero points its matrices get, and the bytes they then take."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

GROUP_SIZES = (128, 64, 32)  # inputs that share a scale at 4 bits
# Families whose folders other programs do not read: they have no code for THUDM's own tensors, and GPT-2's layers hold
# their matrices the other way round.
ONLY_OURS = ("chatglm", "chatglm2", "chatglm3", "glm4", "gpt2", "openai-gpt")
_ROWS = 32  # packed rows come in blocks of this many, and a row in words of 8 codes (engine/native/cpu.py)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantised.

    bits: of the layers' matrices. group: inputs that share a scale at 4 bits; None takes the largest of 128, 64 and 32
    that divides them. ends: bits of the embedding and the head; 0 leaves them as they are, None takes 8 unless other
    programs could then not read the folder (`settled`). portable: all matrices are packed in one way, with whole zero
    points, as transformers knows no other; None decides by the family.
    """

    bits: int
    group: int | None = None
    ends: int | None = None
    symmetric: bool = False
    fast: bool = False
    portable: bool | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise Usage(f"{self.bits} bits", hint=tr("the supported widths are 4 and 8"), code="quant.bits")
        if self.ends not in (None, 0, 4, 8):
            raise Usage(
                tr("{ends} bits for embedding and head", ends=self.ends),
                hint=tr("4, 8, or 0 to leave them"),
                code="quant.bits",
            )
        if self.group is not None and self.group not in GROUP_SIZES:
            raise Usage(
                tr("a group size of {group}", group=self.group),
                hint=tr("128, 64 and 32 are the sizes that every kernel supports, or auto"),
                code="quant.group",
            )

    def settled(self, family: str, inputs: Collection[int] = ()) -> Recipe:
        """With everything decided.

        inputs: of the layers' matrices. transformers decodes a folder with one scheme for all of its matrices, so a
        portable one has one group size, leaves a matrix that it does not divide as it is, and at four bits embedding
        and head too.
        """
        sizes = [size for size in map(group_size, inputs) if size is not None]
        portable = family not in ONLY_OURS if self.portable is None else self.portable
        if inputs and self.bits == 4 and not sizes:
            portable = False  # nothing would be packed at all
        group = min(sizes, default=None) if portable and self.group is None else self.group
        ends = (0 if self.bits == 4 and portable else 8) if self.ends is None else self.ends
        return replace(self, group=group, ends=ends, portable=portable)

    def choose(self, name: str, inputs: int, is_end: bool) -> tuple[int, int]:
        """(bits, group) of one matrix; bits 0 leaves it, group 0 means one scale for each row.

        Raises Usage, with the sizes that divide, if an explicit group size does not.
        """
        bits = (8 if self.ends is None else self.ends) if is_end else self.bits
        if bits != 4:
            return bits, 0
        if group_size(inputs) is None and (self.portable or self.group is None):
            return (0, 0) if self.portable else (8, 0)  # eight bits lose less than padding would cost
        if self.group is None:
            return 4, group_size(inputs) or 0
        if inputs % self.group:
            fitting = ", ".join(str(size) for size in GROUP_SIZES if inputs % size == 0) or "none; use auto"
            raise Usage(
                tr(
                    "a group size of {group} does not divide the {inputs} inputs of {name}",
                    group=self.group,
                    inputs=inputs,
                    name=one_line(name),
                ),
                hint=tr("these sizes do: {fitting}", fitting=fitting),
                code="quant.group",
            )
        return 4, self.group


def group_size(inputs: int) -> int | None:
    """The largest of 128, 64 and 32 that divides `inputs`, or None."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)


def usual_bytes(parameters: int, bits: int) -> int:
    """What so many weights take when they are quantised, where their matrices are not known yet.

    Between ChatGLM, whose embedding and head go to 8 bits, and Llamas of as many, whose own stay in 16.
    """
    return int(parameters * (0.64 if bits == 4 else 1.08))


def packed_bytes(rows: int, inputs: int, bits: int, group: int) -> int:
    """What a packed matrix takes in memory: codes, float16 scales, at 4 bits a float16 minimum for each, and the unit.

    group: 0 for one scale a row.
    """
    padded, width = -(-rows // _ROWS) * _ROWS, -(-inputs // 8) * 8
    scales = padded * (width // group if group else 1)
    return padded * width * bits // 8 + scales * 2 * (2 if bits == 4 else 1) + 4


METHOD, FORMAT = "compressed-tensors", "pack-quantized"


def is_ours_to_read(config: Mapping[str, Any]) -> bool:
    """True for a config.json whose weights are in this layout, with weights of 4 or 8 bits and plain activations."""
    described = config.get("quantization_config")
    if not isinstance(described, Mapping) or described.get("quant_method") != METHOD:
        return False
    groups = described.get("config_groups")
    if described.get("format") != FORMAT or not isinstance(groups, Mapping) or not groups:
        return False
    return all(_readable(group) for group in groups.values())


def _readable(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    return (
        isinstance(weights, Mapping)
        and weights.get("type", "int") == "int"
        and weights.get("num_bits") in (4, 8)
        and weights.get("strategy") in ("group", "channel")
        # "group" (once "dynamic" and True) tells the group of each input in a tensor; the others store nothing of it.
        and weights.get("actorder") in (None, False, True, "weight", "static", "group", "dynamic")
        and not group.get("input_activations")
    )
