"""Servers on loopback that say what they were told to whoever comes, for ever if that was told.

Each client has a thread, so that one who says nothing keeps none waiting.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Replying:
    """`serves(reply, forever)` -> an address. Use as a context: all end with it."""

    def __enter__(self) -> Replying:
        self._listeners: list[socket.socket] = []
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def serves(self, reply: bytes, forever: bytes = b"") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        threading.Thread(target=_accept, args=(listener, reply, forever), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, reply: bytes, forever: bytes) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(connection, reply, forever), daemon=True).start()


def answer(connection: socket.socket, reply: bytes, forever: bytes = b"") -> None:
    """Read one request whole, say the reply, and go."""
    with connection, suppress(OSError):
        connection.settimeout(20)
        asked = bytearray()
        while b"\r\n\r\n" not in asked and (piece := connection.recv(65536)):
            asked += piece
        head, _, body = bytes(asked).partition(b"\r\n\r\n")
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                while len(body) < int(line[15:]) and (piece := connection.recv(65536)):
                    body += piece
        connection.sendall(reply)
        while forever:
            connection.sendall(forever)
