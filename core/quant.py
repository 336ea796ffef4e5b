"""How many bits a weight is to have, as people write it: `--quant 4`, `--bits q8`, `NAME:int4`."""

from __future__ import annotations

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

_WORDS = {f"{prefix}{bits}": bits for bits in (4, 8) for prefix in ("", "int", "q")}


def quant_bits(word: str) -> int | None:
    """4 or 8 for "4", "int4", "q4" and their like in any case; None for every other word."""
    return _WORDS.get(word.lower())


def parse_quant(text: str | None, flag: str = "--quant") -> int | None:
    """The value of `flag`: 4 or 8, or None where it was not given. Raises Usage."""
    if text is None:
        return None
    bits = quant_bits(text)
    if bits is None:
        raise Usage(
            tr("{flag} cannot be {value}", flag=flag, value=repr(one_line(text))),
            hint=tr("4 or 8"),
            code="usage.value",
        )
    return bits
