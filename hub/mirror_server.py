"""`glmchat mirror serve`: a mirror folder on a socket, for every client that knows HF_ENDPOINT.

On the standard library and not on an ASGI stack: it sends large files, which `sendfile` does without Python seeing the
bytes; a thread per connection is enough for a rack; and hub stays free of the engine's web framework. Connections are
bounded, idle ones closed, bodies limited. No key: it serves what a public hub serves, and nothing can be written.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any

from glmchat import __version__
from glmchat.core.errors import Failed, Usage
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.text import human_bytes, one_line
from glmchat.hub.mirror_folder import MirrorFolder
from glmchat.hub.mirror_protocol import FilePart, HttpAnswer, MirrorProtocol

DEFAULT_PORT = 8090
_CONNECTIONS = 64
_IDLE = 30.0  # seconds a client may be silent, also between two requests
_MAX_BODY = 4_000_000  # bytes; paths-info with 20,000 names is less
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 2\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class MirrorServer(ThreadingMixIn, TCPServer):
    """Listens from construction on; `serve_forever` answers, `shutdown` ends it. Raises Usage, Failed."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.protocol = MirrorProtocol(MirrorFolder(folder))
        self.log = log or (lambda _: None)
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        try:
            self.address_family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            super().__init__((str(address[0]), int(address[1])), _Handler)
        except (socket.gaierror, OverflowError):
            raise Usage(
                tr("cannot listen on {address}", address=f"{one_line(host)}:{port}"),
                hint=tr("give an address of this machine, for example --host 0.0.0.0"),
                code="mirror.address",
            ) from None
        except OSError as error:
            raise Failed(
                tr("cannot listen on {address}", address=f"{one_line(host)}:{port}") + f": {error.strerror}",
                hint=tr("choose another one with --port"),
                code="mirror.port",
            ) from None

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
            return
        with contextlib.suppress(OSError):
            request.settimeout(0.5)
            request.sendall(_BUSY)
        self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        problem = sys.exc_info()[1]
        if not isinstance(problem, ConnectionError | TimeoutError):  # a client that goes away is no news
            self.log(one_line(f"{client_address[0]}: {type(problem).__name__}: {problem}"))


class _Handler(BaseHTTPRequestHandler):
    server: MirrorServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = f"glmchat/{__version__}", ""
    timeout = _IDLE

    def do_GET(self) -> None:
        self._answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdecimal() or len(length) > 9 or int(length) > _MAX_BODY:
            self.close_connection = True  # what follows on this connection cannot be told apart from a request
            self._send(
                HttpAnswer(413 if length.isdecimal() else 411, {"Content-Type": "text/plain"}, b"no such request\n")
            )
            return
        self._answer(self.rfile.read(int(length)))

    def _answer(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.command != "POST" and headers.get("content-length", "0") != "0":
            self.close_connection = True
        self._send(self.server.protocol.answer(self.command, self.path, headers, body))

    def _send(self, answer: HttpAnswer) -> None:
        body = answer.body
        length = answer.length
        if length is None:
            length = body.count if isinstance(body, FilePart) else len(body)
        if isinstance(body, FilePart):
            with open_file(body.path) as file:  # opened before the first header: an unreadable file is no half answer
                self._head(answer, length)
                if self.connection.sendfile(file, body.start, body.count) < body.count:
                    self.close_connection = True  # the file shrank meanwhile: a short answer must end the connection
        else:
            self._head(answer, length)
            if self.command != "HEAD":
                self.wfile.write(body)
        size = f" {human_bytes(length)}" if isinstance(body, FilePart) else ""
        self.server.log(one_line(f"{self.client_address[0]} {self.command} {self.path} {answer.status}{size}", 300))

    def _head(self, answer: HttpAnswer, length: int) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.status != 304:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """http.server's own lines go to the same place, not to stderr."""
        self.server.log(one_line(f"{self.client_address[0]} {format % args}", 300))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """`_send` writes the line, with what was sent."""
