"""Where a quantised copy of an installed model is kept, and what its manifest says. No torch: the face asks too."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glmchat.core import locations
from glmchat.hub.installed import Installed


def copy_folder(row: Installed, bits: int, variant: str = "") -> Path:
    """The folder of the copy with `bits` in the store. variant: settings that differ from the default ("g32-fast")."""
    stem = re.sub(r"[^\w.@+-]", "-", row.name.partition(":")[0]).strip(".-") or "model"
    if row.source == "path":  # two folders of one name are two models
        stem = re.sub(r"[^\w.@+-]", "-", row.path.stem if row.path.is_file() else row.path.name).strip(".-") or "model"
    return locations.models_dir() / f"{stem}-int{bits}{'-' + variant if variant else ''}"


def copy_manifest(row: Installed, bits: int) -> dict[str, Any]:
    """What the store wants to know of the copy; the quantiser adds files, hashes and settings."""
    return {
        "name": f"{row.name}:int{bits}",
        "base": row.name,
        "repo": row.repo,
        "revision": row.revision,
        **({"family": row.family} if row.family else {}),
        "asked": str(row.path),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "parent_files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in row.files],
    }
