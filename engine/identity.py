"""What exactly answers: hashes of weights, settings and template, and the versions that compute."""

from __future__ import annotations

import platform
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from glmchat import __version__
from glmchat.core.fingerprints import FilePrint, fingerprint, of_text

_WEIGHTS = (".safetensors", ".bin", ".gguf")
_SETTINGS = (".json", ".model", ".txt", ".jinja", ".vocab")
_NOT_SETTINGS = ("glmchat.json", "README", "LICENSE")
_LARGEST_SETTING = 64 * 2**20  # bytes


class Identity:
    """The facts of one loaded engine that do not change. Its files are hashed in a thread: nobody waits for that."""

    def __init__(self, path: Path, template: str | None, asked_dtype: str | None) -> None:
        self._path = path
        self._facts: dict[str, Any] = {
            "versions": versions(),
            "template": template,
            "asked_dtype": asked_dtype,
            "weights": None,
            "settings": None,
        }
        self._thread = threading.Thread(target=self._hash, name="identity", daemon=True)
        self._thread.start()

    @property
    def complete(self) -> bool:
        """The files have been hashed, or could not be."""
        return not self._thread.is_alive()

    def facts(self) -> Mapping[str, Any]:
        """What is known by now: "weights" and "settings" are None until the files have been hashed."""
        return self._facts

    def _hash(self) -> None:
        with suppress(OSError):  # a folder that was taken away under the running engine: what is not known is not told
            weights = weights_json(fingerprint(weight_files(self._path)))
            self._facts = {**self._facts, "weights": weights, "settings": settings_of(self._path)}


def versions() -> dict[str, str]:
    return {
        "glmchat": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def weight_files(path: Path) -> list[Path]:
    """The files that the weights of a checkpoint are read from."""
    if path.is_file():
        return [path]
    for suffix in _WEIGHTS:
        if files := sorted(p for p in path.iterdir() if p.suffix == suffix and p.is_file()):
            return files
    return []


def weights_json(prints: tuple[FilePrint, ...]) -> dict[str, Any]:
    """One hash for all files together, and each of them, so that a replay can name the one that changed."""
    together = of_text("\n".join(f"{p.name} {p.size} {p.digest}" for p in prints))
    return {"hash": together, "files": [p.to_json() for p in prints]}


def settings_of(path: Path) -> dict[str, str]:
    """File name -> beginning of its sha256, for config, tokenizer and template files beside the weights."""
    if path.is_file():
        return {}  # a GGUF file holds its own
    files = [
        p
        for p in sorted(path.iterdir())
        if p.suffix in _SETTINGS
        and p.is_file()
        and not p.name.startswith(_NOT_SETTINGS)
        and not p.name.endswith(".index.json")
        and p.stat().st_size <= _LARGEST_SETTING
    ]
    return {p.name: p.digest.partition(":")[2][:16] for p in fingerprint(files)}
