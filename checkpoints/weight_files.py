"""The weight files of a folder: which there are, whole or cut, and git-lfs pointers that stand where one should.

Pointers are the 130 bytes of a clone without git-lfs: github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.checkpoints.config import settle_generation
from glmchat.checkpoints.safetensors_file import read_safetensors
from glmchat.checkpoints.ties import says_tied, with_own_head
from glmchat.checkpoints.torch_file import read_torch_file
from glmchat.checkpoints.weight_choice import WeightSet, choose_weights, listed, missing_weights, no_weights
from glmchat.core.errors import Damaged, Hostile, Usage
from glmchat.core.files import open_file, require_plain_folder, require_readable
from glmchat.core.json_files import read_json, small_json
from glmchat.core.language import tr
from glmchat.core.shell import shell_word
from glmchat.core.text import human_bytes, one_line

_MAX_BYTES = 1024  # the specification's own limit for a pointer
_STARTS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_FORM = re.compile(
    rb"version https?://(?:git-lfs\.github\.com|hawser\.github\.com)/spec/v1\n"
    rb"(?:[^\n]+\n)*?oid sha256:(?P<oid>[0-9a-f]{64})\n(?:[^\n]+\n)*?size (?P<size>\d{1,15})\n?(?:[^\n]+\n?)*"
)


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a pointer file stands for."""

    oid: str  # sha256 of the real file, hex
    size: int  # bytes of the real file


def parse_pointer(path: Path) -> Pointer | None:
    """The pointer that `path` holds, or None for every other file (also one that is not there). Reads 1 kB at most."""
    try:
        with open_file(path) as file:
            head = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    return parse_pointer_bytes(head)


def parse_pointer_bytes(head: bytes) -> Pointer | None:
    """The same for the first bytes of a file; more than 1 kB of them cannot be a pointer. Takes CRLF line ends."""
    if len(head) > _MAX_BYTES or not head.startswith(b"version http"):
        return None
    found = _FORM.fullmatch(head.replace(b"\r\n", b"\n"))
    return Pointer(found["oid"].decode(), int(found["size"])) if found else None


def pointer_text(pointer: Pointer) -> bytes:
    """The canonical pointer file, byte for byte as git-lfs writes it."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{pointer.oid}\nsize {pointer.size}\n".encode()


def refuse_pointer(path: Path) -> None:
    """Raise Damaged, with the real size, if `path` is a git-lfs pointer instead of what it stands for, or empty."""
    with open_file(path) as file:
        head = file.read(_MAX_BYTES + 1)
    if not head:
        raise Damaged(
            tr("{name} is empty", name=one_line(path.name)),
            hint=tr("the download was interrupted: pull the model again"),
            code="file.empty",
        )
    if head.startswith(_STARTS):
        size = re.search(rb"\nsize (\d{1,18})", head)  # also of a pointer whose hash is damaged
        raise Damaged(
            tr(
                "{name} is a git-lfs pointer for a file of {size}, not the file itself",
                name=one_line(path.name),
                size=human_bytes(int(size[1])) if size else "?",
            ),
            hint=tr(
                "fetch it with `glmchat pull --into {folder}`, or `git lfs pull` in the folder",
                folder=shell_word(str(path.parent)),
            ),
            code="file.lfs_pointer",
        )


ADAPTER_CONFIG = "adapter_config.json"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,200}")
PREFIX_ENCODER = "transformer.prefix_encoder."  # THUDM's P-Tuning v2


def folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with the stop ids of generation_config.json.

    Raises Damaged where there is none or it is damaged, Usage where the folder, or the newest checkpoint in
    the output of a training, holds only an adapter.
    """
    require_plain_folder(folder)
    file = folder / "config.json"
    if file.is_symlink():
        require_readable(file)
    if not file.is_file():
        refuse_adapter_folder(folder, {})
        hint = tr("a model folder holds config.json, weights and tokenizer files")
        if inside := sorted(p for p in folder.glob("*.gguf") if p.is_file()):
            hint = tr("name the GGUF file itself: {path}", path=one_line(str(inside[0])))
        elif saved := checkpoints(folder):
            own = saved[-1] / "config.json"
            refuse_adapter_folder(saved[-1], read_json(own) if own.is_file() else {})
            hint = tr("name the newest checkpoint itself: {path}", path=one_line(str(saved[-1])))
        elif (other := no_weights(str(folder), file_names(folder, below=True))).code == "weights.layout":
            raise other
        elif below := sorted(folder.glob("*/config.json")):
            hint = tr("name the folder of the model itself: {path}", path=one_line(str(below[0].parent)))
        raise Damaged(
            tr("{folder} has no config.json", folder=one_line(str(folder))), hint=hint, code="model.no_config"
        )
    refuse_pointer(file)
    config = read_json(file)
    generation = folder / "generation_config.json"
    if generation.is_file():
        # Models stop on what this file names (Llama 3 and Qwen list several ids here and one in config.json).
        eos = read_json(generation).get("eos_token_id")
        if eos is not None:
            config = {**config, "eos_token_id": eos}
    return settle_head(folder, settle_generation(folder, config))


