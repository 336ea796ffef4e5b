"""Models that learned on this machine: their names, and how one comes into the store from a run's folder."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.files import sync
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import adapters, aliases, catalogue, installed, lookup, manifests, store
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import BESIDE, FileRecord, Manifest


def free_name(name: str) -> Path:
    """The folder that a model of this name will have. Raises Usage for a name that is taken or is none."""
    place = locations.models_dir() / adapters.checked_name(name)
    if is_taken(name):
        raise Usage(
            tr("{name} already stands for another model", name=repr(one_line(name, 80))),
            hint=tr("choose another name with --as NAME"),
            code="tune.taken",
        )
    return place


def is_taken(name: str) -> bool:
    """Whether a model on this machine, an alias or the catalogue has this name, whatever its case."""
    known = (*catalogue.load().names(), *aliases.load())
    is_known = name.lower() in {other.lower() for other in known}
    return is_known or os.path.lexists(locations.models_dir() / name) or bool(lookup.by_name(name))


def unused_name(name: str) -> str:
    """`name`, or the first of name-2, name-3 … that is not taken."""
    numbered = (f"{name}-{number}" for number in count(2))
    return name if not is_taken(name) else next(other for other in numbered if not is_taken(other))


def keep(folder: Path, name: str, base: str | None, facts: Mapping[str, Any]) -> Installed:
    """Bring a whole model's folder into the store under `name`, by renaming it, and return its row.

    base: what it learned from, by name. facts: how; they stand under "trained" in its glmchat.json. Raises Usage if
    the name is taken, DoesNotFit, Failed.
    """
    place = free_name(name)
    locations.private_dir(locations.data_dir())
    locations.private_dir(locations.models_dir())
    files = tuple(_record(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != BESIDE)
    manifest = Manifest(
        name=name,
        kind="model",
        source="made",
        root=place,
        family=installed.family_at(folder),
        base=base,
        asked=f"glmchat tune {facts.get('run', '')}".strip(),
        date=store.now(),
        files=files,
    )
    note = json.dumps({**manifest.to_json(), "trained": dict(facts)}, ensure_ascii=False, indent=1)
    store.write_whole(folder / BESIDE, manifests.as_bytes(note), mode=0o600)
    try:
        _move(folder, place)
        sync(place.parent)
    except OSError as error:
        raise store.disk_error(error, place) from None
    return installed.row_of_made(place, manifest)


def facts_of(row: Installed) -> dict[str, Any]:
    """What stands under "trained" of a model that learned here; {} for any other."""
    if row.source != "made" or not row.path.is_dir():
        return {}
    found = small_json(row.path / BESIDE).get("trained")
    return found if isinstance(found, dict) else {}


def _record(path: Path) -> FileRecord:
    return FileRecord(path.name, path.stat().st_size, store.sha256_of(path))


def _move(folder: Path, place: Path) -> None:
    """A store on another disk than the runs takes a copy, whole or not there."""
    try:
        folder.replace(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        growing = place.with_name(f"{place.name}.incomplete")
        shutil.rmtree(growing, ignore_errors=True)
        shutil.copytree(folder, growing)
        for path in (*growing.iterdir(), growing):
            sync(path)
        growing.replace(place)
        shutil.rmtree(folder)
