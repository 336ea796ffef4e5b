"""What is asked of the terminal itself: its clipboard, and an editor that takes it over for a while."""

from __future__ import annotations

import base64
import errno
import os
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmchat.core import locations
from glmchat.core.errors import Failed, GlmchatError
from glmchat.core.files import read_text
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
                hint=tr("set EDITOR to an editor that is installed"),
                code="editor.missing",
            ) from None
        return read_text(path).rstrip("\n") if code == 0 else None


_TMUX_SECONDS = 2.0  # that a copy waits for it

# xterm takes 100,000 bytes of base64 by default in many builds, hterm and kitty less or more; tmux 1 MB. The smallest
# that is in wide use counts, because a cut clipboard is worse than none.
OSC52_LIMIT = 74_994  # bytes of text: 99,992 of base64


@dataclass(frozen=True, slots=True)
class Copied:
    """What happened. sequence: bytes for the terminal, None if the text is too long for it, or tmux has it already.

    file: None if it cannot be written. far_tmux: a tmux that this is not started in stands between, at the other end of
    SSH; as it comes, it drops what programs want copied.
    """

    characters: int
    sequence: str | None
    file: Path | None
    in_tmux: bool = False
    far_tmux: bool = False

    def words(self) -> str:
        if self.in_tmux:
            return tr("copied {n} characters, into tmux too", n=self.characters)
        if self.far_tmux and self.sequence is not None and self.file is not None:
            return tr(
                "copied {n} characters; a tmux at your end takes them after `set -s set-clipboard on`; here: {file}",
                n=self.characters, file=str(self.file),
            )  # fmt: skip
        if self.sequence is not None and self.file is not None:
            return tr(
                "copied {n} characters; if your terminal ignored it: {file}", n=self.characters, file=str(self.file)
            )
        if self.sequence is not None:
            return tr("copied {n} characters", n=self.characters)
        if self.file is not None:
            return tr("too long for the terminal's clipboard; written to {file}", file=str(self.file))
        return tr("could not copy: too long for the terminal, and the file cannot be written")


def osc52(text: str, environ: Mapping[str, str]) -> str | None:
    """The sequence that sets the clipboard, wrapped for tmux or screen; None if `text` is too long."""
    data = text.encode("utf-8", "replace")
    if len(data) > OSC52_LIMIT:
        return None
    sequence = f"\x1b]52;c;{base64.b64encode(data).decode('ascii')}\x07"
    if environ.get("TMUX"):
        # tmux hands a wrapped sequence to the outer terminal (allow-passthrough) and reads a bare one itself
        # (set-clipboard); which of the two a server allows is unknown, so it gets both.
        return sequence + "\x1bPtmux;" + sequence.replace("\x1b", "\x1b\x1b") + "\x1b\\"
    if environ.get("STY"):
        # GNU screen cuts a device control string after 768 bytes: pieces, each in its own.
        return "".join(f"\x1bP{sequence[i : i + 512]}\x1b\\" for i in range(0, len(sequence), 512))
    return sequence


def _hand_to_tmux(text: str, environ: Mapping[str, str]) -> bool:
    """Into a buffer of the tmux that this runs in, which hands it to the terminal's clipboard.

    As tmux comes, it drops sequences of programs that mean the clipboard (set-clipboard external, allow-passthrough
    off); what it is given by its own command always arrives.
    """
    if not environ.get("TMUX"):
        return False
    try:
        done = subprocess.run(
            ["tmux", "load-buffer", "-w", "-"], input=text.encode("utf-8", "replace"), timeout=_TMUX_SECONDS,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environ, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def clipboard_file() -> Path:
    return locations.state_dir() / "clipboard.txt"


def copy(text: str, environ: Mapping[str, str] | None = None) -> Copied:
    """Prepare a copy; the caller writes `sequence` to its terminal."""
    path: Path | None = clipboard_file()
    try:
        locations.private_dir(locations.state_dir())
        # Without waiting: a pipe in its place has nobody at its other end.
        descriptor = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            file.truncate(0)
            file.write(text)
    except (OSError, GlmchatError):
        path = None
    environ = os.environ if environ is None else environ
    in_tmux = _hand_to_tmux(text, environ)
    far_tmux = environ.get("TERM", "").startswith("tmux") and not environ.get("TMUX")
    return Copied(len(text), None if in_tmux else osc52(text, environ), path, in_tmux, far_tmux)
