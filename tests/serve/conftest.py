"""The real server in a thread, over a fake engine, on a real socket."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEngine
from polling import wait_until

from glmchat.core.engine_options import EngineOptions
from glmchat.core.sockets import bind_tcp, bind_unix
from glmchat.serve.run import make_server

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "engine"))  # `import engine_builders`

from running import Running, Serve


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
        fake = engine or FakeEngine()
        more = {name: options.pop(name) for name in ("keep_prompts", "record") if name in options}
        chosen = EngineOptions(tmp_path, options.pop("model", "fake"), **options)
        server = make_server(
            chosen,
            load or (lambda report: fake),
            over_tcp=tcp,
            key=key,
            allow_hosts=("127.0.0.1", *allow_hosts),
            **more,
        )
        path = tmp_path / f"{len(all_running)}.sock"
        listener = bind_tcp("127.0.0.1", 0) if tcp else bind_unix(path)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}" if tcp else "http://localhost"
        thread = threading.Thread(target=server.serve_on, args=(listener,), daemon=True)
        thread.start()
        running = Running(server, None, url, None if tcp else str(path), fake, thread)  # type: ignore[arg-type]
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
