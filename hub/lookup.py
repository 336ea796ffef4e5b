"""What is on this machine: all of it, or the one row that a name, a path or a reference means.

A list looks at every model's files. A lookup reads the names alone (manifests, names of folders) and then looks at the
files of the rows that can be meant; both build a row in the same way, so they cannot disagree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from glmchat.checkpoints.file_kinds import refuse_no_weights
from glmchat.core import locations
from glmchat.core.errors import GlmchatError, UnknownModel, Usage
from glmchat.core.json_files import small_json
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import aliases, catalogue, gguf_choice, installed, manifests, store
from glmchat.hub.catalogue import Catalogue, Entry
from glmchat.hub.installed import Installed
from glmchat.hub.manifests import Manifest
from glmchat.hub.modelscope_cache import kept
from glmchat.hub.references import Reference


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row comes from, and what is known of it before its files are looked at."""

    name: str  # the row's; of a snapshot that the catalogue does not know: without its commit
    root: Path
    path: Path  # the row's; of a snapshot: the folder, also where the row's is a GGUF file in it
    look: Callable[[], Installed | None]
    repo: str | None = None
    revision: str | None = None
    base: str | None = None


def list_installed() -> list[Installed]:
    """Everything on this machine, half downloads too (`complete` False), models before what is made from them."""
    return _rows(_places(catalogue.load()), lambda _: True)


def told_apart(rows: Sequence[Installed]) -> list[Installed]:
    """The rows of a list as they are shown: of one model in several places (two caches, a cache and a folder) its name
    means the first; the others are named by their paths, which find them wherever a name does."""
    names: set[str] = set()
    told: list[Installed] = []
    for row in rows:
        again = row.kind != "adapter" and row.name.lower() in names
        told.append(replace(row, name=str(row.path)) if again else row)
        names.add(row.name.lower())
    return told


def by_name(name: str) -> list[Installed]:
    """The rows of that name, whatever its case: one, or several that were added by hand under one name."""
    word = name.lower()
    rows = _rows(_places(catalogue.load()), lambda place: _stem(place.name) == _stem(name))
    return [row for row in rows if row.name.lower() == word]


def by_path(path: Path) -> Installed | None:
    """The row whose path this is, else one whose path leads to the same folder or file."""
    resolved = path.resolve()

    def leads_there(place: _Place) -> bool:
        if path in (place.path, place.root) or resolved in (place.path.resolve(), place.root.resolve()):
            return True
        # The GGUF file of a snapshot is a link to a blob of its repository.
        return place.root.parent.name == "snapshots" and resolved.is_relative_to(place.root.parent.parent.resolve())

    rows = _rows(_places(catalogue.load()), leads_there)
    exact = next((row for row in rows if row.path == path), None)
    exact = exact or next((row for row in rows if row.path.resolve() == resolved), None)
    if exact is not None or path.suffix != ".gguf":
        return exact
    beside = (installed.one_gguf(row, path.name) for row in rows if row.path.parent == path.parent)
    return next((row for row in beside if row is not None and row.path == path), None)


def made_from(*names: str | None) -> list[Installed]:
    """The quantised copies, half ones too, of a model that has these names."""
    rows = _rows(_places(catalogue.load()), lambda place: place.base is not None and place.base in names)
    return [row for row in rows if row.kind == "quantized" and row.base in names]


