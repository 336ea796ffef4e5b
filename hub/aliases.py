"""Names of the user's own for models: `glmchat alias glm chatglm-6b@096f3de6`."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Damaged, Usage
from glmchat.core.files import note, set_aside
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.hub import catalogue, manifests, store
from glmchat.hub.references import Reference, parse


def load() -> dict[str, str]:
    """Alias -> reference. A file that is no longer what glmchat wrote is set aside, and a note says so.

    Raises Damaged where it cannot be moved.
    """
    path = _file()
    if not os.path.lexists(path):
        return {}
    try:
        data = read_json(path)
        if not all(isinstance(v, str) for v in data.values()):
            raise _damaged(path, "not a table of names")
    except Damaged as error:
        try:
            aside = set_aside(path)
        except OSError:
            raise _damaged(path, error.message) from None
        sentence = tr(
            "The names that you gave to models were damaged. The file was moved to {path}, and a new one was started.",
            path=aside.name,
        )
        note(sentence)
        return {}
    return data


def set_alias(name: str, target: str) -> Reference:
    """Make `name` mean `target`, and return what it means. Raises Usage if that would be a circle or a path."""
    reference = parse(name)
    if reference.name is None or reference.revision or reference.quant:
        raise Usage(
            tr("{name} cannot be an alias", name=repr(name)),
            hint=tr("use a plain name without /, @ or : that is not a folder here"),
            code="alias.name",
        )
    if any(name.lower() in (e.name.lower(), *(a.lower() for a in e.aliases)) for e in catalogue.load()):
        raise Usage(
            tr("{name} is already a model in the catalogue", name=repr(name)),
            hint=tr("choose another name, or override the model in your own models.toml"),
            code="alias.taken",
        )
    meant = expand(parse(target))
    if meant.name == name:
        raise Usage(tr("{name} cannot be an alias of itself", name=name), hint=tr("name a model"), code="alias.circle")
    _write({**load(), name: str(meant)})
    return meant


def leading_to(names: Collection[str]) -> set[str]:
    """The aliases of these models."""
    return {alias for alias, target in load().items() if target in names}


def drop(name: str) -> None:
    """As `remove_alias`, also where there is none."""
    if name in (aliases := load()):
        _write({k: v for k, v in aliases.items() if k != name})


def remove_alias(name: str) -> None:
    aliases = load()
    if name not in aliases:
        raise Usage(
            tr("there is no alias {name}", name=repr(name)),
            hint=tr("known names: {names}", names=", ".join(sorted(aliases)) or tr("none")),
            code="alias.unknown",
        )
    drop(name)


def expand(reference: Reference) -> Reference:
    """What the reference means when its name is an alias; a revision or quantisation given with it stands."""
    aliases = load()
    for _ in range(len(aliases)):
        if reference.name is None or reference.name not in aliases:
            break
        target = parse(aliases[reference.name])
        reference = replace(
            target,
            revision=reference.revision or target.revision,
            quant=reference.quant or target.quant,
            file=reference.file or target.file,
        )
    return reference


def _file() -> Path:
    return locations.data_dir() / "aliases.json"


def _write(aliases: dict[str, str]) -> None:
    locations.private_dir(locations.data_dir())
    store.write_whole(_file(), manifests.as_bytes(json.dumps(aliases, ensure_ascii=False, indent=1)), mode=0o600)


def _damaged(path: Path, why: str) -> Damaged:
    return Damaged(f"{path}: {why}", hint=tr("fix the file or move it out of the way"), code="alias.broken")
