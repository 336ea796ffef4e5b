"""What is written down of an answer so that it can be replayed: one record for each stretch of it.

A stretch is one request: an answer that was stopped and continued has two. It holds the prompt's ids, the passes behind
them, seed and sampling, and what exactly computed.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr

# Facts of the server that only a record needs; the details of an answer do without them.
OWN = frozenset(
    {
        "passes",
        "sampling",
        "weights",
        "settings",
        "template",
        "versions",
        "adapter_hashes",
        "asked_dtype",
        "speculation",
    }
)
_FACTS = (
    *sorted(OWN), "seed", "adapters", "model", "revision", "quant", "family", "dtype", "device", "threads", "kernel",
    "context", "cached_n",
)  # fmt: skip
_HASHES = ("weights", "settings")
_MOST = 1 << 24  # ids; a record that claims more is damaged


def stretch(
    start: int, prompt_ids: Sequence[int], facts: Mapping[str, Any], launch: Mapping[str, Any] | None
) -> dict[str, Any]:
    """start: ids of the answer that stood before. facts: the server's `glmchat` object. launch: what was loaded."""
    return {
        "start": start,
        "prompt": pack(prompt_ids),
        "launch": dict(launch) if launch else None,
        **{name: facts[name] for name in _FACTS if name in facts},
    }


def add_hashes(stretch: dict[str, Any], facts: Mapping[str, Any]) -> bool:
    """Fill in the hashes that were not known when the stretch began; whether there were any."""
    news = {name: facts[name] for name in _HASHES if stretch.get(name) is None and facts.get(name) is not None}
    stretch.update(news)
    return bool(news)


def pack(ids: Sequence[int]) -> str:
    """Ids as text: a third of what JSON takes."""
    return base64.b85encode(zlib.compress(array("i", ids).tobytes())).decode("ascii")


def unpack(text: str) -> list[int]:
    """The inverse of `pack`. Raises Usage for a damaged record."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b85decode(text), 4 * _MOST)
        values = array("i")
        values.frombytes(data)
        return values.tolist()
    except (ValueError, zlib.error, binascii.Error):
        raise Usage(
            tr("the record of this answer is damaged"), hint=tr("it cannot be replayed"), code="replay.record"
        ) from None
