"""The real server in a thread, over a fake engine, on a real socket."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fakes import FakeEngine
from polling import wait_until

from glmchat.core.engine_options import EngineOptions
from glmchat.core.sockets import bind_tcp, bind_unix
from glmchat.serve.host import Host
from glmchat.serve.run import Server, make_server

QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Running:
    server: Server
    client: httpx2.Client
    url: str
    uds: str | None
    engine: FakeEngine | None
    thread: threading.Thread
    clients: list[httpx2.Client] = field(default_factory=list)

    @property
    def host(self) -> Host:
        return self.server.engine_host

    def another(self) -> httpx2.Client:
        """A client with a connection of its own."""
        transport = httpx2.HTTPTransport(uds=self.uds) if self.uds else None
        client = httpx2.Client(base_url=self.url, transport=transport, timeout=20, trust_env=False)
        self.clients.append(client)
        return client

    def ask(self, **fields: Any) -> httpx2.Response:
        return self.client.post("/v1/chat/completions", json={**QUESTION, **fields})


Serve = Callable[..., Running]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(engine) or serve(load=…): over a Unix socket, or with tcp=True over loopback with a key."""
    all_running: list[Running] = []

    def start(
        engine: FakeEngine | None = None,
        *,
        load: Any = None,
        tcp: bool = False,
        key: str | None = None,
        allow_hosts: tuple[str, ...] = (),
        **options: Any,
    ) -> Running:
        engine = engine or (None if load else FakeEngine())
        chosen = EngineOptions(tmp_path, options.pop("model", "fake"), **options)
        server = make_server(
            chosen, load or (lambda report: engine), over_tcp=tcp, key=key, allow_hosts=("127.0.0.1", *allow_hosts)
        )
        path = tmp_path / f"{len(all_running)}.sock"
        listener = bind_tcp("127.0.0.1", 0) if tcp else bind_unix(path)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}" if tcp else "http://localhost"
        thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
        thread.start()
        running = Running(server, None, url, None if tcp else str(path), engine, thread)  # type: ignore[arg-type]
        running.client = running.another()
        all_running.append(running)
        if load is None:
            wait_until(lambda: running.client.get("/health", headers=_key(key)).status_code != 503)
        return running

    yield start
    for running in all_running:
        for client in running.clients:
            client.close()
        running.server.stop()
        running.thread.join(10)
        assert not running.thread.is_alive(), "the server did not end"


def _key(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}
