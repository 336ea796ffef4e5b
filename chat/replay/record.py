"""Which recorded fact of an answer is not so any more."""

from __future__ import annotations

import base64
import binascii
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.fingerprints import FilePrint
from glmchat.core.language import tr

_PLAIN = (
    *("dtype", "cache_type", "device", "card", "capability", "driver", "cuda", "threads", "kernel", "context"),
    "family",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """what: "weights model.safetensors", "adapter poet", "template", "setting top_p", "threads", "version torch", …"""

    what: str
    then: Any
    now: Any

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "then": self.then, "now": self.now}

    def sentence(self) -> str:
        return tr("{what}: {then} then, {now} now", what=self.what, then=_shown(self.then), now=_shown(self.now))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """What of `then` (the record of a stretch) is otherwise in `now` (facts of an engine), as far as both know it."""
    changes = [*_weights(then.get("weights"), now.get("weights"))]
    changes += _table("adapter", then.get("adapter_hashes"), now.get("adapter_hashes"))
    if then.get("template") != now.get("template"):
        changes.append(Difference("template", then.get("template"), now.get("template")))
    changes += _table("file", then.get("settings"), now.get("settings"))
    changes += [
        Difference(name, then[name], now.get(name)) for name in _PLAIN if name in then and then[name] != now.get(name)
    ]
    return changes + _table("version", then.get("versions"), now.get("versions"))


def _weights(then: Any, now: Any) -> Iterator[Difference]:
    """A file whose bytes differ; or, where only samples of it are known, one that was written to since."""
    before, after = _prints(then), _prints(now)
    for name in [*before, *(n for n in after if n not in before)] if before else ():
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            yield Difference(f"weights {name}", old and old.digest, new and new.digest)
        elif old.size != new.size or old.digest != new.digest:
            yield Difference(f"weights {name}", old.digest, new.digest)
        elif not old.exact and old.modified != new.modified:
            yield Difference(f"weights {name} (written since; its samples are the same)", old.modified, new.modified)


def _prints(weights: Any) -> dict[str, FilePrint]:
    try:
        return {p.name: p for p in map(FilePrint.from_json, weights["files"])}
    except (TypeError, KeyError, ValueError):
        return {}


def _table(kind: str, then: Any, now: Any) -> list[Difference]:
    if not isinstance(then, Mapping) or not isinstance(now, Mapping):
        return []
    names = dict.fromkeys((*then, *now)) if kind != "adapter" else dict.fromkeys(then)
    return [Difference(f"{kind} {n}", then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)]


def _shown(value: Any) -> str:
    if value is None:
        return tr("nothing")
    text = str(value)
    kind, colon, rest = text.partition(":")
    return f"{kind}:{rest[:12]}…" if colon and len(rest) > 40 else text[:16] + "…" if len(text) == 64 else text


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
    *sorted(OWN), "seed", "adapters", "model", "revision", "quant", "family", "dtype", "device", "card", "capability",
    "driver", "cuda", "threads", "kernel", "products", "cache_type", "context", "cached_n",
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


def with_hashes(stretch: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The same, with the hashes that were not known when the stretch began and are now."""
    hashes = {name: facts[name] for name in _HASHES if stretch.get(name) is None and facts.get(name) is not None}
    return {**stretch, **hashes}


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
