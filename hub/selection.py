"""Which files of a repository are needed (weights in one format, tokenizer, configs; never code, unless asked).

And of a pull plan: which of them are here, whole or half, also under another name, and what the others need.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from glmchat.checkpoints.weight_choice import WeightSet, choose_weights, missing_parts, no_weights
from glmchat.core import locations
from glmchat.core.errors import Damaged, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.hub import store
from glmchat.hub.catalogue import KnownFile, Source
from glmchat.hub.gguf_choice import default_choice
from glmchat.hub.modelscope_cache import folders_of

# What holds tensors: under the usual names, and under those that an index may give.
_TENSORS = re.compile(r".+\.safetensors(-.*)?|(pytorch_|adapter_)?model.*\.bin(-.*)?")
_ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
_TOKENIZERS = re.compile(
    r".*\.(model|tiktoken)|merges\.txt|vocab\.txt|chinese_vocab\.vocab|chat_template\.(jinja|json)|.*\.jinja"
)
_LICENCES = re.compile(r"(model_)?licen[cs]e.*|notice.*|copying.*", re.IGNORECASE)
# Records of a training run and of other runtimes: JSON, but nothing that a model needs.
_NOT_CONFIG = re.compile(
    r"trainer_state\.json|training_args\.json|all_results\.json|(train|eval)_results\.json|.*\.index\.json"
)
ReadIndex = Callable[[str], Sequence[str] | None]  # the files that an index names; None where nobody can read it now


def needed(
    files: Sequence[KnownFile],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    everything: bool = False,
    adapter: bool = False,
    gguf: Collection[str] = (),
    read_index: ReadIndex = lambda _: None,
    named: object = None,
) -> list[KnownFile]:
    """The files to fetch, in the order of the listing.

    include:    shell patterns; given, they alone decide (`*.py` is how code is asked for).
    exclude:    shell patterns of files that are left out; the weights are chosen among the others.
    everything: all files of the revision.
    adapter:    the weights are those of an adapter, where there are some.
    gguf:       the files of one GGUF model, which are then the weights.
    read_index, named: see `choose_weights`, which decides what the weights are.

    Raises Usage if the patterns leave nothing, Damaged or Hostile for a bad index.
    """
    left = [f for f in files if not any(fnmatchcase(f.path, p) for p in exclude)]
    if include:
        chosen = [f for f in left if any(fnmatchcase(f.path, p) for p in include)]
    elif everything:
        chosen = left
    else:
        names = [f.path for f in left]
        of_adapter = [name for name in _ADAPTERS if name in names][:1]
        weights = set(gguf or (adapter and of_adapter) or _weights(names, read_index, named) or of_adapter)
        chosen = [f for f in left if f.path in weights or _is_small_need(f.path)]
    if not chosen:
        raise Usage(
            tr("no files of this repository are selected"),
            hint=tr("it contains {names}", names=", ".join(f.path for f in files[:8]) or "nothing"),
            code="pull.nothing_chosen",
        )
    return chosen


def refuse_no_model(repo: str, files: Sequence[KnownFile], read_index: ReadIndex, named: object = None) -> None:
    """Raise Damaged, in the words of `run`, for a listing from which no model could be run: before a byte is fetched.

    A repository that holds only an adapter is told where it belongs. Raises what `choose_weights` raises.
    """
    names = [f.path for f in files]
    chosen = choose_weights(names, read_index, named)
    if chosen is None and (gguf := default_choice(names)):
        chosen = WeightSet(tuple(gguf), None, tuple(missing_parts(gguf)))
    if chosen is None and "adapter_config.json" in names and "config.json" not in names:
        raise Usage(
            tr("{repo} contains only an adapter, no model", repo=one_line(repo)),
            hint=f"glmchat adapters add {one_line(repo)}",
            code="model.only_adapter",
        )
    if chosen is None:
        raise no_weights(repo, names)
    if chosen.missing:
        hint = tr("name another revision, or choose files with --include")
        if chosen.index is not None and len(chosen.missing) == len(chosen.files):
            hint = tr("{index} belongs to other files: leave it out with --exclude {index}", index=chosen.index)
        raise Damaged(
            tr(
                "the repository lacks {count} of its weight files, for example {name}",
                count=len(chosen.missing),
                name=one_line(chosen.missing[0]),
            ),
            hint=hint,
            code="pull.shards_missing",
        )


def is_weights(path: str) -> bool:
    """True for a file that holds tensors in a format glmchat reads."""
    if path.endswith(".gguf"):
        return True
    return "/" not in path and _TENSORS.fullmatch(path) is not None


def _is_small_need(path: str) -> bool:
    if "/" in path:
        return False
    if path.endswith(".json"):
        return not _NOT_CONFIG.fullmatch(path)
    return bool(_TOKENIZERS.fullmatch(path) or _LICENCES.fullmatch(path)) and not path.endswith(".py")


def _weights(names: Sequence[str], read_index: ReadIndex, named: object) -> list[str]:
    """The weights with their index; of GGUF files one quantisation."""
    chosen = choose_weights(names, read_index, named)
    if chosen is not None:
        return [*chosen.files, *([chosen.index] if chosen.index else [])]
    return default_choice(names)


@dataclass(frozen=True, slots=True)
class PlannedFile:
    path: str
    size: int | None
    sha256: str | None
    git_blob: str | None
    etag: str  # the name of its blob
    state: str  # "here" | "linked" (a blob that only needs its link) | "copy" | "partial" | "missing"
    have: int = 0  # bytes of a half download
    local: Path | None = None  # state "copy": where it is

    @property
    def missing(self) -> int:
        """Bytes to fetch, as far as sizes are known."""
        return max((self.size or 0) - self.have, 0) if self.state in ("partial", "missing") else 0


def file_state(repo: str, commit: str, file: KnownFile, sources: tuple[Source, ...]) -> PlannedFile:
    """The file as it stands in the Hugging Face cache, or elsewhere on this machine."""
    etag = file.etag or made_up_etag(repo, commit, file.path)
    planned = PlannedFile(file.path, file.size, file.sha256, file.git_blob, etag, "missing")
    blob_size = size_of(store.blob(repo, etag))
    linked = size_of(store.snapshot(repo, commit) / file.path)
    if file.size is None:
        return replace(planned, state="here" if linked is not None else "missing", size=linked)
    if linked == file.size:
        return replace(planned, state="here")
    if blob_size == file.size:
        return replace(planned, state="linked")
    if local := elsewhere(repo, file, sources):
        return replace(planned, state="copy", local=local)
    if have := size_of(store.partial(repo, etag)):
        return replace(planned, state="partial", have=min(have, file.size))
    return planned


def totals(files: Sequence[PlannedFile], root: Path) -> dict[str, Any]:
    """Bytes to fetch, here and in all, and the disk that they need."""
    missing, total = sum(f.missing for f in files), sum(f.size or 0 for f in files)
    copied = sum(f.size or 0 for f in files if f.state == "copy" and not _same_disk(f.local))
    return {
        "bytes_total": total,
        "bytes_here": total - missing,
        "bytes_missing": missing,
        "disk_needed": missing + copied,
        "disk_free": store.free_bytes(root),
    }


def size_of(path: Path) -> int | None:
    """Size of a file, links followed; None if it is not there."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None


