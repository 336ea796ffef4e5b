"""A server that is not ours, on a real socket: answers with the bytes it was given."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from glmchat.chat.client.endpoint import Endpoint


def chunk(text: str | None = None, finish: str | None = None, **extra: Any) -> str:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
    return "data: " + json.dumps({"choices": [choice], **extra}, ensure_ascii=False)


@dataclass
class Foreign:
    """A server that answers with the bytes it was given. Requests are recorded as (path, headers, body)."""

    url: str = ""
    parts: list[bytes] = field(default_factory=list)
    silent: bool = False  # after the parts nothing comes, and the connection stays
    status: str = "200 OK"
    kind: str = "text/event-stream"
    headers: dict[str, str] = field(default_factory=dict)
    answer_with: Callable[[str, Any], tuple[str, str, bytes] | None] = lambda path, body: None
    asked: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    lists_models: bool = False
    hung_up: threading.Event = field(default_factory=threading.Event)

    def says(self, text: str | bytes, **how: Any) -> Endpoint:
        self.parts = [text.encode() if isinstance(text, str) else text]
        for name, value in how.items():
            setattr(self, name, value)
        return Endpoint(self.url, model="m")


@contextmanager
def deaf() -> Iterator[str]:
    """The address of a server that makes no connection: its queue is full, and nobody takes anything out of it."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        waiting = [socket.socket() for _ in range(3)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for one in waiting:
            one.close()


@contextmanager
def serving() -> Iterator[Foreign]:
    state = Foreign()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            line = self.rfile.readline().decode().split()
            if not line:
                return
            headers = {}
            while (row := self.rfile.readline().decode("latin-1").strip()) != "":
                name, _, value = row.partition(": ")
                headers[name.lower()] = value
            raw = self.rfile.read(int(headers.get("content-length", 0)))
            body = json.loads(raw) if raw else None
            state.asked.append((line[1], headers, body))
            special = state.answer_with(line[1], body)
            if line[1].endswith("/models") and not state.lists_models:
                special = ("404 Not Found", "application/json", b"{}")
            status, kind, parts = state.status, state.kind, state.parts
            if special:
                status, kind, parts = special[0], special[1], [special[2]]
            extra = "".join(f"{k}: {v}\r\n" for k, v in state.headers.items())
            self.wfile.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}Connection: close\r\n\r\n".encode())
            try:
                for part in parts:
                    self.wfile.write(part)
                    self.wfile.flush()
                if state.silent and not special:
                    self.rfile.read(1)  # until the client hangs up
            except OSError:
                state.hung_up.set()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield state
        server.shutdown()
