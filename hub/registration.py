"""Make a folder that is already on this machine known by a name, without copying a byte (`glmchat add PATH`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import NoReturn

from glmchat.checkpoints.weight_choice import missing_parts, no_weights
from glmchat.checkpoints.weight_files import chosen_weights, file_names, gguf_parts
from glmchat.core.errors import Damaged, Usage
from glmchat.core.files import require_plain_folder
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import aliases, catalogue, installed, lookup, manifests, selection, store
from glmchat.hub.catalogue import Entry
from glmchat.hub.git_lfs import find_pointers
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import FileRecord, Manifest
from glmchat.hub.store import sha256_of

OnBytes = Callable[[str, int, int | None], None]


def register(path: Path, name: str | None, on_bytes: OnBytes, cancelled: Callable[[], bool]) -> Installed:
    """Hash the files of a model folder (or of one GGUF file) and write a manifest for it.

    A folder whose weights are those of a known revision is that revision and gets its name. Raises Usage (no model, a
    name that is taken), Damaged (git-lfs pointers, lost shards), Interrupted.
    """
    if path.is_dir():
        require_plain_folder(path)
    root, names = _contents(path)
    _refuse_pointers(root, names)
    if "config.json" in names:
        read_json(root / "config.json")  # a name is for what can be run; its weights are looked at when it is
    if missing := _missing(root, names):
        raise Damaged(
            tr(
                "{path} lacks {count} of its weight files, for example {name}",
                path=root,
                count=len(missing),
                name=missing[0],
            ),
            hint=tr("put the missing files there, then add it again"),
            code="add.shards_missing",
        )
    records = tuple(_record(root, n, on_bytes, cancelled) for n in names)
    entry = _recognised(records)
    made = manifests.read(root / manifests.BESIDE, root=root)  # a quantised copy of ours, brought from elsewhere
    origin = entry or made
    manifest = Manifest(
        name=name or (entry.reference if entry else _free_name(path)),
        kind=made.kind if made else "model",
        source="path",
        root=root,
        repo=origin.repo if origin else None,
        revision=origin.revision if origin else None,
        family=origin.family if origin else installed.family_at(root),
        quant=origin.quant if origin else installed.quant_of_folder(root),
        base=made.base if made else None,
        asked=str(path),
        date=store.now(),
        files=records,
    )
    others = [m for m in manifests.read_all() if m.source == "path" and m.root == root and _same(m, manifest)]
    own_names = {m.name for m in others}
    elsewhere = [alias for alias, target in aliases.load().items() if target not in own_names]
    if name and not entry and name.lower() in (n.lower() for n in (*catalogue.load().names(), *elsewhere)):
        raise Usage(
            tr("{name} already stands for another model", name=repr(name)),
            hint=tr("choose another name: glmchat add PATH --name NAME"),
            code="add.taken",
        )
    taken = next((r for r in lookup.by_name(manifest.name) if r.name == manifest.name and r.path != path), None)
    if taken is not None:
        raise Usage(
            tr("{name} is already {path}", name=manifest.name, path=taken.path),
            hint=tr("choose another name: glmchat add PATH --name NAME"),
            code="add.taken",
        )
    manifests.write(manifest)
    aliases.drop(manifest.name)
    for other in others:  # one folder has one name, the last given; those before it go on meaning it
        if other.name != manifest.name:
            manifests.remove(other)
            with suppress(Usage):  # a name with a commit in it
                aliases.set_alias(other.name, manifest.name)
    row = installed.row_of_manifest(manifest, catalogue.load())
    lookup.remember(row)
    return row


def _missing(root: Path, names: Sequence[str]) -> Sequence[str]:
    """Weight files that the index, or the names of the others, speak of and that are not there."""
    chosen = chosen_weights(root, file_names(root)) if "config.json" in names else None
    return chosen.missing if chosen is not None else missing_parts([n for n in names if n.endswith(".gguf")])


def _same(one: Manifest, other: Manifest) -> bool:
    """True for two registrations of one model; two GGUF files may share a folder."""
    return bool({f.path for f in one.files} & {f.path for f in other.files})


def _contents(path: Path) -> tuple[Path, list[str]]:
    """The folder and the names in it that belong to a model."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent.absolute(), [part.name for part in gguf_parts(path) if part.is_file()]
    if not path.is_dir():
        raise Usage(
            tr("there is no folder {path}", path=one_line(str(path))),
            hint=tr("name a folder with config.json and weights, or a .gguf file"),
            code="add.path",
        )
    there = file_names(path)
    chosen = chosen_weights(path, there) if "config.json" in there else None
    weights = list(chosen.files) if chosen is not None else [n for n in there if n.endswith(".gguf")]
    if not weights:
        _refuse_no_model(path, there)
    needed = {f.path for f in selection.needed([catalogue.KnownFile(n) for n in there])}
    small = {n for n in needed if not selection.is_weights(n) and not n.endswith(".index.json")}
    index = {chosen.index} if chosen is not None and chosen.index else set()
    return path.absolute(), sorted((small | index | set(weights)) & set(there))


def _refuse_no_model(path: Path, there: Sequence[str]) -> NoReturn:
    problem = no_weights(str(path), file_names(path, below=True))
    if problem.code == "weights.layout" or (problem.code == "weights.unread" and "config.json" in there):
        raise problem
    raise Usage(
        tr("{path} does not contain a model: no config.json with weights, no .gguf", path=path),
        hint=tr("name the folder that contains them; to add an adapter, use `glmchat adapters add`"),
        code="add.no_model",
    )


def _refuse_pointers(root: Path, names: list[str]) -> None:
    pointers = [(n, p) for n, p in find_pointers(root) if n in names]
    if not pointers:
        return
    first, pointer = pointers[0]
    more = tr(" and {count} more", count=len(pointers) - 1) if len(pointers) > 1 else ""
    raise Damaged(
        tr("{path} is a git-lfs pointer, the real file has {size} bytes", path=first, size=pointer.size) + more,
        hint=tr("glmchat pull --into {path} fetches the real files", path=root),
        code="lfs.pointer",
    )


def _record(root: Path, name: str, on_bytes: OnBytes, cancelled: Callable[[], bool]) -> FileRecord:
    path = root / name
    size, done = path.stat().st_size, 0

    def count(length: int) -> None:
        nonlocal done
        done += length
        on_bytes(name, done, size)

    return FileRecord(name, size, sha256_of(path, on_bytes=count, cancelled=cancelled), date=store.now())


def _recognised(records: tuple[FileRecord, ...]) -> Entry | None:
    """The known revision whose weights and tokenizer all lie here, byte for byte."""
    here = {r.path: r.sha256 for r in records}
    for entry in catalogue.load():
        decisive = [f for f in entry.files if selection.is_weights(f.path) or f.path.endswith(".model")]
        if decisive and all(here.get(f.path) == f.sha256 for f in decisive):
            return entry
    return None


def _free_name(path: Path) -> str:
    base = (
        re.sub(
            r"[^\w.+-]+", "-", re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) if path.is_file() else path.absolute().name
        ).strip("-.")
        or "model"
    )
    names = catalogue.load().names()
    candidates = (base if number == 1 else f"{base}-{number}" for number in count(1))
    return next(
        name
        for name in candidates
        if name not in names and all(r.name != name or r.path == path for r in lookup.by_name(name))
    )
