"""Where the engine listens: a private Unix socket, made so that nobody else on the machine can reach it.

uvicorn's own `uds=` leaves the socket open to everybody (0666), so glmchat binds it itself under umask 0177, inside a
folder of mode 0700 that belongs to the user.
"""

from __future__ import annotations

import errno
import os
import secrets
import socket
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from glmchat.core.errors import Failed, Hostile
from glmchat.core.language import tr
from glmchat.core.text import one_line

PATH_LIMIT = 100  # sun_path holds 108 bytes on Linux, 104 on macOS


def socket_dir() -> Path:
    """The private folder of sockets, created if need be, its owner and mode checked.

    `$XDG_RUNTIME_DIR/glmchat`, or `glmchat-<uid>` in the temporary directory where that is not set or not there.
    Raises Hostile if the folder is somebody else's, is a link, or lets others in and cannot be closed.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and len(os.fsencode(runtime)) <= PATH_LIMIT - 40 and _is_mine(Path(runtime)):
        folder = Path(runtime) / "glmchat"
    else:
        folder = Path(tempfile.gettempdir()) / f"glmchat-{os.getuid()}"
        if len(os.fsencode(folder)) > PATH_LIMIT - 32:  # macOS hides TMPDIR deep in /var/folders; /tmp is sticky
            folder = Path("/tmp") / f"glmchat-{os.getuid()}"  # noqa: S108 (owner and mode are checked below)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        raise Failed(
            tr("cannot create {folder}: {strerror}", folder=one_line(str(folder)), strerror=error.strerror),
            hint=tr("set XDG_RUNTIME_DIR to a folder of your own"),
            code="socket.folder",
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise Hostile(
            tr(
                "{folder} is owned by someone else (user {st_uid}), who could listen in",
                folder=one_line(str(folder)),
                st_uid=status.st_uid,
            ),
            hint=tr("have it removed, or set XDG_RUNTIME_DIR to a folder of your own"),
            code="socket.folder_owner",
        )
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _is_mine(folder: Path) -> bool:
    try:
        return folder.is_dir() and folder.stat().st_uid == os.getuid()
    except OSError:
        return False


def new_socket_path() -> Path:
    """A path for one engine's socket, short enough for every system. Sockets of dead engines are swept away."""
    folder = socket_dir()
    sweep(folder)
    path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.sock"
    if len(os.fsencode(path)) >= PATH_LIMIT:
        raise Failed(
            tr("the path of the engine's socket is too long: {path}", path=one_line(str(path))),
            hint=tr("set XDG_RUNTIME_DIR to a folder of your own with a shorter path"),
            code="socket.path_length",
        )
    return path


def sweep(folder: Path) -> None:
    """Remove what processes killed with -9 left behind: the starting process is gone and nobody listens."""
    for path in folder.glob("*-*.sock"):
        starter = path.name.partition("-")[0]
        if starter.isdecimal() and not _alive(int(starter)) and not listens(path):
            with suppress(FileNotFoundError, PermissionError):
                path.unlink()
            with suppress(FileNotFoundError, PermissionError):
                path.with_suffix(".json").unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def listens(path: Path) -> bool:
    """Does anybody listen at this socket? The kernel says so even when the listener is busy."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket of mode 0600 at `path`. Call it before the process has other threads: umask is global.

    The path is there only once it listens: who waits for it is never refused. Raises Failed if it is taken or cannot be
    written.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    early = path.with_name(f"{path.stem}~{path.suffix}")  # `sweep` finds it too
    before = os.umask(0o177)
    try:
        if path.exists():
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener.bind(str(early))
        listener.listen(64)
        early.rename(path)
    except OSError as error:
        listener.close()
        early.unlink(missing_ok=True)
        raise Failed(
            tr("cannot listen at {path}: {strerror}", path=one_line(str(path)), strerror=error.strerror or error),
            hint=tr("is another engine using it? if not, set XDG_RUNTIME_DIR to a folder of your own"),
            code="socket.bind",
        ) from None
    finally:
        os.umask(before)
    return listener


def bind_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Port 0 takes any free one. Raises Failed (exit 1) that names what is in the way."""
    if not 0 <= port <= 65535:
        raise _tcp_words(host, port, OSError(0, "there is no such port"))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise Failed(
            tr("{host!r} is not an address of this machine", host=one_line(host)),
            hint=tr("--host 127.0.0.1 for this machine only, --host 0.0.0.0 for everyone on the network"),
            code="serve.host",
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise _tcp_words(host, port, error) from None
    return listener


def _tcp_words(host: str, port: int, error: Exception) -> Failed:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return Failed(
            tr("port {port} is in use", port=port),
            hint=tr(
                "choose another one: --port {port}, or --port 0 for any free one",
                port=port + 1 if port < 65535 else 8001,
            ),
            code="serve.port_in_use",
        )
    if number == errno.EACCES:
        return Failed(
            tr("only root may open port {port}", port=port),
            hint=tr("choose one above 1023: --port 8000"),
            code="serve.port",
        )
    return Failed(
        tr(
            "cannot listen at {host}:{port}: {error}",
            host=one_line(host),
            port=port,
            error=getattr(error, "strerror", None) or error,
        ),
        hint=tr("--host 127.0.0.1 and a port between 1 and 65535"),
        code="serve.host",
    )