def settle_head(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with `tie_word_embeddings` as the folder's tensors have it. Never raises."""
    try:
        chosen = chosen_weights(folder) if says_tied(config) else None
    except (Damaged, Hostile):
        chosen = None
    return dict(config) if chosen is None else with_own_head(folder, config, chosen)


def checkpoints(folder: Path) -> list[Path]:
    """What a training saved in its output folder, `checkpoint-500`, `checkpoint-1000`, …; the newest is the last."""
    found = (p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,12}", p.name) and p.is_dir())
    return sorted(found, key=lambda p: int(p.name.partition("-")[2]))


def chosen_weights(folder: Path, names: Iterable[str] | None = None) -> WeightSet | None:
    """Which files in `folder` are its weights, whole or not; None for none. Raises Damaged or Hostile for a bad index.

    names: of the files there, where they are known already.
    """

    def read_index(name: str) -> list[str]:
        refuse_pointer(folder / name)
        return shards_of(folder / name)

    named = small_json(folder / "config.json").get("transformers_weights")
    return choose_weights(file_names(folder) if names is None else names, read_index, named)


def file_names(folder: Path, *, below: bool = False) -> list[str]:
    """The files of a folder, sorted; below: those one folder further down too."""
    patterns = ("*", "*/*") if below else ("*",)
    return sorted(p.relative_to(folder).as_posix() for pattern in patterns for p in folder.glob(pattern) if p.is_file())


_GGUF_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf")


def gguf_parts(path: Path) -> list[Path]:
    """All files of a GGUF model that came in parts, there or not, by the name of any; itself alone for another file."""
    match = _GGUF_PART.fullmatch(path.name)
    if match is None or not 2 <= int(match["count"]) <= 10_000:
        return [path]
    numbers = range(1, int(match["count"]) + 1)
    return [path.with_name(f"{match['stem']}-{number:05}-of-{match['count']}.gguf") for number in numbers]


def weight_paths(path: Path) -> list[Path]:
    """Those files of a checkpoint's weights that are there, unchecked; none where nothing tells which they are.

    path: a folder, or a GGUF file, which is its own weights. A quantised folder of ours keeps offsets in files of
    their own, which belong to them.
    """
    if path.is_file():
        return [part for part in gguf_parts(path) if part.is_file()]
    try:
        chosen = chosen_weights(path) if path.is_dir() else None
    except Damaged:
        return []
    if chosen is None:
        return []
    here = [path / name for name in chosen.files if name not in chosen.missing]
    return [*here, *sorted({p for p in path.glob(_OFFSETS) if p.is_file()} - set(here))]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights, in transformers' order of choice. Raises Damaged with each missing shard
    named, or with what lies there instead."""
    names = file_names(folder)
    chosen = chosen_weights(folder, names)
    if (link := dead_link(folder, chosen)) is not None:
        require_readable(link)
    if chosen is None:
        raise no_weights(str(folder), file_names(folder, below=True))
    if chosen.missing:
        raise missing_weights(chosen, names, tr("pull the model again: what was downloaded is kept"))
    paths = [folder / name for name in chosen.files]
    for path in (*paths, *_offset_files(folder)):
        refuse_pointer(path)
        refuse_cut(path)
    return paths


def _offset_files(folder: Path) -> list[Path]:
    """The files beside the weights of a quantised copy of ours without which its zero points are other numbers: those
    that are there, and those that its own list has. Raises Damaged with one that is missing."""
    files = small_json(folder / "glmchat.json").get("files")
    names = {str(file.get("path")) for file in (files if isinstance(files, list) else ()) if isinstance(file, dict)}
    paths = sorted({folder / name for name in names if _OFFSETS_NAME.fullmatch(name)} | set(folder.glob(_OFFSETS)))
    for path in paths:
        if path.is_symlink():
            require_readable(path)
        if not path.exists():
            raise Damaged(
                tr("{name} is missing: zero points of this quantised copy are in it", name=one_line(path.name)),
                hint=tr("copy it too from where the folder is from, or quantise again"),
                code="weights.missing_shard",
            )
    return paths


_OFFSETS = "offsets-*.safetensors"
_OFFSETS_NAME = re.compile(r"offsets-\d{5,9}\.safetensors")


def dead_link(folder: Path, chosen: WeightSet | None) -> Path | None:
    """A link to nothing where weights should be: one that is missing of those that were chosen, the file that comes
    before all others, or any where none were."""
    kinds = (".safetensors", ".bin", ".gguf")
    with os.scandir(folder) as entries:  # an index may name any number of files, and a folder holds those it holds
        dead = sorted(entry.name for entry in entries if entry.is_symlink() and not Path(entry.path).exists())
    if chosen is None:
        wanted = [name for name in dead if name.endswith(kinds)]
    else:
        missing = {"model.safetensors", *chosen.missing}
        wanted = [name for name in dead if name in missing]
    return folder / wanted[0] if wanted else None


def shards_of(index: Path) -> list[str]:
    """The weight files that an index names, sorted. Raises Damaged, or Hostile for a name that is a path."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise Damaged(
            tr("{name} has no weight_map", name=index.name), hint=tr("pull the model again"), code="weights.index"
        )
    names = sorted({name if isinstance(name, str) else "" for name in table.values()})
    for name in names:
        if not _PLAIN_NAME.fullmatch(name):
            raise Hostile(
                tr("{index} names the file {name}", index=index.name, name=one_line(repr(name), 80)),
                hint=tr("a legitimate index names only files in its own folder: do not use this model"),
                code="weights.path",
            )
    return names


