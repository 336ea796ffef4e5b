"""Which files of a repository are needed: weights in one format, tokenizer, configs. Never code, unless asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.hub.catalogue import KnownFile

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[a-z]+)")
# In order of preference: safetensors cannot carry code, GGUF neither; `.bin` is read by the restricted reader.
_FORMATS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("safetensors", re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")),
    ("bin", re.compile(r"(pytorch|adapter)_model(-\d{5}-of-\d{5})?\.bin(\.index\.json)?")),
    ("gguf", re.compile(r".+\.gguf")),
)
_TOKENIZERS = re.compile(
    r".*\.(model|tiktoken)|merges\.txt|vocab\.txt|chinese_vocab\.vocab|chat_template\.(jinja|json)|.*\.jinja"
)
_LICENCES = re.compile(r"(model_)?licen[cs]e.*|notice.*|copying.*", re.IGNORECASE)
# Records of a training run and of other runtimes: JSON, but nothing that a model needs.
_NOT_CONFIG = re.compile(
    r"trainer_state\.json|training_args\.json|all_results\.json|(train|eval)_results\.json|.*\.index\.json"
)
# One GGUF of a repository that holds twenty: what the engine keeps quantised comes first.
_GGUF_ORDER = ("q4_0", "q4_1", "q8_0", "q4_k_m", "q5_k_m", "q4_k_s", "q6_k", "f16", "bf16", "f32")


def needed(
    files: Sequence[KnownFile],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    everything: bool = False,
) -> list[KnownFile]:
    """The files to fetch, in the order of the listing.

    include:    shell patterns; given, they alone decide (`*.py` is how code is asked for).
    exclude:    shell patterns taken away from what was chosen.
    everything: all files of the revision.

    Raises Usage if the patterns leave nothing, Damaged if the listing lacks a shard of its own weights.
    """
    if include:
        chosen = [f for f in files if any(fnmatchcase(f.path, p) for p in include)]
    elif everything:
        chosen = list(files)
    else:
        weights = {f.path for f in _weights(files)}
        chosen = [f for f in files if f.path in weights or _is_small_need(f.path)]
    chosen = [f for f in chosen if not any(fnmatchcase(f.path, p) for p in exclude)]
    if not chosen:
        raise Usage(
            tr("no files of this repository are selected"),
            hint=tr("it contains {names}", names=", ".join(f.path for f in files[:8]) or "nothing"),
            code="pull.nothing_chosen",
        )
    return chosen


def is_weights(path: str) -> bool:
    """True for a file that holds tensors in a format glmchat reads."""
    return any(p.fullmatch(path) for _, p in _FORMATS) and not path.endswith(".json")


def missing_shards(paths: Sequence[str]) -> list[str]:
    """Names of shards that the other shards' own names promise but the list lacks."""
    present = set(paths)
    missing: set[str] = set()
    for path in paths:
        if match := _SHARD.fullmatch(path):
            count = int(match["count"])
            if count <= 10_000:
                names = (f"{match['stem']}-{i:05d}-of-{match['count']}{match['suffix']}" for i in range(1, count + 1))
                missing.update(name for name in names if name not in present)
    return sorted(missing)


def _is_small_need(path: str) -> bool:
    if "/" in path:
        return False
    if path.endswith(".json"):
        return not _NOT_CONFIG.fullmatch(path)
    return bool(_TOKENIZERS.fullmatch(path) or _LICENCES.fullmatch(path)) and not path.endswith(".py")


def _weights(files: Sequence[KnownFile]) -> list[KnownFile]:
    for kind, pattern in _FORMATS:
        weights = [f for f in files if pattern.fullmatch(f.path) and (kind == "gguf" or "/" not in f.path)]
        if not any(is_weights(f.path) for f in weights):
            continue
        if kind == "gguf":
            weights = _one_gguf(weights)
        if missing := missing_shards([f.path for f in weights]):
            raise Damaged(
                tr(
                    "the repository lacks {count} of its weight files, for example {name}",
                    count=len(missing),
                    name=missing[0],
                ),
                hint=tr("name another revision, or choose files with --include"),
                code="pull.shards_missing",
            )
        return weights
    return []


def _one_gguf(files: list[KnownFile]) -> list[KnownFile]:
    """One quantisation of many, with all its parts; projector files of vision models are left out."""
    groups: dict[str, list[KnownFile]] = {}
    for file in files:
        if "mmproj" not in file.path.lower():
            part = _SHARD.fullmatch(file.path)
            groups.setdefault(part["stem"] if part else file.path, []).append(file)

    def rank(name: str) -> tuple[int, str]:
        lower = name.lower()
        return next((i for i, word in enumerate(_GGUF_ORDER) if word in lower), len(_GGUF_ORDER)), name

    return groups[min(groups, key=rank)] if groups else files
