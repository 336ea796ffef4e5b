"""The server as a program: its socket, the pipe that ends it, and how long a client may take to say a request.

uvicorn limits the silence between two requests, and nothing else: a client that opens connections and says nothing, or
a byte a minute, holds them for ever, key or no key. And it hangs up on a client that closes its half of the connection
when it has asked.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from glmchat.core import locations
from glmchat.core.engine_options import EngineOptions
from glmchat.core.engine_records import EngineRecord
from glmchat.core.job_control import wake_when_orphaned
from glmchat.core.sockets import bind_unix
from glmchat.serve.app import build_app
from glmchat.serve.face import Load
from glmchat.serve.guard import own_names
from glmchat.serve.host import WAITING, Host
from glmchat.serve.leases import Leases


class PatientProtocol(H11Protocol):
    """uvicorn's protocol, which hangs up on a request that is not whole in `seconds`, and on a client that reads
    nothing of its answer for `stalled`. An answer may take any time.

    Of the connections that are not being answered `most` are kept: who opens one more takes the place of the one that
    was opened first, not of a client that works.
    """

    seconds: ClassVar[float] = 60.0
    stalled: ClassVar[float] = 600.0
    most: ClassVar[int] = 256
    _open: ClassVar[dict[PatientProtocol, None]] = {}  # in the order in which they came
    _limit: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._open[self] = None
        mine = [one for one in self._open if one.server_state is self.server_state]
        at_rest = [one for one in mine if one.conn.their_state is h11.SEND_BODY or not one.is_answering]
        if len(at_rest) > self.most:
            del self._open[at_rest[0]]
            at_rest[0].transport.abort()
        self._wait_for_request()

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.stalled, self.transport.abort)

    def resume_writing(self) -> None:
        self._read_again()
        super().resume_writing()

    def _read_again(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open.pop(self, None)
        self._read_again()
        self._stop_waiting()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """A client may close its half of the connection behind its request, and wait for the answer (nc, socat).

        One that has gone altogether looks the same until something is sent to it. So something is sent that says
        nothing, at once and again, until the answer is complete; who has gone answers that with a reset.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or self.conn.their_http_version == b"1.0":
            return False  # nothing is owed, or nothing can be sent
        if self.conn.their_state is h11.SEND_BODY:
            return False  # half a request, and the rest can never come
        cycle.keep_alive = False
        self._sound_out(cycle, 0.05)
        return True

    def _sound_out(self, cycle: RequestResponseCycle, again: float) -> None:
        if cycle.response_complete or cycle.disconnected or self.transport.is_closing():
            return
        if not cycle.response_started:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
        elif data := self.conn.send(h11.Data(data=b": \n\n")):  # only a stream of events takes its time
            self.transport.write(data)
        self.loop.call_later(again, self._sound_out, cycle, 1.0)

    def _wait_for_request(self) -> None:
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_waiting()
        elif self._limit is None and self.timeout_keep_alive_task is None:
            self._limit = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._limit is not None:
            self._limit.cancel()
            self._limit = None


END_OF_LIFELINE = 0
LAST_SECONDS = 1.0  # for caches that are still to be written when the window has gone; then it waits no more


def watch_lifeline(descriptor: int = 0, at_end: Callable[[], None] = lambda: None) -> None:
    """End this process, at once and whatever it is doing, when the other end of the pipe is gone.

    The face holds the writing end, and the kernel closes it however the face dies. `os._exit`, because a Python exit
    would wait for the thread that computes.
    """

    def wait() -> None:
        with suppress(OSError):
            while os.read(descriptor, 4096):
                pass
        at_end()
        os._exit(END_OF_LIFELINE)

    wake_when_orphaned()
    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def store_adapter(name: str) -> Path | None:
    """The folder of an adapter in the store, by its plain name. What a request says is compared, never made a path."""
    try:
        entries = [entry for entry in os.scandir(locations.adapters_dir()) if entry.name == name and entry.is_dir()]
    except OSError:  # there is no store
        return None
    return Path(entries[0].path) if entries and not name.startswith(".") else None


