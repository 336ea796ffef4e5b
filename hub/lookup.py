"""Which of the models on this machine a reference means."""

from __future__ import annotations

from collections.abc import Sequence

from glmchat.core.errors import GlmchatError, UnknownModel, Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import aliases, catalogue, manifests, store
from glmchat.hub.catalogue import Catalogue, Entry
from glmchat.hub.installed import (
    Installed,
    family_of,
    folder_size,
    list_installed,
    quant_of_folder,
)
from glmchat.hub.manifests import BESIDE
from glmchat.hub.references import Reference


def find_installed(reference: Reference, *, incomplete: bool = False) -> Installed | None:
    """The model that a reference means, if it is on this machine; `incomplete` accepts a half download too.

    A path must exist (Usage if not). Raises UnknownModel for a bare name that nobody knows. None: known, not here.
    """
    reference = aliases.expand(reference)
    if reference.path is not None:
        row = _at_path(reference)
        return _copy_of(row, reference.quant) if reference.quant else row
    here = list_installed()
    rows = [r for r in here if r.kind != "adapter" and (r.complete or incomplete)]
    try:
        return _pick(reference, rows, catalogue.load())
    except UnknownModel:
        name = next((r.name for r in here if r.kind == "adapter" and r.name == reference.name), None)
        if name is None:
            raise
        raise UnknownModel(
            tr("{name} is an adapter, no model", name=one_line(name, 80)),
            hint=tr("glmchat run MODEL --adapter {name}; glmchat adapters show {name}, rm {name}", name=name),
            code="model.adapter",
        ) from None


def _pick(reference: Reference, rows: Sequence[Installed], known: Catalogue) -> Installed | None:
    text = str(reference).lower()
    if exact := next((r for r in rows if r.name.lower() == text), None):
        return exact
    named = (reference.name or reference.repo or "").lower()
    local = [
        r
        for r in rows
        if r.name.lower().partition("@")[0].partition(":")[0] == named or (r.repo or "").lower() == named
    ]
    try:
        entry = known.find(reference.base)
    except GlmchatError:
        if not local:
            raise known.unknown(reference.name or "", also=[r.name for r in rows] + list(aliases.load())) from None
        entry = None
    fits = [r for r in rows if r in local or (entry and _is(r, entry))]
    if entry is not None:
        fits = [r for r in fits if _is(r, entry) or (r.base and _based_on(r, entry))]
    elif reference.revision:
        fits = [r for r in fits if _at_revision(r, reference.revision)]
    elif main := next((r for r in fits if r.repo and r.revision and store.ref(r.repo, "main") == r.revision), None):
        fits = [r for r in fits if r.revision == main.revision]
    if reference.quant:
        every = [r for r in rows if r in fits or (r.base and _made_from(r, fits, entry))]
        return next((r for r in every if r.quant.startswith(reference.quant)), None)
    return next((r for r in fits if r.kind == "model"), fits[0] if fits else None)


def _is(row: Installed, entry: Entry) -> bool:
    if row.kind != "model":
        return False
    if row.name == entry.reference:
        return True
    return row.revision is not None and row.revision == entry.revision and row.repo is not None


def _based_on(row: Installed, entry: Entry) -> bool:
    base = (row.base or "").lower()
    same_commit = row.revision is not None and row.revision == entry.revision
    return same_commit or base in {w.lower() for w in (entry.reference, f"{entry.name}@{entry.label}")}


def _made_from(row: Installed, fits: Sequence[Installed], entry: Entry | None) -> bool:
    return (entry is not None and _based_on(row, entry)) or any(row.base == f.name for f in fits)


def _at_revision(row: Installed, wanted: str) -> bool:
    revision = row.revision or ""
    if len(wanted) >= 4 and revision.startswith(wanted.lower()):
        return True
    return row.repo is not None and store.ref(row.repo, wanted) == revision


def _at_path(reference: Reference) -> Installed:
    path = reference.path
    assert path is not None
    if not path.exists():
        near = [p.name for p in sorted(path.parent.iterdir())[:6]] if path.parent.is_dir() else []
        where = tr("{folder} holds {names}", folder=path.parent, names=", ".join(map(one_line, near)) or tr("nothing"))
        raise Usage(
            tr("there is no {path}", path=one_line(str(path))),
            hint=where if path.parent.is_dir() else tr("nor is there {folder}", folder=one_line(str(path.parent))),
            code="model.path",
        )
    resolved = path.resolve()
    known = (r for r in list_installed() if r.path.resolve() == resolved)
    if row := next(known, None):
        return row
    made = manifests.read(path / BESIDE, root=path) if path.is_dir() else None
    config = small_json(path / "config.json") if path.is_dir() else {}
    return Installed(
        name=str(path),
        kind=made.kind if made else "model",
        path=path,
        family=made.family if made else family_of(config),
        quant=made.quant if made else quant_of_folder(path if path.is_dir() else path.parent),
        size_bytes=folder_size(path) if path.is_dir() else path.stat().st_size,
        base=made.base if made else None,
        source="path",
        files=made.files if made else (),
        manifest=made,
    )


def _copy_of(row: Installed, quant: str) -> Installed | None:
    """The model itself if it has that quantisation, else the whole copy of it that has."""
    if row.quant.startswith(quant):
        return row
    made = (r for r in list_installed() if r.kind == "quantized" and r.base == row.name and r.complete)
    return next((r for r in made if r.quant.startswith(quant)), None)