def elsewhere(repo: str, file: KnownFile, sources: tuple[Source, ...] = ()) -> Path | None:
    """A copy of `file` outside the repository's own blobs that has the right size; its hash is checked when taken.

    Looked at: blobs of other repositories in the same cache (renamed owners, fine-tuned copies with the same
    tokenizer), the folders that the catalogue names as sources, and ModelScope's user cache.
    """
    if file.size is None or not (file.sha256 or file.git_blob):
        return None
    own = store.repo_folder(repo)
    if file.etag:
        for other in sorted(locations.hf_cache().glob(f"models--*/blobs/{file.etag}")):
            if other.parent.parent != own and size_of(other) == file.size:
                return other
    for other in sorted(own.glob(f"snapshots/*/{glob.escape(file.path)}")):  # of a disk without links
        if not other.is_symlink() and size_of(other) == file.size:
            return other
    named = [locations.user_path(s.repo) for s in sources if s.kind == "path"]
    on_modelscope = [s.repo for s in sources if s.kind == "modelscope"]
    for folder in [*named, *folders_of(repo, *on_modelscope)]:
        if size_of(folder / file.path) == file.size:
            return folder / file.path
    return None


def made_up_etag(repo: str, commit: str, path: str) -> str:
    """A blob name for a file whose hash nobody knows (--trust-host)."""
    return hashlib.sha256(f"{repo}@{commit}/{path}".encode()).hexdigest()


def _same_disk(path: Path | None) -> bool:
    cache = locations.hf_cache()
    while not cache.exists() and cache != cache.parent:
        cache = cache.parent
    return path is not None and path.stat().st_dev == cache.stat().st_dev
