"""Where the engine listens: nobody else gets in, and nothing is taken from others.

Covers core/sockets.py.
"""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from glmchat.core import sockets
from glmchat.core.errors import Failed, Hostile


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="rt"))  # pytest's own are too deep for a socket
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_the_socket_is_0600_in_a_folder_of_0700_whatever_the_umask(runtime: Path) -> None:
    before = os.umask(0)
    try:
        path = sockets.new_socket_path()
        with sockets.bind_unix(path):
            assert mode(path) == 0o600 and stat.S_ISSOCK(path.lstat().st_mode)
        assert os.umask(0) == 0, "the caller's umask is as it was"
    finally:
        os.umask(before)
    assert path.parent == runtime / "glmchat" and mode(path.parent) == 0o700
    assert len(os.fsencode(path)) < 100


def test_the_path_is_there_only_once_the_socket_listens(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits for the path and connects would be refused otherwise, and httpcore leaves such a socket open."""
    path, seen = sockets.new_socket_path(), []

    class Watched(socket.socket):
        def listen(self, *backlog: int) -> None:
            seen.append(path.exists())
            super().listen(*backlog)

    monkeypatch.setattr(socket, "socket", Watched)
    with sockets.bind_unix(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    assert seen == [False] and [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_open_folder_of_ones_own_is_closed(runtime: Path) -> None:
    (runtime / "glmchat").mkdir()
    (runtime / "glmchat").chmod(0o777)
    assert mode(sockets.socket_dir()) == 0o700


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_refused(runtime: Path) -> None:
    (runtime / "glmchat").mkdir()
    os.chown(runtime / "glmchat", 12345, 12345)
    with pytest.raises(Hostile, match="someone else") as refused:
        sockets.new_socket_path()
    assert refused.value.exit == 3 and "12345" in str(refused.value) and refused.value.hint


def test_a_link_to_another_folder_is_refused(runtime: Path, tmp_path: Path) -> None:
    (runtime / "glmchat").symlink_to(tmp_path)
    with pytest.raises(Hostile):
        sockets.socket_dir()


def test_a_file_in_the_folders_place_is_told(runtime: Path) -> None:
    (runtime / "glmchat").write_text("")
    with pytest.raises(Failed, match="cannot create"):
        sockets.socket_dir()


@pytest.mark.parametrize("given", [None, "/nonexistent/folder", "/" + "x" * 90])
def test_without_a_usable_runtime_folder_a_private_one_in_the_temporary_directory_serves(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    temporary = tempfile.mkdtemp(prefix="t")
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if given:
        monkeypatch.setenv("XDG_RUNTIME_DIR", given)
    assert sockets.socket_dir() == Path(temporary) / f"glmchat-{os.getuid()}"
    assert mode(sockets.socket_dir()) == 0o700


def test_a_very_deep_temporary_directory_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert len(os.fsencode(sockets.new_socket_path())) < 100


def test_sockets_of_the_dead_are_swept_and_those_of_the_living_stay(runtime: Path) -> None:
    folder = sockets.socket_dir()
    dead = folder / "999999999-aaaa.sock"
    answering = folder / "999999998-bbbb.sock"
    ours = folder / f"{os.getpid()}-cccc.sock"
    sockets.bind_unix(dead).close()
    sockets.bind_unix(ours).close()
    with sockets.bind_unix(answering):
        sockets.new_socket_path()
        assert not dead.exists() and answering.exists() and ours.exists()


def test_a_taken_path_is_told(runtime: Path) -> None:
    path = sockets.new_socket_path()
    with sockets.bind_unix(path), pytest.raises(Failed, match="cannot listen"):
        sockets.bind_unix(path)


def test_a_port_in_use_is_one_line_with_a_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failed, match=f"port {port} is in use") as refused:
            sockets.bind_tcp("127.0.0.1", port)
    assert "--port" in refused.value.hint and refused.value.exit == 1


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 80), ("127.0.0.1", 70000), ("8.8.8.8", 0)])
def test_an_address_that_is_not_ours_is_told(host: str, port: int) -> None:
    with pytest.raises(Failed) as refused:
        sockets.bind_tcp(host, port)
    assert refused.value.hint
