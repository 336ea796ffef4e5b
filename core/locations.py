"""Every path glmchat uses. `GLMCHAT_HOME` moves everything but the shared Hugging Face cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import platformdirs

from glmchat.core.errors import Failed, Usage
from glmchat.core.language import tr
from glmchat.core.shell import shell_word
from glmchat.core.text import one_line

_MOST_BESIDE = 10_000  # names of a folder that are compared with one that was mistyped


def _place(kind: str, usual: Callable[[str], str]) -> Path:
    """`kind` in GLMCHAT_HOME, else where this system keeps such files."""
    if value := os.environ.get("GLMCHAT_HOME"):
        return expanded(value).absolute() / kind
    try:
        return Path(usual("glmchat"))
    except RuntimeError:
        raise _homeless() from None


def expanded(path: str) -> Path:
    """The path with its `~` and its `$VARIABLES`, as huggingface_hub reads them: HF_HOME='$SCRATCH/hf' in a file of
    settings that no shell reads. Raises Failed for a user without a home (a container's bare number)."""
    try:
        return Path(os.path.expandvars(Path(path).expanduser()))
    except RuntimeError:
        raise _homeless() from None


def user_path(path: str | Path) -> Path:
    """A path that a person typed, absolute, with its `~`. Raises Usage for what is none: `~name` of nobody, or NUL."""
    try:
        if "\0" in str(path):
            raise ValueError(path)
        return Path(path).expanduser().absolute()
    except (RuntimeError, ValueError):
        raise Usage(
            tr("{name} is not a path", name=repr(one_line(str(path)))),
            hint=tr("write ./folder or /folder"),
            code="model.path",
        ) from None


def name_beside(path: str | Path) -> str:
    """ "did you mean …?" with the name in the same folder that a missing path was meant for; "" where none is alike."""
    wanted = Path(path)
    try:
        names = [each.name for each in islice(user_path(wanted.parent).iterdir(), _MOST_BESIDE)]
    except (OSError, Usage):
        return ""
    near = get_close_matches(wanted.name, names, 1, 0.7)
    return tr("did you mean {near}?", near=shell_word(str(wanted.with_name(near[0])))) if near else ""


def _homeless() -> Failed:
    return Failed(
        tr("this user has no home folder"),
        hint=tr("set HOME, or both GLMCHAT_HOME and HF_HOME, to folders that you can write to"),
        code="home.none",
    )


def config_dir() -> Path:
    return _place("config", platformdirs.user_config_dir)


def data_dir() -> Path:
    return _place("data", platformdirs.user_data_dir)


def state_dir() -> Path:
    return _place("state", platformdirs.user_state_dir)


def cache_dir() -> Path:
    return _place("cache", platformdirs.user_cache_dir)


def config_file() -> Path:
    return config_dir() / "config.toml"


def user_catalogue() -> Path:
    """The user's own models.toml: adds to the catalogue and overrides it."""
    return config_dir() / "models.toml"


def history_file() -> Path:
    return data_dir() / "history.db"


def manifests_dir() -> Path:
    """One JSON file per pulled model: source, commit, and size, sha256, host and date of each file."""
    return data_dir() / "manifests"


def models_dir() -> Path:
    """Models that do not come from a hub (the starter model from PyPI, quantised copies)."""
    return data_dir() / "models"


def adapters_dir() -> Path:
    return data_dir() / "adapters"


def evals_dir() -> Path:
    """Answers that `glmchat eval` had models write, a folder for each model, data and settings."""
    return data_dir() / "evals"


def packed_dir() -> Path:
    """Device layouts of quantised weights; may be deleted at any time."""
    return cache_dir() / "packed"


def kv_dir() -> Path:
    """KV caches of conversations (core/kv_files.py); may be deleted at any time."""
    return cache_dir() / "kv"


def logs_dir() -> Path:
    return state_dir() / "logs"


def hf_cache() -> Path:
    """The standard Hugging Face hub cache, shared with every other tool.

    Read from the environment on each call, as huggingface_hub binds its own copy at import. Absolute: engines and jobs
    are started elsewhere.
    """
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if value := os.environ.get(name):
            return expanded(value).absolute()
    if value := os.environ.get("HF_HOME"):
        return expanded(value).absolute() / "hub"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base).absolute() / "huggingface" / "hub"


def can_write(path: Path) -> bool:
    """True if this user may write in `path`, or make it where it is not there yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return os.access(path, os.W_OK | os.X_OK)


def private_dir(path: Path) -> Path:
    """Create `path` (and parents) with mode 0700, and return it. Raises Failed if it cannot be written."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o700)
    except OSError as error:
        raise Failed(
            tr("cannot create {path}: {reason}", path=path, reason=error.strerror),
            hint=tr("set GLMCHAT_HOME to a folder that you can write to"),
            code="home.unwritable",
        ) from None
    return path
