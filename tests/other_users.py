"""Commands as other users of this machine, without any of root's rights.

Where the interpreter lies in a folder of root's alone, they get a view of the file system of their own in which that
folder shows nothing but the interpreter (a mount namespace); nothing outside it changes.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GROUP = 20010


def _hidden(paths: list[Path]) -> Path | None:
    """The topmost folder on the way to one of these that others may not pass."""
    ways = (folder for path in paths for folder in [*reversed(path.parents), path])
    return next((folder for folder in ways if not folder.stat().st_mode & stat.S_IXOTH), None)


def as_user(user: int) -> list[str]:
    """What stands before a command so that this user of the group runs it; only root may."""
    number = str(user)
    no_rights = ["--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    become = ["setpriv", "--reuid", number, "--regid", number, "--groups", str(GROUP), *no_rights]
    return [*_own_view(), *become]


def _own_view() -> list[str]:
    needed = [Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), ROOT]
    hidden = _hidden(needed)
    if hidden is None:
        return []
    inside = [str(path) for path in needed if path.is_relative_to(hidden)]
    away = "".join(f'mkdir /mnt/{n} && mount --bind "${n + 1}" /mnt/{n} && ' for n, _ in enumerate(inside, 1))
    back = "".join(f'mkdir -p "${n + 1}" && mount --bind /mnt/{n} "${n + 1}" && ' for n, _ in enumerate(inside, 1))
    cover = 'mount -t tmpfs -o mode=755 tmpfs "$1" && '
    script = f'mount -t tmpfs tmpfs /mnt && {away}{cover}{back}shift {len(inside) + 1} && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, "sh", str(hidden), *inside]


@cache
def why_not() -> str | None:
    """Why no other user can run glmchat here; None if one can."""
    if os.geteuid() != 0:
        return "only root may become other users"
    if shutil.which("setpriv") is None or shutil.which("unshare") is None:
        return "setpriv and unshare (util-linux) are not installed"
    command = [*as_user(20001), sys.executable, "-P", "-c", "import glmchat.core.errors"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"other users cannot run the interpreter: {done.stderr.strip()[-200:]}"
