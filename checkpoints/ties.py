"""Whether a model's head is its embedding, by the tensors: config.json goes on saying so after a training that parted
them, and transformers then believes the tensors.

Both stored and different: the head is one of its own. One alone, or two that are equal byte for byte: they are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from glmchat.checkpoints.safetensors_file import read_safetensors
from glmchat.checkpoints.weight_choice import WeightSet
from glmchat.core.errors import Damaged
from glmchat.core.files import open_file
from glmchat.core.json_files import small_json

HEAD = "lm_head.weight"
EMBEDDINGS = ("model.embed_tokens.weight", "embed_tokens.weight", "transformer.wte.weight", "wte.weight")
_PACKED = ("lm_head.weight_packed", "lm_head.qweight")
_TIED_BY_DEFAULT = ("gpt2",)
_PIECE = 4 * 2**20  # bytes compared at a time
Place = tuple[Path, str, tuple[int, ...], int, int]  # file, dtype, shape, first byte, byte behind the last


def says_tied(config: Mapping[str, Any]) -> bool:
    """What config.json says; a few kinds are tied where it says nothing."""
    return bool(config.get("tie_word_embeddings", config.get("model_type") in _TIED_BY_DEFAULT))


def with_own_head(folder: Path, config: Mapping[str, Any], chosen: WeightSet) -> dict[str, Any]:
    """A config that says that they are one, as the tensors of the chosen files have it. Never raises.

    Weights that are still to come (`pull --quant`) count as different where the index names both. The tensors of a .bin
    file are compared by the engine (`engine/formats/weights.py`): reading them needs torch.
    """
    if chosen.missing:
        table = small_json(folder / chosen.index).get("weight_map") if chosen.index else None
        names = table if isinstance(table, Mapping) else {}
        own = HEAD in names and any(name in names for name in EMBEDDINGS)
    else:
        paths = (folder / name for name in chosen.files)
        own = _has_own_head(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))
    return {**config, "tie_word_embeddings": False} if own else dict(config)


@lru_cache(maxsize=32)
def _has_own_head(files: tuple[tuple[Path, int, int], ...]) -> bool:
    places: dict[str, Place] = {}
    for path, _, _ in files:
        places |= _places(path)
    head, embedding = places.get(HEAD), next((places[name] for name in EMBEDDINGS if name in places), None)
    if head is None or embedding is None:
        return any(name in places for name in _PACKED)
    return not _equal(head, embedding)


def _places(path: Path) -> dict[str, Place]:
    """Where the ends of a network lie in a safetensors file; {} for one that cannot be read."""
    try:
        tensors = read_safetensors(path)
    except (Damaged, OSError):
        return {}
    ends = ((name, tensors.get(name)) for name in (HEAD, *EMBEDDINGS, *_PACKED))
    return {name: (path, end.dtype, end.shape, end.start, end.end) for name, end in ends if end is not None}


def _equal(one: Place, other: Place) -> bool:
    """Two tensors of one type and shape, compared piece by piece up to the first difference."""
    if one[1:3] != other[1:3] or one[4] - one[3] != other[4] - other[3]:
        return False
    try:
        with open_file(one[0]) as first, open_file(other[0]) as second:
            first.seek(one[3])
            second.seek(other[3])
            left = one[4] - one[3]
            while left > 0:
                size = min(left, _PIECE)
                if first.read(size) != second.read(size):
                    return False
                left -= size
    except OSError:
        return False
    return True
