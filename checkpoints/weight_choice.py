"""Which files of a folder, or of a repository's listing, are a model's weights: decided from names and from the index.

The order is that of transformers (`modeling_utils._get_resolved_checkpoint_files`): the file that config.json names,
model.safetensors, its index, pytorch_model.bin, its index. An index is believed, not a pattern of names; it may call
its shards what it likes. Shards that came without their index are taken where their own names say that they are all
there. What pulls, lists, shows, adds and loads asks here, so that they cannot disagree.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmchat.core.errors import Damaged
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line

SINGLES = ("model.safetensors", "pytorch_model.bin")
INDEX = ".index.json"
_NUMBERED = re.compile(r"(?P<before>.*?)(?P<number>\d{1,9})(?P<rest>[-_]of[-_](?P<count>\d{1,9})\D*)")
# model-00001-of-000004.safetensors, model-1-of-2.safetensors, model.safetensors-00001-of-00002; no fp16 variant
_SHARD = re.compile(r"(pytorch_)?model(\.safetensors|\.bin)?[-_.]?\d+[-_]of[-_]\d+(\.safetensors|\.bin)?")
_VARIANT = re.compile(r"(pytorch_)?model\.(?!safetensors|bin)(?P<variant>\w+)(-.*)?\.(safetensors|bin)")
_MOST_SHARDS = 10_000  # a count beyond this is no count
_FOREIGN = (".h5", ".msgpack", ".onnx", ".pth", ".pt", ".ckpt", ".npz", ".nemo", ".mlmodel", ".tflite", ".ot")
_NAMES_SHOWN = 6


@dataclass(frozen=True, slots=True)
class WeightSet:
    """The files that hold a model's weights, in the order in which they are read."""

    files: tuple[str, ...]
    index: str | None = None  # the file that names them
    missing: tuple[str, ...] = ()  # of `files`, those that are not there


def choose_weights(
    names: Iterable[str],
    read_index: Callable[[str], Sequence[str] | None],
    named: object = None,
) -> WeightSet | None:
    """The weights among `names`, or None if there are none that glmchat reads (GGUF files are no part of this).

    names: files of one folder; what lies in a sub-folder is never taken. read_index: the files that an index names, or
    None where its content is not known: then the names of the shards must do. named: `transformers_weights` of
    config.json. Raises what `read_index` raises, and Damaged where several sets of shards are whole and no index
    chooses.
    """
    here = {name for name in names if "/" not in name}
    if isinstance(named, str) and named:
        if named.endswith(INDEX) and named in here:
            return _of_index(named, here, read_index)
        return WeightSet((named,), None, () if named in here else (named,))
    for single in SINGLES:
        if single in here:
            return WeightSet((single,))
        if single + INDEX in here:
            return _of_index(single + INDEX, here, read_index)
    return next((found for kind in SINGLES if (found := _by_names(here, kind)) is not None), None)


def _of_index(index: str, here: Collection[str], read_index: Callable[[str], Sequence[str] | None]) -> WeightSet:
    files = read_index(index)
    if files is not None:
        return WeightSet(tuple(files), index, tuple(name for name in files if name not in here))
    kind = index.removesuffix(INDEX)
    counted = _by_names(here, kind)
    if counted is not None:
        return WeightSet(counted.files, index, counted.missing)
    suffix = f".{kind.rpartition('.')[2]}"
    return WeightSet(tuple(sorted(name for name in here if suffix in name and _is_tensors(name))), index)


def _by_names(here: Collection[str], kind: str) -> WeightSet | None:
    """Shards of one kind whose names tell how many there are; a whole set before one with gaps."""
    sets = _numbered_sets(name for name in sorted(here) if _is_kind(name, kind))
    if not sets:
        return None
    whole = [one for one in sets if not one.missing]
    if len(whole) > 1:
        raise Damaged(
            tr(
                "there are several sets of weights and no index that chooses: {names}",
                names=listed([one.files[0] for one in whole]),
            ),
            hint=tr("fetch {index} from the repository, or keep one of the sets", index=kind + INDEX),
            code="weights.several",
        )
    return whole[0] if whole else min(sets, key=lambda one: (len(one.missing), one.files))


def _is_kind(name: str, kind: str) -> bool:
    return _SHARD.fullmatch(name) is not None and f".{kind.rpartition('.')[2]}" in name


def _numbered_sets(names: Iterable[str]) -> list[WeightSet]:
    """Sets of files that count themselves: `…-N-of-COUNT…`, from 0 or from 1."""
    groups: dict[tuple[str, str], dict[int, str]] = {}
    counts: dict[tuple[str, str], int] = {}
    widths: dict[tuple[str, str], int] = {}
    for name in names:
        match = _NUMBERED.fullmatch(name)
        if match is None or not int(match["number"]) <= int(match["count"]) <= _MOST_SHARDS:
            continue
        key = match["before"], match["rest"]
        groups.setdefault(key, {})[int(match["number"])] = name
        counts[key] = int(match["count"])
        widths[key] = min(len(match["number"]), widths.get(key, 9))
    sets = []
    for (before, rest), numbers in groups.items():
        count, width = counts[before, rest], widths[before, rest]
        # Counted from 0 or from 1; with both a 0 and a last number there are two sets in one another.
        for first in [first for first, sign in ((0, 0), (1, count)) if sign in numbers] or [1]:
            files = [numbers.get(n, f"{before}{n:0{width}d}{rest}") for n in range(first, first + count)]
            absent = [file for n, file in enumerate(files, first) if n not in numbers]
            sets.append(WeightSet(tuple(files), None, tuple(absent)))
    return sets