class Server(uvicorn.Server):
    """uvicorn's server with the engine behind it. A signal first asks the engine to end its answer."""

    def __init__(self, config: uvicorn.Config, host: Host, leases: Leases | None = None) -> None:
        super().__init__(config)
        self.engine_host = host
        self._leases = leases

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; True ends."""
        ends = await super().on_tick(counter)
        if self._leases is not None and (ends or self._leases.over()):
            self._leases.close()
            return True
        return ends

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.engine_host.stopping.set()
        super().handle_exit(sig, frame)

    def stop(self) -> None:
        """End from another thread, as a signal would."""
        self.engine_host.stopping.set()
        self.should_exit = True

    def serve_on(self, listener: socket.socket) -> None:
        """Load, and answer meanwhile, until a signal or `stop` says to end. Returns when all is down."""
        self.engine_host.start()
        if threading.current_thread() is threading.main_thread():
            # uvicorn ends in order on SIGTERM and then raises it again, which would skip what comes after.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            self.run(sockets=[listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again once everything is down
            logging.getLogger("glmchat.serve").info("stopped by a signal")
        finally:
            self.engine_host.stop()
            listener.close()


def make_server(
    options: EngineOptions,
    load: Load,
    *,
    over_tcp: bool,
    key: str | None = None,
    allow_hosts: tuple[str, ...] = (),
    record: EngineRecord | None = None,
    waiting: int = WAITING,
    keep_prompts: bool = False,
) -> Server:
    """A server that has not begun yet. `serve_on` begins.

    over_tcp: Host headers are checked. key: asked of every request; None asks for none (a Unix socket, or loopback by
    the user's own wish). allow_hosts: the address it listens at, and names by which clients may call this machine.
    record: of an engine that several programs share. waiting: how many may wait before others are told to come back.
    keep_prompts: caches of what clients ask may lie on the disk.
    """
    host = Host(
        load,
        options.model or options.require_folder().name,
        revision=options.revision,
        quant=options.quant_label,
        adapters=dict(options.adapters),
        find_adapter=store_adapter,
        sampling=options.sampling,
        waiting=waiting,
        keep_prompts=keep_prompts,
    )
    leases = Leases(host, record) if record is not None and record.shared else None
    names = own_names(allow_hosts) if over_tcp else None
    config = uvicorn.Config(
        build_app(host, key=key, hosts=names, leases=leases),
        log_config=None,
        access_log=False,
        server_header=False,
        http=PatientProtocol,
        ws="none",
        loop="asyncio",
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
    )
    return Server(config, host, leases)


def main(arguments: list[str], load_with: Callable[[EngineOptions], Load]) -> int:
    """A face's child: `python -P -m glmchat.serve …`. Its log is stderr, which the face has pointed at a file."""
    parser = argparse.ArgumentParser(prog="python -m glmchat.serve", allow_abbrev=False)
    parser.add_argument("--uds", type=Path, required=True, help="the Unix socket; for TCP there is `glmchat serve`")
    parser.add_argument("--lifeline", action="store_true", help="end when stdin does")
    parser.add_argument("--shared", default="", metavar="KEY", help="what must agree for others to join")
    parser.add_argument("--log", default="", help="where stderr goes, for whoever asks")
    own, rest = parser.parse_known_args(arguments)
    options = EngineOptions.from_arguments(rest)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    listener = bind_unix(own.uds)  # before any thread exists: umask belongs to the whole process
    record = EngineRecord(
        socket=str(own.uds), pid=os.getpid(), key=own.shared, model=options.model or "",
        folder=str(options.folder or ""), quant=options.quant_label,
        device=options.device, context=options.context, started=time.time(), keep_alive=options.keep_alive,
        starter=os.getppid(), log=own.log,
    )  # fmt: skip
    record.write()
    server = make_server(options, load_with(options), over_tcp=False, record=record)

    def at_end() -> None:
        with suppress(Exception):
            server.engine_host.left(LAST_SECONDS)
        record.forget()

    if own.lifeline:
        watch_lifeline(at_end=at_end)
    try:
        server.serve_on(listener)
    finally:
        record.forget()
    logging.shutdown()
    return 0