def find_installed(reference: Reference, *, incomplete: bool = False) -> Installed | None:
    """The model that a reference means, if it is on this machine; `incomplete` accepts a half download too.

    A path must exist (Usage if not). Raises UnknownModel for a bare name that nobody knows. None: known, not here.
    """
    reference = aliases.expand(reference)
    if reference.path is not None:
        row = _at_path(reference.path)
        return _copy_of(row, reference.quant) if reference.quant else row
    if reference.file is not None:
        folder = find_installed(replace(reference, file=None, quant=None), incomplete=True)
        one = installed.one_gguf(folder, reference.file) if folder is not None else None
        if one is None or not (one.complete or incomplete):
            return None
        return _copy_of(one, reference.quant) if reference.quant else one
    entries = catalogue.load()
    entry, is_known = _entry(reference, entries)
    places = _places(entries)
    rows = _rows(places, lambda place: _may_mean(reference, place, entry))
    names = {row.name for row in rows}
    names |= aliases.leading_to(names)  # what it was called before, when a copy was made
    if reference.quant and any(place.base in names for place in places):
        rows = _rows(places, lambda place: place.base in names or _may_mean(reference, place, entry))
    rows = [r for r in rows if r.kind != "adapter" and (r.complete or incomplete)]
    if exact := next((r for r in rows if r.name.lower() == str(reference).lower()), None):
        return exact
    if not is_known and not any(_is_local(reference, row) for row in rows):
        _refuse_unknown(reference.name or "", entries, incomplete=incomplete)
    return _pick(reference, rows, entry)


def complete_names(beginning: str = "") -> list[str]:
    """Names for shell completion: what is here, the aliases, what the catalogue knows."""
    try:
        words = [r.name for r in list_installed() if r.kind != "adapter"]
        words += [*aliases.load(), *catalogue.load().names()]
    except GlmchatError:  # completion has no place for a message
        return []
    return [w for w in dict.fromkeys(words) if w.lower().startswith(beginning.lower())]


def remember(row: Installed) -> None:
    """Note this model as the one last pulled or run."""
    locations.private_dir(locations.state_dir())
    content = {"name": row.name, "path": str(row.path)}
    store.write_whole(_marker(), manifests.as_bytes(json.dumps(content, ensure_ascii=False)), mode=0o600)


def last_used() -> Installed | None:
    """The model last pulled or run, if it is still here."""
    try:
        path = Path(small_json(_marker())["path"])
    except (KeyError, TypeError):
        return None
    row = by_path(path)
    return row if row is not None and row.path == path and row.complete and row.kind != "adapter" else None


def _marker() -> Path:
    return locations.state_dir() / "last-model.json"


# Places and rows


def _places(entries: Catalogue) -> list[_Place]:
    """Every place that may hold a row; of two that hold the same, the first counts."""
    records = manifests.read_all()
    return [
        *(_manifest_place(record, entries) for record in records),
        *_made_places(),
        *_source_places(entries, {record.root for record in records}),
        *_snapshot_places(entries, {record.root for record in records}),
        *_modelscope_places(entries, {record.root for record in records}),
        *_adapter_places(),
    ]


def _manifest_place(record: Manifest, entries: Catalogue) -> _Place:
    return _Place(
        name=installed.manifest_name(record, entries),
        root=record.root,
        path=installed.engine_path(record.root, [f.path for f in record.files]),
        look=partial(_manifest_row, record, entries),
        repo=record.repo,
        revision=record.revision,
        base=record.base,
    )


def _manifest_row(record: Manifest, entries: Catalogue) -> Installed | None:
    row = installed.row_of_manifest(record, entries)
    return row if row.size_bytes else None  # none of its bytes is here, whole or half


def _made_places() -> list[_Place]:
    """The folders of the store whose glmchat.json says that glmchat made them."""
    places = []
    for folder in installed.entries_of(locations.models_dir()):
        if (record := installed.made_manifest(folder)) is not None:
            look = partial(installed.row_of_made, folder, record)
            places.append(_Place(record.name, folder, folder, look, record.repo, record.revision, record.base))
    return places


def _source_places(entries: Catalogue, roots: set[Path]) -> list[_Place]:
    """Models without a manifest in folders that the catalogue tells: where `pull` puts the file of a package (it may
    have been put there by hand), and the folders that a user's models.toml names as a source."""
    folders = [(e, s.kind, locations.models_dir() / e.name) for e in entries for s in e.sources if s.kind == "pypi"]
    folders += [(e, s.kind, locations.user_path(s.repo)) for e in entries for s in e.sources if s.kind == "path"]
    places = []
    for entry, kind, folder in folders:
        if entry.files and folder not in roots:
            path = installed.engine_path(folder, [f.path for f in entry.files])
            look = partial(installed.row_of_entry, entry, kind, folder)
            places.append(_Place(entry.reference, folder, path, look, revision=entry.revision))
    return places