def missing_parts(names: Sequence[str]) -> list[str]:
    """Of files that count themselves, the names that the others promise and that are not there."""
    return sorted(name for one in _numbered_sets(names) for name in one.missing)


def no_weights(where: str, names: Collection[str]) -> Damaged:
    """Why nothing among `names` can be run, with the way out: a layout that Meta or Mistral ship ("weights.layout"),
    files that glmchat does not read or cannot choose from ("weights.unread"), or nothing at all ("weights.none").

    where: the folder or the repository, for the message. names: of files, those in sub-folders too.
    """
    where, top = one_line(where), sorted(name for name in names if "/" not in name)
    layouts = (
        (r"(.*/)?consolidated[^/]*\.pth", "Meta", "llama/convert_llama_weights_to_hf.py"),
        (r"(.*/)?consolidated[^/]*\.safetensors", "Mistral", "mistral/convert_mistral_weights_to_hf.py"),
    )
    for pattern, owner, script in layouts:
        if any(re.fullmatch(pattern, name) for name in names):
            return Damaged(
                tr("{where} has the layout of {owner}'s own download (consolidated.*)", where=where, owner=owner),
                hint=tr(
                    "take the repository of this model that has config.json and model.safetensors, "
                    "or convert it with {script}",
                    script=f"transformers/models/{script}",
                ),
                code="weights.layout",
            )
    if gguf := [name for name in top if name.endswith(".gguf")]:
        return Damaged(
            tr("{where} has its weights only as GGUF", where=where),
            hint=tr("name the GGUF file itself: {path}", path=f"{where}/{one_line(gguf[0])}"),
            code="weights.unread",
        )
    tensors = [name for name in top if _is_tensors(name)]
    variants = [(name, match["variant"]) for name in tensors if (match := _VARIANT.fullmatch(name))]
    below = sorted({name.rpartition("/")[0] for name in names if "/" in name and _is_tensors(name)})
    foreign = [name for name in top if _is_foreign(name)]
    if variants:
        name, variant = variants[0]
        message = tr("{where} has its weights only as a variant, {name}", where=where, name=one_line(name))
        hint = tr("rename the files without .{variant}, or take a repository with model.safetensors", variant=variant)
    elif tensors:
        message = tr("nothing says which files of {where} are the weights: {names}", where=where, names=listed(tensors))
        hint = tr(
            "fetch model.safetensors.index.json from the repository; a single file must be called model.safetensors"
        )
    elif below and not foreign:
        message = tr("{where} has its weights in a sub-folder: {folders}", where=where, folders=listed(below))
        hint = tr("name that folder itself; of a repository, `glmchat pull NAME --include '{path}/*'`", path=below[0])
    elif foreign := foreign or sorted(name for name in names if _is_foreign(name)):
        message = tr(
            "{where} has its weights only as {names}, which glmchat does not read", where=where, names=listed(foreign)
        )
        hint = tr("glmchat reads model.safetensors, pytorch_model.bin and GGUF: take a repository with one of them")
    else:
        return Damaged(
            tr("{where} contains no weights", where=where),
            hint=tr("expected model.safetensors or pytorch_model.bin, or their shards with an index file"),
            code="weights.none",
        )
    return Damaged(message, hint=hint, code="weights.unread")


def missing_weights(chosen: WeightSet, names: Iterable[str], again: str) -> Damaged:
    """The error for a set with gaps. again: the way to the missing files, for the hint."""
    beside = [name for name in names if "/" not in name and name not in chosen.files and _is_tensors(name)]
    if chosen.index is not None and len(chosen.missing) == len(chosen.files) and beside:
        again = tr(
            "{index} does not belong to {names}: fetch the index of these files, or delete it",
            index=chosen.index,
            names=listed(sorted(beside)),
        )
    return Damaged(
        tr(
            "{missing} of {all} weight files are missing: {names}",
            missing=len(chosen.missing),
            all=len(chosen.files),
            names=listed(chosen.missing),
        ),
        hint=again,
        code="weights.missing_shard",
    )


def _is_foreign(name: str) -> bool:
    plain = name.rpartition("/")[2]
    return plain.endswith(_FOREIGN) or plain in ("openvino_model.bin", "openvino_model.xml")


def _is_tensors(name: str) -> bool:
    plain = name.rpartition("/")[2]
    if plain.startswith("adapter_") or plain.endswith(".json"):
        return False
    return ".safetensors" in plain or re.fullmatch(r"(pytorch_)?model.*\.bin(-.*)?", plain) is not None


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = ", ".join(one_line(name, 120) for name in names[:_NAMES_SHOWN])
    left = len(names) - _NAMES_SHOWN
    return shown + (tr(" and {count} more", count=left) if left > 0 else "")


def damaged_weights(path: Path, reason: str) -> Damaged:
    """The error for a weight file that is not what it should be, in the words of whoever read it."""
    return Damaged(
        tr(
            "{name} ({size}) is truncated or damaged: {reason}",
            name=one_line(path.name),
            size=human_bytes(path.stat().st_size),
            reason=reason,
        ),
        hint=tr("the download was interrupted, or the disk damaged it: run `glmchat verify`, or pull it again"),
        code="weights.damaged",
    )
