"""The store of adapters: each in a folder of its own, with its files, their hashes, and what it says of itself.

Nothing here reads tensors: what an adapter is comes from the engine's checks, which the command line asks for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from glmchat.checkpoints.adapter_files import CONFIG, TEXT_FILES, weight_files
from glmchat.checkpoints.peft_kinds import KINDS
from glmchat.core import locations
from glmchat.core.errors import UnknownModel, Usage
from glmchat.core.fingerprints import fingerprint, of_text
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import installed, manifests, store
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import BESIDE, FileRecord, Manifest
from glmchat.hub.store import sha256_of

_NAME = re.compile(r"\w[\w.+-]{0,95}")
# Beside the weights: what tells where they come from. Code and the rest of a training run stay behind.
_COMPANIONS = re.compile(r"(?i)adapter_config\.json|config\.json|readme\.md|(model_)?licen[cs]e.*")  # and TEXT_FILES


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an adapter came from: a repository at a commit, or a path on this machine.

    served: the pull's record of each file (who served it, its hash on the hub), by name.
    """

    asked: str
    repo: str | None = None
    revision: str | None = None
    served: Mapping[str, FileRecord] = field(default_factory=dict)


def list_adapters() -> list[Installed]:
    """The adapters of the store. Reads their folders and nothing else."""
    rows = [row for folder in installed.adapter_folders() if (row := installed.row_of_adapter(folder)) is not None]
    return sorted(rows, key=lambda row: row.name.lower())


def by_name(name: str) -> Installed | None:
    """The adapter of that name; a path is no name. Looks at its folder alone, so that the window may ask."""
    if not name or name.startswith(".") or "/" in name or "\0" in name:
        return None
    return installed.row_of_adapter(locations.adapters_dir() / name)


def is_forced(name: str) -> bool:
    """The adapter is attached in spite of a base that does not match. Looks at its folder alone."""
    row = by_name(name)
    return row is not None and facts_of(row).get("forced") is True


def find_adapter(name: str) -> Installed:
    """Raises UnknownModel with the names there are."""
    row = by_name(name)
    if row is None:
        names = one_line(", ".join(row.name for row in list_adapters()), 200)
        raise UnknownModel(
            tr("there is no adapter {name}", name=repr(one_line(name, 80))),
            hint=names or tr("glmchat adapters add PATH adds one"),
            code="adapter.unknown",
        )
    return row


def digest_of(path: Path) -> str:
    """Of weights, configuration and text files at `path`, to know an adapter again; large files are sampled."""
    config = (path if path.is_dir() else path.parent) / CONFIG
    text = [path / name for name in TEXT_FILES if path.is_dir() and (path / name).is_file()]
    files = [*weight_files(path), *([config] if config.is_file() else []), *text]
    return of_text("\n".join(f"{p.name} {p.size} {p.digest}" for p in fingerprint(files)))


def checked_name(name: str) -> str:
    """A plain name that is safe as a folder's. Raises Usage."""
    if not _NAME.fullmatch(name) or ".." in name or name.endswith((".", ".incomplete")):
        raise Usage(
            tr("{name} cannot be the name of an adapter", name=repr(one_line(name, 80))),
            hint=tr("use letters, digits, dots, dashes and underscores"),
            code="adapter.name",
        )
    return name


def free_name(name: str, flag: str = "--name") -> Path:
    """The folder that an adapter of this name will have. flag: by which another one is given.

    Raises Usage for a name that is taken or is none.
    """
    place = locations.adapters_dir() / checked_name(name)
    if place.exists():
        raise Usage(
            tr("there is already an adapter {name}", name=name),
            hint=tr("glmchat adapters rm {name}, or give another one with {flag}", name=name, flag=flag),
            code="adapter.taken",
        )
    return place


def unused_name(name: str) -> str:
    """`name`, or the first of name-2, name-3 … that no adapter of the store has."""
    numbered = (f"{name}-{number}" for number in count(2))
    return name if by_name(name) is None else next(other for other in numbered if by_name(other) is None)


def suggested_name(source: Path, repo: str | None) -> str:
    """From the repository's or the folder's name; `checkpoint-3000` is told apart by the folder around it."""
    base = repo.rpartition("/")[2] if repo else source.stem if source.is_file() else source.name
    if repo is None and re.fullmatch(r"checkpoint-\d+|prefix_only|pytorch_model|adapter_model", base):
        base = f"{source.absolute().parent.name}-{base}"
    return re.sub(r"[^\w.+-]+|\.\.+", "-", base).strip("-.")[:80] or "adapter"


