"""How a model is quantised: which widths, groups and zero points its matrices get, and the bytes they then take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

GROUP_SIZES = (128, 64, 32)  # inputs that share a scale at 4 bits
_ROWS = 32  # packed rows come in blocks of this many, and a row in words of 8 codes (engine/native/cpu.py)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantised.

    bits: of the layers' matrices. group: inputs that share a scale at 4 bits; None takes the largest of 128, 64 and 32
    that divides a matrix's inputs. ends: bits of the embedding and the head; 0 leaves them as they are, None takes 8
    unless other programs could then not read the folder (`settled`). portable: zero points are whole numbers wherever
    that costs little, as other programs know no others; None decides by the family.
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

    def settled(self, family: str) -> Recipe:
        """With everything decided. transformers and vLLM read Llamas and GLM; only glmchat reads ChatGLM.

        transformers decodes a folder with one width for all its matrices, so a four-bit Llama keeps embedding and head
        in 16 bits.
        """
        shared = family in ("llama", "glm")
        ends = (0 if self.bits == 4 and shared else 8) if self.ends is None else self.ends
        return replace(self, ends=ends, portable=shared if self.portable is None else self.portable)

    def choose(self, name: str, inputs: int, is_end: bool) -> tuple[int, int]:
        """(bits, group) of one matrix; bits 0 leaves it, group 0 means one scale for each row.

        Raises Usage, with the sizes that divide, if an explicit group size does not.
        """
        bits = (8 if self.ends is None else self.ends) if is_end else self.bits
        if bits != 4:
            return bits, 0
        if self.group is None:
            found = group_size(inputs)
            return (4, found) if found else (8, 0)  # no group fits: eight bits lose less than padding would cost
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
        and weights.get("actorder") in (None, False, "weight", "static")  # these permute nothing that is stored
        and not group.get("input_activations")
    )
