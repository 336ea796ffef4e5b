"""The prompt in the user's own editor."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Failed
from glmchat.core.language import tr


def edit(text: str) -> str | None:
    """Open $VISUAL, $EDITOR or vi on `text`; what was saved, or None if it failed. Raises Failed without an editor."""
    command = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
    folder = locations.private_dir(locations.state_dir())
    with tempfile.TemporaryDirectory(dir=folder) as private:
        path = Path(private) / "prompt.md"
        path.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*command, str(path)], check=False).returncode
        except OSError as error:
            raise Failed(
                tr("the editor {name} cannot be started: {reason}", name=command[0], reason=str(error.strerror)),
                hint=tr("set EDITOR to one that is installed"),
                code="editor.missing",
            ) from None
        return path.read_text(encoding="utf-8").rstrip("\n") if code == 0 else None