def _snapshot_places(entries: Catalogue, roots: set[Path]) -> list[_Place]:
    """Snapshots in the Hugging Face cache without a manifest, whoever put them there."""
    cache = locations.hf_cache()
    places = []
    for folder in sorted(cache.glob("models--*/snapshots/*")) if cache.is_dir() else []:
        if folder not in roots:
            repo = installed.snapshot_repo(folder)
            entry = entries.of_repo(repo, folder.name)
            look = partial(_row_unless_closed, partial(installed.row_of_snapshot, folder, entries), roots)
            places.append(_Place(entry.reference if entry else repo, folder, folder, look, repo, folder.name))
    return places


def _modelscope_places(entries: Catalogue, roots: set[Path]) -> list[_Place]:
    """What ModelScope's tools fetched; of a model that the catalogue has there, under the catalogue's name too."""
    known = {s.repo.lower(): e.reference for e in entries for s in e.sources if s.kind == "modelscope"}
    places = []
    for one in kept():
        if one.folder not in roots:
            look = partial(_row_unless_closed, partial(installed.row_of_kept, one, entries), roots)
            name = known.get(one.repo.lower(), one.repo)
            places.append(_Place(name, one.folder, one.folder, look, one.repo, one.revision))
    return places


def _row_unless_closed(look: Callable[[], Installed | None], roots: set[Path]) -> Installed | None:
    try:
        row = look()
    except PermissionError:  # a cache that several users share: what we may not read is not there for us
        return None
    return None if row is None or row.path in roots or row.path.parent in roots else row


def _adapter_places() -> list[_Place]:
    folders = installed.adapter_folders()
    return [_Place(folder.name, folder, folder, partial(installed.row_of_adapter, folder)) for folder in folders]


def _rows(places: Sequence[_Place], chosen: Callable[[_Place], bool]) -> list[Installed]:
    """The rows of the chosen places, and of those that share a folder with one: several manifests of it are one row."""
    first = [place for place in places if chosen(place)]
    roots, paths = {place.root for place in first}, {place.path for place in first}
    beside = (place for place in places if place.root in roots or place.path in paths)
    rows = [row for place in beside if (row := place.look()) is not None]
    distinct = {(row.path, row.kind): row for row in reversed(rows)}.values()
    order, cache = {"model": 0, "quantized": 1, "adapter": 2}, locations.hf_cache()

    def rank(row: Installed) -> tuple[int, str, bool, bool]:
        """Of one name the whole one comes first, then what lies in the cache that is used now."""
        return order.get(row.kind, 3), row.name.lower(), not row.complete, not row.path.is_relative_to(cache)

    return sorted(distinct, key=rank)


def _stem(name: str) -> str:
    """A name without its commit and its bits."""
    return name.lower().partition("@")[0].partition(":")[0]


# References


def _entry(reference: Reference, entries: Catalogue) -> tuple[Entry | None, bool]:
    """The catalogue's entry, and whether the catalogue knows the name; a repository may be known to a hub alone."""
    try:
        return entries.find(reference.base), True
    except UnknownModel:
        return None, False


def _may_mean(reference: Reference, place: _Place, entry: Entry | None) -> bool:
    """False for a place whose row the reference cannot mean, copies of what it means aside."""
    named = (reference.name or reference.repo or "").lower()
    if named in (_stem(place.name), (place.repo or "").lower()) or place.name.lower() == str(reference).lower():
        return True
    if entry is None:
        return False
    same_commit = place.revision is not None and place.revision == entry.revision
    return same_commit or place.name == entry.reference or (place.base or "").lower() in _names(entry)


def _pick(reference: Reference, rows: Sequence[Installed], entry: Entry | None) -> Installed | None:
    fits = [r for r in rows if _is_local(reference, r) or (entry and _is(r, entry))]
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


