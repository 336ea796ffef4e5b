"""Readers of what comes over a network or from a keyboard: the server, the client, hubs, mirrors, commands."""

from __future__ import annotations

import http.client
import io
import os
import shlex
import socket
import threading
import time
from collections.abc import Generator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import good_inputs as good
from good_inputs import BLOB, COMMIT, as_json
from replying import answer
from trials import Target

_SECONDS = 5.0  # a server of ours that says nothing for so long is one that hangs
_WORDS = (
    b"\r\n",
    b"\r\n\r\n",
    b": ",
    b"HTTP/1.1",
    b"Content-Length: 9999999",
    b"Transfer-Encoding: chunked",
    b"ffffffff\r\n",
)


# The server.


def ask_server(data: bytes, folder: Path) -> None:
    """A body for an address, without a socket: the checks of every field."""
    from glmchat.core.messages import Sampling
    from glmchat.serve import wire

    letter, body = data[:1], wire.parse_json(data[1:])
    if letter == b"p":
        wire.parse_completion(body, {})
        return
    request = wire.parse_chat(body, {})
    assert isinstance(request.sampling, Sampling)


def ask_raw(data: bytes, folder: Path) -> None:
    """Bytes on the socket of a server that runs: any answer but a 500, and the next client is served."""
    address = _server()
    status = _status_of(address, data)
    assert status != 500, "500: a mistake of the server's"
    assert _status_of(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") == 200


def _status_of(address: str, data: bytes) -> int | None:
    """Of the first answer; None where the server hung up without one. Raises TimeoutError where it does nothing."""
    end = time.monotonic() + _SECONDS
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(0.3)
        connection.connect(address)
        with suppress(OSError):
            connection.sendall(data)
        answer = b""
        while len(answer) < 2**20:
            try:
                piece = connection.recv(65536)
            except ConnectionError:
                piece = b""
            except TimeoutError:
                if time.monotonic() > end and not answer:
                    raise
                if not answer:
                    continue
                piece = b""  # kept open for the next request
            if not piece:
                break
            answer += piece
        first = answer[:12].split()
        return int(first[1]) if len(first) == 2 and first[1].isdigit() else None


@cache
def _server() -> str:
    """A server over a fake engine, in a thread of this child."""
    from fakes import FakeEngine
    from polling import wait_until

    from glmchat.core.engine_options import EngineOptions
    from glmchat.core.sockets import bind_unix
    from glmchat.serve.run import PatientProtocol, make_server

    PatientProtocol.seconds = 0.2  # a request that never becomes whole is not worth a minute here
    path = Path("server.sock").absolute()
    server = make_server(EngineOptions(Path.cwd(), "fake"), lambda report: FakeEngine(), over_tcp=False)
    threading.Thread(target=server.serve_on, args=(bind_unix(path),), daemon=True).start()
    health = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    wait_until(lambda: path.exists() and _status_of(str(path), health) == 200)
    return str(path)


# The client.


def read_stream(data: bytes, folder: Path) -> None:
    """An answer, into a conversation that is stored and read again."""
    from speakers import LocalSpeaker

    from glmchat.chat.client.reading import AnswerReader
    from glmchat.chat.history.history import History
    from glmchat.chat.history.transcript import export
    from glmchat.chat.session import ChatSession

    class Speaker(LocalSpeaker):
        def stream(self, *arguments: Any, **options: Any) -> Generator[Any, None, None]:
            reader = AnswerReader(options.get("on_progress"))
            for start in range(0, len(data), 700):
                yield from reader.feed(data[start : start + 700])
                if reader.finished:
                    return
            yield from reader.end()

    with History.open(folder / "history.db") as history:
        chat = ChatSession(history, Speaker())
        list(chat.ask("hello"))
        export(history.load(chat.tree.conversation.id), "json")
        ChatSession(history, Speaker(), chat.tree.conversation.id)


def read_reply(data: bytes, folder: Path) -> None:
    """Whole replies of a server: its list of models, and an answer."""
    from glmchat.chat.client.endpoint import Endpoint
    from glmchat.core.errors import GlmchatError
    from glmchat.core.messages import Message, Sampling

    url = _replying(data)
    for ask in (
        lambda: Endpoint(url).models(),
        lambda: Endpoint(url).health(),
        lambda: list(Endpoint(url, model="m").stream([Message("user", "hi")], Sampling())),
    ):
        with suppress(GlmchatError):
            ask()


class _Replies:
    """A server in a thread that says `data` to whoever comes, and hangs up."""

    def __init__(self) -> None:
        self.data = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self.listener.accept()
            threading.Thread(target=answer, args=(connection, self.data), daemon=True).start()


@cache
def _replies() -> _Replies:
    return _Replies()


def _replying(data: bytes) -> str:
    server = _replies()
    server.data = data
    return f"http://127.0.0.1:{server.listener.getsockname()[1]}"


# Hubs and mirrors.


def read_listing(data: bytes, folder: Path) -> None:
    from dataclasses import replace

    from glmchat.core.errors import GlmchatError
    from glmchat.hub.sources import parse_endpoint, read_listing

    place = parse_endpoint(_replying(data))
    for one in (place, replace(place, kind="modelscope")):
        with suppress(GlmchatError):
            read_listing([one], "a/b", None, wait=lambda why, seconds: None)


def ask_mirror(data: bytes, folder: Path) -> None:
    """A request, or a listing that lies in the mirror's folder."""
    from glmchat.hub.mirror_folder import MARKER, MirrorFolder
    from glmchat.hub.mirror_protocol import FilePart, MirrorProtocol

    root = folder / "mirror"
    home = root / "a--b"
    (home / COMMIT / "deep" / "er").mkdir(parents=True)
    (home / COMMIT / "config.json").write_bytes(b"{}")
    (home / COMMIT / "deep" / "er" / "notes.txt").write_bytes(b"hello")
    (folder / "secret").write_bytes(b"not for you")
    hashed = {"sha256": good.SHA, "git_blob": BLOB, "lfs": False}
    files = [{"path": "config.json", "size": 2, **hashed}, {"path": "deep/er/notes.txt", "size": 5, **hashed}]
    marker, listing, refs = as_json(
        {"format": 1},
        {"format": 1, "repo": "a/b", "commit": COMMIT, "date": "", "source": "", "files": files},
        {"branches": {"main": COMMIT}, "tags": {}},
    )
    requests = [data]
    if data.startswith(b"{"):
        marker, listing, refs = (
            (data, listing, refs)
            if len(data) < 20
            else (marker, data, refs)
            if b"files" in data
            else (marker, listing, data)
        )
        requests = good.mirror_requests()[:8]
    for place, content in ((root / MARKER, marker), (home / f"{COMMIT}.json", listing), (home / "refs.json", refs)):
        place.write_bytes(content)
    protocol = MirrorProtocol(MirrorFolder(root))
    for request in requests:
        head, _, body = request.partition(b"\r\n\r\n")
        first, _, rest = head.partition(b"\r\n")
        words = first.decode("latin-1").split(" ")
        method, target = words[0], words[1] if len(words) > 1 else "/"
        with suppress(http.client.HTTPException, ValueError):
            headers = {n.lower(): v for n, v in http.client.parse_headers(io.BytesIO(rest + b"\r\n\r\n")).items()}
            answer = protocol.answer(method, target, headers, body)
            if isinstance(answer.body, FilePart):
                assert answer.body.path.resolve().is_relative_to(root.resolve()), "a file outside the mirror"


# What a person enters.


def enter_line(data: bytes, folder: Path) -> None:
    """A line of the shell is parsed and not carried out; a slash command acts on a conversation."""
    text = data.decode("utf-8", "surrogateescape")
    if text.startswith("/"):
        _command(text, folder)
    else:
        _parse(text)


def _command(text: str, folder: Path) -> None:
    from noting_face import NotingFace
    from speakers import LocalSpeaker

    from glmchat.chat.commands import table
    from glmchat.chat.history.history import History
    from glmchat.chat.session import ChatSession, ModelIdentity

    kind, name, words = table.parse(text)
    command = table.BY_NAME.get(name)
    if kind != "command" or command is None or command.run is None:
        return
    with History.open(folder / "history.db") as history:
        face = NotingFace(
            ChatSession(history, LocalSpeaker("an ", "answer"), identity=ModelIdentity("m", context=1000))
        )
        list(face.chat.ask("hello"))
        here = Path.cwd()
        os.chdir(folder)  # where /export writes
        try:
            command.run(face, words)
        finally:
            os.chdir(here)


def _parse(text: str) -> None:
    import typer
    from typer.core import TyperGroup

    from glmchat.chat.compare.columns import parse_columns
    from glmchat.cli.main import build
    from glmchat.core.errors import GlmchatError
    from glmchat.hub.references import parse

    try:
        words = shlex.split(text)
    except ValueError:
        words = text.split()
    words = [word.replace("\0", "") for word in words]  # no shell hands on such a byte
    for word in words[:4]:
        for read in (parse, lambda text: parse_columns([text])):
            with suppress(GlmchatError):
                read(word)
    command: Any = typer.main.get_command(build())
    try:
        while isinstance(command, TyperGroup) and words:
            command = command.get_command(typer.Context(command), words.pop(0))
        if command is not None:
            command.make_context("glmchat", words)
    except (typer.TyperException, typer.Exit, typer.Abort):
        pass


_SERVER = ("glmchat.serve.run", "glmchat.serve.wire", "fakes")
_CLIENT = ("glmchat.chat.session", "glmchat.chat.client.endpoint", "speakers")
_HUB = ("huggingface_hub.hf_api", "glmchat.hub.sources", "glmchat.hub.mirror_protocol")
TARGETS = (
    Target("wire", good.requests, ask_server, modules=_SERVER),
    Target("http", good.raw_requests, ask_raw, _WORDS, modules=_SERVER),
    Target("sse", good.streams, read_stream, (b"data: ", b"\n\n", b"[DONE]", b": glmchat "), modules=_CLIENT),
    Target("reply", good.replies, read_reply, _WORDS, modules=_CLIENT),
    Target("hub", good.listings, read_listing, (*_WORDS, b"Content-Encoding: gzip\r\n", b"Location: /"), modules=_HUB),
    Target("mirror", good.mirror_requests, ask_mirror, (b"/../", b"%2e%2e/", b"%00", b"//", b"Range: bytes=-1\r\n"),
           modules=_HUB),
    Target("lines", good.lines, enter_line, (b"--", b" -n ", b":int4", b"+", b"@", b"/", b"~", b"$HOME", b"=", b"'"),
           modules=_CLIENT),
)  # fmt: skip
