"""The lock file: models and adapters at exact commits and hashes, to be had again elsewhere (`pull --locked FILE`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged, Hostile, Usage
from glmchat.core.files import read_given
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import adapters, catalogue
from glmchat.hub.catalogue import Entry, KnownFile, Source
from glmchat.hub.installed import Installed
from glmchat.hub.plan import PullOptions, PullPlan, plan_entry
from glmchat.hub.references import checked_name, checked_repo, is_commit
from glmchat.hub.safe_paths import check_listing

FORMAT = 1
_LARGEST = 64 * 2**20  # bytes; a model of 10,000 files takes 3 MB


@dataclass(frozen=True, slots=True)
class LockedAdapter:
    """alpha: for a raw file of a LoRA, which does not say it."""

    entry: Entry
    alpha: float | None = None


@dataclass(frozen=True, slots=True)
class Locked:
    """What a lock file holds; models as entries of a catalogue of its own."""

    models: tuple[Entry, ...]
    adapters: tuple[LockedAdapter, ...]


def lock(rows: Sequence[Installed]) -> tuple[dict[str, Any], list[str]]:
    """The content of a lock file for these models and adapters, and the names of those that cannot be had elsewhere."""
    content: dict[str, Any] = {"format": FORMAT, "models": [], "adapters": []}
    left_out = []
    entries = catalogue.load()
    for row in rows:
        source = _source(row, entries)
        hashed = all(f.sha256 or f.git_blob for f in row.files)
        if source is None or not row.files or not hashed or not row.complete:
            left_out.append(row.name)
            continue
        what: dict[str, Any] = {"name": row.name.partition("@")[0], "family": row.family, "quant": row.quant}
        if row.kind == "adapter":
            facts = adapters.facts_of(row)
            what = {"name": row.name, "base": row.base}
            what["alpha"] = facts.get("alpha") if facts.get("form") == "raw" else None
        content["adapters" if row.kind == "adapter" else "models"].append(
            {
                **what,
                "source": {k: v for k, v in asdict(source).items() if v is not None},
                "files": [
                    {"path": f.path, "size": f.size, "sha256": f.sha256, "git_blob": f.git_blob} for f in row.files
                ],
            }
        )
    return content, left_out


def read_lock(path: Path) -> Locked:
    """Raises Usage, Damaged or Hostile."""
    try:
        data = json.loads(read_given(path, _LARGEST))
    except FileNotFoundError:
        raise Usage(
            tr("there is no lock file {path}", path=path), hint="glmchat lock > glmchat.lock", code="lock.missing"
        ) from None
    except OSError as error:
        raise _broken(path, error.strerror or str(error)) from None
    except (ValueError, RecursionError):
        raise _broken(path, tr("this is not a lock file")) from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise _broken(path, tr("this version of glmchat reads format {number}", number=FORMAT))
    try:
        models = tuple(_entry(raw) for raw in data["models"])
        adapter_entries = tuple(_adapter(raw) for raw in data.get("adapters", ()))
    except (Hostile, Usage):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        why = tr("something in it is missing or wrong: {what}", what=one_line(repr(error), 80))
        raise _broken(path, why) from None
    for entry in (*models, *(adapter.entry for adapter in adapter_entries)):
        check_listing((f.path for f in entry.files), source=str(path))
    return Locked(models, adapter_entries)


def plan_locked(entry: Entry, options: PullOptions) -> PullPlan:
    """The plan for one model of a lock file; its commit and hashes are the lock's, whatever a server says."""
    return plan_entry(entry, options)


def _source(row: Installed, entries: catalogue.Catalogue) -> Source | None:
    if row.kind == "adapter":
        if not row.repo or not is_commit(row.revision or "") or adapters.facts_of(row).get("extracted"):
            return None
        return Source("hf", row.repo, row.revision or "")
    if row.source == "pypi":
        entry = next((e for e in entries if e.reference == row.name), None)
        return next((s for s in entry.sources if s.kind == "pypi"), None) if entry else None
    if row.source in ("hf", "path") and row.repo and row.revision and is_commit(row.revision):
        return Source("hf", row.repo, row.revision)
    if row.source == "modelscope" and row.repo:
        return Source("modelscope", row.repo, row.revision or "master")
    return None


def _adapter(raw: dict[str, Any]) -> LockedAdapter:
    entry, alpha = _entry(raw), raw.get("alpha")
    adapters.checked_name(entry.name)
    if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        raise ValueError(alpha)
    return LockedAdapter(entry, alpha)


def _entry(raw: dict[str, Any]) -> Entry:
    source = catalogue.checked_source(Source(**raw["source"]))
    if source.kind == "path":  # a folder of the machine that wrote the lock
        raise ValueError(source.kind)
    if source.kind in ("hf", "modelscope"):
        checked_repo(source.repo)
    files = tuple(_file(item) for item in raw["files"])
    texts = (raw["name"], raw.get("family") or "", raw.get("quant") or "")
    if not files or not all(isinstance(text, str) for text in texts):
        raise ValueError(texts)
    if source.kind == "pypi":  # its folder is called as the model is
        checked_name(raw["name"])
    return Entry(
        name=raw["name"],
        label="locked",
        family=raw.get("family"),
        quant=raw.get("quant") or "none",
        sources=(source,),
        files=files,
        default=True,
    )


def _file(item: dict[str, Any]) -> KnownFile:
    file = KnownFile(str(item["path"]), int(item["size"]), item.get("sha256"), item.get("git_blob"))
    digits = frozenset("0123456789abcdef")
    for value, length in ((file.sha256, 64), (file.git_blob, 40)):
        if value is not None and (not isinstance(value, str) or len(value) != length or set(value) - digits):
            raise ValueError(value)
    if not (file.sha256 or file.git_blob) or (file.size or 0) < 0:
        raise ValueError(file.path)
    return file


def _broken(path: Path, why: str) -> Damaged:
    return Damaged(f"{path}: {why}", hint=tr("create it again: glmchat lock > glmchat.lock"), code="lock.broken")
