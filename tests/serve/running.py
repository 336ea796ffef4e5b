"""A server that runs in a thread, as tests hold it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx2
from fakes import FakeEngine

from glmchat.serve.host import Host
from glmchat.serve.run import Server

QUESTION = {"messages": [{"role": "user", "content": "hi"}]}


@dataclass
class Running:
    server: Server
    client: httpx2.Client
    url: str
    uds: str | None
    engine: FakeEngine  # that answers, unless the test brought a load of its own
    thread: threading.Thread
    clients: list[httpx2.Client] = field(default_factory=list)

    @property
    def host(self) -> Host:
        return self.server.engine_host

    def another(self) -> httpx2.Client:
        """A client with a connection of its own."""
        transport = httpx2.HTTPTransport(uds=self.uds) if self.uds else None
        client = httpx2.Client(base_url=self.url, transport=transport, timeout=300, trust_env=False)
        self.clients.append(client)
        return client

    def ask(self, **fields: Any) -> httpx2.Response:
        return self.client.post("/v1/chat/completions", json={**QUESTION, **fields})


Serve = Callable[..., Running]