def refuse_cut(path: Path) -> None:
    """Raise Damaged if a weight file ends before it should, or says what cannot be; Hostile if it wants to run code."""
    if is_safetensors(path):
        read_safetensors(path)
    else:
        read_torch_file(path)


def is_safetensors(path: Path) -> bool:
    """An index may give a shard any name, also one that ends in a number: model.safetensors-00001-of-00002."""
    return ".safetensors" in path.name


def refuse_adapter_folder(folder: Path, config: Mapping[str, Any], names: Iterable[str] = ()) -> None:
    """Raise Usage, with the base and the command, if a folder given as a model holds only a LoRA or a prefix.

    names: the tensors there, where they are known already. THUDM's P-Tuning saves the prefix encoder and nothing else.
    """
    weights = folder / "pytorch_model.bin"
    file = folder / ADAPTER_CONFIG
    if file.is_file() and not (folder / "config.json").is_file():
        base, what = read_json(file).get("base_model_name_or_path"), tr("an adapter (adapter_config.json)")
    else:
        if not (found := list(names)) and weights.is_file():
            refuse_pointer(weights)
            found = list(read_torch_file(weights))
        if not found or not all(name.startswith(PREFIX_ENCODER) for name in found):
            return
        base, what = config.get("_name_or_path"), tr("a P-Tuning prefix")
    base = base if isinstance(base, str) else ""
    path = one_line(str(folder))
    word = base if re.fullmatch(r"[\w./~+-]+", base) else "BASE"
    needed = one_line(base, 120) or tr("its base model, which it does not name")
    raise Usage(
        tr("{folder} contains only {what}; it needs {base}", folder=path, what=what, base=needed),
        hint=f"glmchat run {word[:120]} --adapter {shell_word(str(folder))}",
        code="model.only_adapter",
    )


def refuse_names(
    family: str, missing: Sequence[str], left_over: Sequence[str], misshapen: Sequence[str], other: str | None
) -> None:
    """Raise Damaged that names every tensor that is in the way, if there is one.

    other: the published model whose embedding this is, where it is not this one's.
    """
    if not (missing or left_over or misshapen):
        return
    hint = tr("config.json and the weights belong to different models or revisions: verify the model, or pull it again")
    if other is not None:
        hint = tr(
            "these weights belong to {other}: use its config.json and vocabulary, or the matching weights",
            other=other,
        )
    elif not misshapen and all(name.startswith(PREFIX_ENCODER) for name in (*missing, *left_over)):
        hint = tr("the weights contain a P-Tuning prefix: config.json must give its length as pre_seq_len")
        if missing:
            hint = tr(
                "config.json has a pre_seq_len but there is no prefix: remove it, and name a prefix with --adapter"
            )
    parts = []
    if missing:
        parts.append(tr("{n} tensors are missing: {names}", n=len(missing), names=listed(missing)))
    if left_over:
        parts.append(tr("{n} tensors belong to no part of it: {names}", n=len(left_over), names=listed(left_over)))
    if misshapen:
        parts.append(tr("{n} tensors have a different shape: {names}", n=len(misshapen), names=listed(misshapen)))
    raise Damaged(
        tr(
            "the weights do not fit a {family} model of this size: {parts}",
            family=family,
            parts=one_line("; ".join(parts), 100_000),
        ),
        hint=hint,
        code="weights.names",
    )