def keep(
    name: str,
    files: Sequence[Path],
    facts: Mapping[str, Any],
    origin: Origin,
    *,
    base: str | None,
    write: Callable[[Path], None] | None = None,
) -> Installed:
    """Copy `files` into the store under `name`, hash them, note `facts`, and return the row.

    facts: what the engine says the adapter is; they stand under "adapter" in glmchat.json. write: puts further files
    into the folder. The folder is whole or absent. Raises Usage if the name is taken, DoesNotFit, Failed.
    """
    place = free_name(name)
    locations.private_dir(locations.data_dir())
    locations.private_dir(locations.adapters_dir())
    store.require_space(sum(path.stat().st_size for path in files), place)
    growing = place.with_name(f".{name}.{os.getpid()}.incomplete")
    shutil.rmtree(growing, ignore_errors=True)
    try:
        growing.mkdir(mode=0o700)
        for path in files:
            shutil.copyfile(path, growing / path.name)  # follows the links of a hub's snapshot
        if write is not None:
            write(growing)
        manifest = _manifest(name, growing, origin, base)
        note = {**manifest.to_json(), "root": str(place), "adapter": dict(facts)}
        text = json.dumps(note, ensure_ascii=False, indent=1)
        store.write_whole(growing / BESIDE, text.encode(), mode=0o600)
        growing.replace(place)
    except OSError as error:
        raise store.disk_error(error, place) from None
    finally:
        shutil.rmtree(growing, ignore_errors=True)
    return installed.row_of_made(place, replace(manifest, root=place))


def companions(source: Path) -> list[Path]:
    """The small files beside an adapter's weights that are kept with it."""
    folder = source if source.is_dir() else source.parent
    return [
        p for p in sorted(folder.iterdir()) if p.is_file() and (p.name in TEXT_FILES or _COMPANIONS.fullmatch(p.name))
    ]


def facts_of(row: Installed) -> dict[str, Any]:
    """What was noted when the adapter was added; {} for a folder that was put there by hand."""
    noted = small_json(row.path / BESIDE).get("adapter")
    return noted if isinstance(noted, dict) else {}


def kind_words(facts: Mapping[str, Any]) -> str:
    """ "LoRA of rank 8", "prefix of 128 positions", "IA3"."""
    kind = facts.get("kind")
    if kind == "lora":
        return tr("LoRA of rank {rank}", rank=facts.get("rank") or "?")
    if kind == "prefix":
        return tr("prefix of {length} positions", length=facts.get("length"))
    if kind == "prompt":
        return tr("{length} virtual tokens", length=facts.get("length"))
    if isinstance(kind, str) and kind in KINDS:
        rank, name = facts.get("rank"), KINDS[kind].name
        return tr("{kind} of rank {rank}", kind=name, rank=rank) if rank else tr(name)
    return tr("not checked yet")


def to_json(row: Installed) -> dict[str, Any]:
    """A row of `glmchat adapters list --json`."""
    digest = next((f.sha256 for f in row.files if f.path.endswith((".safetensors", ".bin", ".pt", ".pth"))), None)
    asked = row.manifest.asked if row.manifest else None
    return {**row.to_json(), "origin": asked, "sha256": digest, "adapter": facts_of(row)}


def change_force(row: Installed, forced: bool) -> None:
    """Note that the adapter may (or may no longer) be attached to a base it does not name."""
    file = row.path / BESIDE
    note = small_json(file)
    note["adapter"] = {**facts_of(row), "forced": forced}
    store.write_whole(file, json.dumps(note, ensure_ascii=False, indent=1).encode(), mode=0o600)


def _manifest(name: str, folder: Path, origin: Origin, base: str | None) -> Manifest:
    records = tuple(_record(path, origin) for path in sorted(folder.iterdir()) if path.is_file())
    return Manifest(
        name=name,
        kind="adapter",
        source="made",
        root=folder,
        repo=origin.repo,
        revision=origin.revision,
        base=base,
        asked=origin.asked,
        date=store.now(),
        files=records,
    )


def _record(path: Path, origin: Origin) -> FileRecord:
    digest, served = sha256_of(path), origin.served.get(path.name)
    if served is not None and served.sha256 in (None, digest):
        return replace(served, size=path.stat().st_size, sha256=digest)
    return FileRecord(path.name, path.stat().st_size, digest, date=store.now())


def forget_pull(root: Path) -> None:
    """A pulled adapter lives in the store; its snapshot in the shared cache is no model of ours."""
    for manifest in manifests.read_all():
        if manifest.root == root:
            manifests.remove(manifest)
