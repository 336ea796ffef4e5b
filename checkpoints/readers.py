"""Which other programs read a quantised folder as it is written, and why one does not.

Seen with transformers 5.23 and compressed-tensors 0.20: with `"dequantize": true` every matrix is unpacked by the first
scheme of the folder, without it zero points and packed embeddings are not read. vLLM packs linear layers alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.recipe import ONLY_OURS
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line

Scheme = tuple[int, int, bool]  # bits, group (0: one scale a row), symmetric
_NOT_TRANSFORMERS = ("layout", "joined", "minima", "schemes")


@dataclass(frozen=True, slots=True)
class Readers:
    """reasons: words of `_words`, why not everybody reads it; kinds: how its matrices are packed, "int4-g32, int8"."""

    reasons: tuple[str, ...] = ()
    family: str = ""
    kinds: str = ""

    def to_json(self) -> dict[str, Any]:
        """For glmchat.json and `--json`. note: the sentence, for who reads the file."""
        programs = ["glmchat"]
        if not set(self.reasons) & set(_NOT_TRANSFORMERS):
            programs += ["transformers"] if self.reasons else ["transformers", "vLLM"]
        return {**asdict(self), "reasons": list(self.reasons), "programs": programs, "note": self.words()}

    def words(self) -> str | None:
        """What a person is told before the folder is written, and by `show` later; None where everybody reads it."""
        if not self.reasons:
            return None
        alone = [reason for reason in self.reasons if reason in _NOT_TRANSFORMERS]
        because = tr("; ").join(self._words(reason) for reason in alone or self.reasons)
        if alone:
            return tr("only glmchat reads this folder, because {reasons}", reasons=because)
        return tr("vLLM may not read this folder, because {reasons}; transformers does", reasons=because)

    def _words(self, reason: str) -> str:
        family = one_line(self.family, 40)
        if reason == "layout":
            return tr("other programs hold the matrices of a {family} model in another way", family=family)
        if reason == "joined":
            return tr("transformers makes some matrices of a {family} model out of several", family=family)
        if reason == "minima":
            return tr("the zero points of its matrices are no whole numbers")
        if reason == "ends":
            return tr("its embedding or its head is packed (`--embeddings 16` leaves both as they are)")
        return tr("its matrices are packed in several ways ({kinds})", kinds=one_line(self.kinds, 120))


def readers_of(
    family: str, schemes: Collection[Scheme], *, ends: bool, minima: bool, joined: bool = False
) -> tuple[Readers, bool]:
    """Who reads a folder that is to be written, and whether it says `"dequantize": true`.

    ends: embedding or head is packed. minima: zero points are no whole numbers. joined: transformers makes a tensor
    out of several of the file's.
    """
    several = len(set(schemes)) > 1
    by_module = several and not ends and all(symmetric for _, _, symmetric in schemes)
    reasons = {
        "layout": family in ONLY_OURS,
        "joined": joined,
        "minima": minima,
        "schemes": several and not by_module,
        "modules": by_module,
        "ends": ends,
    }
    kinds = ", ".join(_kind(*scheme) for scheme in sorted(set(schemes)))
    return Readers(tuple(name for name, holds in reasons.items() if holds), family, kinds), not by_module


def _kind(bits: int, group: int, symmetric: bool) -> str:
    return f"int{bits}" + (f"-g{group}" if group else "") + ("-sym" if symmetric and bits == 4 else "")


def usual_readers(family: str, bits: int) -> Readers:
    """Of a copy with the usual settings, made of weights that nobody quantised."""
    return Readers(("layout",) if family in ONLY_OURS else ("ends",) if bits == 8 else (), family)


def readers_at(folder: Path) -> Readers | None:
    """What glmchat.json tells of the folder that it stands in; None where it tells nothing."""
    said = small_json(folder / "glmchat.json").get("readers") if folder.is_dir() else None
    if not isinstance(said, Mapping) or not isinstance(said.get("reasons"), list):
        return None
    return Readers(tuple(map(str, said["reasons"])), str(said.get("family", "")), str(said.get("kinds", "")))
