"""Check files against the hashes they should have, offline, and say for each wrong one what it is instead.

What is expected comes from the manifest, else from the names of the cache's blobs (they are hashes), else from the
catalogue's revision that the folder resembles most.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glmchat.checkpoints.weight_choice import missing_parts
from glmchat.checkpoints.weight_files import chosen_weights, parse_pointer
from glmchat.core.errors import Damaged
from glmchat.core.files import files_below
from glmchat.core.language import tr
from glmchat.core.text import human_bytes
from glmchat.hub import catalogue, selection
from glmchat.hub.catalogue import Catalogue, Entry, KnownFile
from glmchat.hub.installed import Installed, hash_of_link
from glmchat.hub.store import git_blob_of, sha256_of

State = Literal["ok", "missing", "size", "hash", "pointer", "unknown"]
OnBytes = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """One file: what was expected and what is there."""

    path: str
    state: State
    expected: KnownFile
    size: int | None = None  # what is there, bytes
    sha256: str | None = None
    belongs_to: tuple[str, ...] = ()  # known revisions that hold a file with this content
    as_file: str = ""  # the name it has there, if another

    @property
    def good(self) -> bool:
        return self.state in ("ok", "unknown")

    def sentence(self) -> str:
        """What is wrong with the file and what was expected, in one line."""
        size = human_bytes(self.expected.size) if self.expected.size is not None else "?"
        expected = (self.expected.sha256 or self.expected.git_blob or "?")[:16]
        match self.state:
            case "missing":
                return tr("{path} is missing ({size}, {hash}…)", path=self.path, size=size, hash=expected)
            case "pointer":
                return tr(
                    "{path} is a git-lfs pointer of {found} bytes; the real file has {expected} bytes",
                    path=self.path,
                    found=self.size,
                    expected=self.expected.size,
                )
            case "size" | "hash":
                line = tr(
                    "{path} does not match: {found} bytes, sha256 {found_hash}…; expected {expected} bytes, {hash}…",
                    path=self.path,
                    found=self.size,
                    found_hash=(self.sha256 or "?")[:16],
                    expected=self.expected.size,
                    hash=expected,
                )
                if self.belongs_to:
                    name = f" ({self.as_file})" if self.as_file else ""
                    line += "; " + tr("it belongs to {names}", names=", ".join(self.belongs_to) + name)
                return line
            case "unknown":
                return tr("{path}: no known hash", path=self.path)
            case _:
                return tr("{path} is intact", path=self.path)

    def to_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "state": self.state,
            "size": self.size,
            "sha256": self.sha256,
            "expected_size": self.expected.size,
            "expected_sha256": self.expected.sha256,
            "expected_git_blob": self.expected.git_blob,
            "belongs_to": list(self.belongs_to),
        }


@dataclass(frozen=True, slots=True)
class Report:
    name: str
    path: Path
    against: str  # "manifest", "cache", or the catalogue's reference
    files: tuple[Verdict, ...]
    kind: str = "model"

    @property
    def wrong(self) -> list[Verdict]:
        return [f for f in self.files if not f.good]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.path),
            "against": self.against,
            "ok": not self.wrong,
            "files": [f.to_json() for f in self.files],
        }

    def require_good(self) -> None:
        """Raises Damaged (exit 3) that names the first wrong file and counts the others."""
        if not (wrong := self.wrong):
            return
        more = tr(" and {count} more", count=len(wrong) - 1) if len(wrong) > 1 else ""
        pointers = any(f.state == "pointer" for f in wrong)
        raise Damaged(
            wrong[0].sentence() + more,
            hint=tr("glmchat pull --into {path} fetches the real files", path=self.path)
            if pointers
            else tr("glmchat adapters rm {name}, then add it again", name=self.name)
            if self.kind == "adapter"
            else tr("glmchat pull --check {name} downloads the damaged files again", name=self.name)
            if self.against != "nothing" and not Path(self.name).is_absolute()
            else tr("replace the file, or pull the model"),
            code="verify.damaged",
        )


def verify(
    row: Installed, on_bytes: OnBytes = lambda *_: None, cancelled: Callable[[], bool] = lambda: False
) -> Report:
    """Hash every file of a model and compare. Opens no socket. Raises Interrupted."""
    entries = catalogue.load()
    root = row.path if row.path.is_dir() else row.path.parent
    if row.manifest is not None:
        root = row.manifest.root
    expected, against = _expected(row, root, entries)
    if not expected:
        return _resembling(row, root, entries, on_bytes, cancelled)
    files = tuple(_verdict(root, e, entries, on_bytes, cancelled) for e in expected)
    return Report(row.name, root, against, files, row.kind)


def _expected(row: Installed, root: Path, entries: Catalogue) -> tuple[list[KnownFile], str]:
    if row.files:
        return [KnownFile(f.path, f.size, f.sha256, f.git_blob) for f in row.files], "manifest"
    if row.repo and row.revision and (entry := entries.of_repo(row.repo, row.revision)):
        return _needed_or_there(entry, root), entry.reference
    if row.source == "hf" and row.repo:
        return _by_blob_names(root), "cache"
    return [], ""


def _by_blob_names(snapshot: Path) -> list[KnownFile]:
    """In a Hugging Face cache every link leads to a blob that is named by its hash."""
    files = []
    for place in sorted(files_below(snapshot)):
        sha256, git_blob = hash_of_link(place)
        files.append(KnownFile(place.relative_to(snapshot).as_posix(), sha256=sha256, git_blob=git_blob))
    return files


def _resembling(
    row: Installed, root: Path, entries: Catalogue, on_bytes: OnBytes, cancelled: Callable[[], bool]
) -> Report:
    """A folder of unknown origin: hash what could be a known file, then compare with the revision it resembles most."""
    names = {f.path for e in entries for f in e.files if not f.path.endswith(".py")}
    single = row.path.name if row.path.is_file() else None
    there = [p for p in sorted(names) if (root / p).is_file() and (single is None or p == single)]
    seen = {p: _verdict(root, KnownFile(p), entries, on_bytes, cancelled) for p in there}
    entry = max(entries, key=lambda e: _likeness(e, seen), default=None)
    if entry is None or _likeness(entry, seen) == (0, 0, 0):
        others = (p.relative_to(root).as_posix() for p in sorted(files_below(root)) if p.is_file())
        verdicts = [
            _verdict(root, KnownFile(p), entries, on_bytes, cancelled) for p in others if single is None or p == single
        ]
        lost = _lost_weights(root, [v.path for v in verdicts])
        verdicts += [Verdict(p, "missing", KnownFile(p)) for p in lost]
        return Report(row.name, root, "nothing", tuple(verdicts))
    expected = [f for f in _needed_or_there(entry, root) if single is None or f.path == single]
    return Report(row.name, root, entry.reference, tuple(_judge(e, seen.get(e.path), entries) for e in expected))


def _lost_weights(root: Path, names: Sequence[str]) -> Sequence[str]:
    """Weight files that the index, or the names of the others, speak of and that are not there."""
    try:
        chosen = chosen_weights(root, names)
    except Damaged:  # a bad index is told by whoever reads it
        return []
    return chosen.missing if chosen is not None else missing_parts([n for n in names if n.endswith(".gguf")])


def _likeness(entry: Entry, seen: dict[str, Verdict]) -> tuple[int, int, int]:
    """Files with the right content, with the right size, with the right name."""
    named = [(f, seen[f.path]) for f in entry.files if f.path in seen]
    right = sum(f.sha256 is not None and f.sha256 == _content(v) for f, v in named)
    sized = sum(f.size == (v.expected.size if v.state == "pointer" else v.size) for f, v in named)
    return right, sized, sum(selection.is_weights(f.path) for f, _ in named)


def _content(verdict: Verdict) -> str | None:
    """sha256 of the file, for a pointer that of the file it stands for."""
    return verdict.expected.sha256 if verdict.state == "pointer" else verdict.sha256


def _needed_or_there(entry: Entry, root: Path) -> list[KnownFile]:
    """What the model needs, and what else of the revision is there. Code is left out: glmchat never runs it."""
    needed = {f.path for f in selection.needed(entry.files)}
    licences = {f.path for f in entry.files if re.match(r"(?i)(model_)?licen[cs]e", f.path)}
    return [f for f in entry.files if f.path in needed and (f.path not in licences or (root / f.path).is_file())]


def _verdict(
    root: Path, expected: KnownFile, entries: Catalogue, on_bytes: OnBytes, cancelled: Callable[[], bool]
) -> Verdict:
    path = root / expected.path
    if not path.is_file():
        return Verdict(expected.path, "missing", expected)
    size = path.stat().st_size
    if pointer := parse_pointer(path):
        real = replace(expected, size=expected.size or pointer.size, sha256=expected.sha256 or pointer.oid)
        if not (expected.size == size and expected.sha256 is None):
            return Verdict(expected.path, "pointer", real, size)
    if expected.size is not None and size != expected.size and not _known_size(entries, size):
        return Verdict(expected.path, "size", expected, size)  # no use in reading gigabytes to say "wrong" once more
    done = 0

    def count(length: int) -> None:
        nonlocal done
        done += length
        on_bytes(expected.path, done, size)

    digest = sha256_of(path, on_bytes=count, cancelled=cancelled)
    on_bytes(expected.path, size, size)
    seen = Verdict(expected.path, "unknown", expected, size, digest)
    if not expected.sha256 and expected.git_blob:
        good = git_blob_of(path) == expected.git_blob
        return replace(seen, state="ok") if good else _judge(expected, seen, entries, differs=True)
    return _judge(expected, seen, entries)


def _judge(expected: KnownFile, seen: Verdict | None, entries: Catalogue, *, differs: bool = False) -> Verdict:
    """The verdict on a file whose content is known (`seen`), against what is expected now."""
    if seen is None:
        return Verdict(expected.path, "missing", expected)
    if seen.state == "pointer":
        return replace(seen, expected=expected)
    if not differs and (expected.sha256 is None or seen.sha256 == expected.sha256):
        if expected.size is not None and seen.size != expected.size:
            return replace(seen, state="size", expected=expected)
        return replace(seen, state="ok" if expected.sha256 else "unknown", expected=expected)
    owners = entries.owners_of(seen.sha256 or "") if seen.sha256 else []
    names = tuple(dict.fromkeys(f"{e.name}@{(e.revision or e.label)[:12]}" for e, _ in owners))
    other = next((f.path for _, f in owners if f.path != expected.path), "") if owners else ""
    if any(f.path == expected.path for _, f in owners):
        other = ""
    state: State = "size" if seen.size != expected.size and expected.size is not None else "hash"
    return replace(seen, state=state, expected=expected, belongs_to=names, as_file=other)


def _known_size(entries: Iterable[Entry], size: int) -> bool:
    return any(f.size == size for e in entries for f in e.files)


def unknown_files(report: Report) -> Sequence[Verdict]:
    """Files that could not be checked because nobody knows their hash."""
    return [f for f in report.files if f.state == "unknown"]