def _refuse_unknown(name: str, entries: Catalogue, *, incomplete: bool) -> NoReturn:
    """Raises UnknownModel: it is an adapter, or nobody knows it; then it names the nearest of all that are here."""
    if any(row.kind == "adapter" and row.name == name for row in by_name(name)):
        raise UnknownModel(
            tr("{name} is an adapter, not a model", name=one_line(name, 80)),
            hint=tr("glmchat run MODEL --adapter {name}; glmchat adapters show {name}, rm {name}", name=name),
            code="model.adapter",
        )
    here = [r.name for r in list_installed() if r.kind != "adapter" and (r.complete or incomplete)]
    raise entries.unknown(name, also=[*here, *aliases.load()])


def _is_local(reference: Reference, row: Installed) -> bool:
    """The row has the reference's name or repository, whatever the catalogue says of it."""
    return (reference.name or reference.repo or "").lower() in (_stem(row.name), (row.repo or "").lower())


def _is(row: Installed, entry: Entry) -> bool:
    if row.kind != "model":
        return False
    if row.name == entry.reference:
        return True
    return row.revision is not None and row.revision == entry.revision and row.repo is not None


def _based_on(row: Installed, entry: Entry) -> bool:
    same_commit = row.revision is not None and row.revision == entry.revision
    return same_commit or (row.base or "").lower() in _names(entry)


def _names(entry: Entry) -> set[str]:
    """What a copy may call the entry that it was made from, in lower case."""
    return {entry.reference.lower(), f"{entry.name}@{entry.label}".lower()}


def _made_from(row: Installed, fits: Sequence[Installed], entry: Entry | None) -> bool:
    names = {f.name for f in fits}
    return (entry is not None and _based_on(row, entry)) or row.base in names | aliases.leading_to(names)


def _at_revision(row: Installed, revision: str) -> bool:
    commit = row.revision or ""
    if len(revision) >= 4 and commit.startswith(revision.lower()):
        return True
    return row.repo is not None and store.ref(row.repo, revision) == commit


def _at_path(path: Path) -> Installed:
    if not path.exists():
        near = [p.name for p in sorted(path.parent.iterdir())[:6]] if path.parent.is_dir() else []
        where = tr(
            "{folder} contains {names}", folder=path.parent, names=", ".join(map(one_line, near)) or tr("nothing")
        )
        raise Usage(
            tr("there is no {path}", path=one_line(str(path))),
            hint=where
            if path.parent.is_dir()
            else tr("{folder} does not exist either", folder=one_line(str(path.parent))),
            code="model.path",
        )
    if row := by_path(path):
        return row
    if not path.is_dir() and not path.is_file():
        refuse_no_weights(path)  # a pipe or a device, of which nothing can be told
    path = _lone_gguf(path)
    made = manifests.read(path / manifests.BESIDE, root=path) if path.is_dir() else None
    return Installed(
        name=str(path),
        kind=made.kind if made else "model",
        path=path,
        family=made.family if made else installed.family_at(path),
        quant=made.quant if made else installed.quant_of_folder(path),
        size_bytes=installed.folder_size(path) if path.is_dir() else path.stat().st_size,
        base=made.base if made else None,
        source="path",
        files=made.files if made else (),
        manifest=made,
    )


def _lone_gguf(path: Path) -> Path:
    """The GGUF model in a folder that holds one and nothing else that could be meant, in one file or in parts."""
    if not path.is_dir() or (path / "config.json").exists():
        return path
    names = [p.name for p in path.glob("*.gguf")]
    found = gguf_choice.choices(names)
    return path / next(iter(found.values()))[0] if len(found) == 1 else path


def _copy_of(row: Installed, quant: str) -> Installed | None:
    """The model itself if it has that quantisation, else the whole copy of it that has."""
    if row.quant.startswith(quant):
        return row
    copies = (r for r in made_from(row.name, *aliases.leading_to({row.name})) if r.complete)
    return next((r for r in copies if r.quant.startswith(quant)), None)
