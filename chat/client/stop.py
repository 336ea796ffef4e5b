"""Stopping an answer from another thread."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from typing import Any


class Stop:
    """Stops one answer from any thread, also while nothing comes: the socket is shut down under the reader.

    Use it once. `stream` then ends with `Finished(finish_reason="cancelled")`.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = False
        self._socket: socket.socket | None = None

    @property
    def wanted(self) -> bool:
        return self._wanted

    def now(self) -> None:
        with self._lock:
            self._wanted = True
            self._shut()

    def watch(self, event: str, info: Mapping[str, Any]) -> None:
        """httpcore's trace hook: remembers the socket as soon as there is one."""
        # TLS wraps the socket in another one, and a proxy may do so twice: the last one is the one that is read.
        if event.endswith((".connect_tcp.complete", ".connect_unix_socket.complete", ".start_tls.complete")):
            found = info["return_value"].get_extra_info("socket")
            with self._lock:
                self._socket = found
                if self._wanted:
                    self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # an SSLSocket's own would talk TLS first
