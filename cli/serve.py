"""`glmchat serve`: the model behind the OpenAI API, for other programs and other machines."""

from __future__ import annotations

import ctypes
import os
import secrets
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmchat.cli import output
from glmchat.cli.completion import complete_installed
from glmchat.cli.engine_flags import EngineFlags, with_engine_flags
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.serve.run import Server


def register(app: typer.Typer) -> None:
    app.command("serve")(with_engine_flags(serve, without=("keep_alive",)))


def serve(
    *,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A model on this machine.", autocompletion=complete_installed)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 picks a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The key clients must send; else $GLMCHAT_API_KEY, else a new one."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Loopback only: every user of this machine can use the model.")
    ] = False,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A name by which clients call this machine; repeatable.")
    ] = None,
    queue: Annotated[int, typer.Option(min=0, max=10_000, help="Requests that may wait; others get 429.")] = 8,
    keep_prompts: Annotated[
        bool,
        typer.Option(
            "--keep-prompts", help="Keep the caches of what clients ask on the disk, so that it is read once."
        ),
    ] = False,
    engine: EngineFlags,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on stdout.")] = False,
) -> None:
    """Serve a model behind the OpenAI API (/v1/chat/completions and the rest) until Ctrl-C."""
    from glmchat.chat.engine_process import engine_environment
    from glmchat.core.sockets import bind_tcp

    key, is_new = choose_key(host, api_key_file, no_key=no_api_key)
    options = _options(name, engine)
    options = options if keep_prompts else replace(options, kv_cache=0)
    listener = bind_tcp(host, port)  # before anything is loaded, so that a port in use is told at once
    os.environ.update(engine_environment())  # before torch is imported, which reads it once

    from glmchat.serve.face import engine_loader
    from glmchat.serve.run import make_server

    names = (host, *(allow_host or ()))
    load = engine_loader(options, "serve")
    server = make_server(
        options,
        load,
        over_tcp=True,
        key=key,
        allow_hosts=names,
        waiting=queue,
        keep_prompts=keep_prompts,
    )
    url = _url(host, listener.getsockname()[1])
    output.say(tr("{model} at {url}", model=one_line(options.model or ""), url=url))
    if is_new:
        output.say(tr("key (shown only now): {key}", key=key))
    if key is None:
        output.say(tr("no key: every user and every program on this machine can use the model and fill its memory"))
    if as_json:
        output.json_line({"event": "listening", "url": url, "model": options.model, "key_needed": key is not None})
    threading.Thread(target=_tell, args=(server, as_json), daemon=True).start()
    _end_with_words()
    server.serve_on(listener)
    if (error := server.engine_host.error) is not None:
        raise error


def _end_with_words() -> None:
    """Where the file behind mapped weights is cut, this process cannot go on: the engine's is this one. It says why."""
    from glmchat.chat.engine_process import bus_error

    error = bus_error()
    words = f"glmchat: {error.message}\n  {tr('hint')}: {error.hint}\n".encode()

    def end(number: int) -> None:
        os.write(2, words)
        os._exit(error.exit)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    # Python's own handlers run between two of its instructions, and here there will be no next one.
    ctypes.CDLL(None).signal(signal.SIGBUS, handler)
    _HANDLERS.append(handler)


_HANDLERS: list[object] = []  # what C calls must live as long as the process


def choose_key(host: str, file: Path | None, *, no_key: bool) -> tuple[str | None, bool]:
    """The key, and whether it was made just now. Raises Usage for --no-api-key off loopback and for a bad key."""
    from glmchat.core.http import is_loopback
    from glmchat.core.servers import read_key

    if no_key:
        if file is not None:
            raise Usage(
                tr("--no-api-key and --api-key-file conflict"),
                hint=tr("give one of them"),
                code="usage.contradiction",
            )
        # The unspecified address counts as loopback for a client, but a server there listens everywhere.
        if not is_loopback(host) or host.strip("[]") in ("", "0.0.0.0", "::", "0"):  # noqa: S104
            raise Usage(
                tr(
                    "without a key the server may only listen on this machine, and {host} is open to others",
                    host=one_line(host),
                ),
                hint=tr("leave out --no-api-key: a key is generated and shown"),
                code="serve.no_key",
            )
        return None, False
    key = read_key(file, os.environ.get("GLMCHAT_API_KEY"))
    if key is None:
        return "glmchat-" + secrets.token_urlsafe(24), True
    if not key.isascii() or not key.isprintable() or " " in key:
        raise Usage(
            tr("the key contains spaces or non-ASCII characters, which no client can send"),
            hint=tr("use only letters, digits and -_"),
            code="serve.key_form",
        )
    return key, False


def _options(name: str | None, flags: EngineFlags) -> EngineOptions:
    from glmchat.chat.connect import engine_options, require_fit
    from glmchat.chat.launch import LaunchOptions, launch_installed, locate, wanted_model
    from glmchat.checkpoints.fit import check_chat
    from glmchat.core.settings import load_settings

    bits = flags.bits
    settings = load_settings()
    launch = LaunchOptions(engine=replace(flags.options(settings), keep_alive=0.0))  # it stays as long as we do
    choice = wanted_model(name, settings)
    if choice is None:
        raise Usage(
            tr("no model was named"), hint=tr("glmchat serve NAME; `glmchat list` shows them"), code="model.none"
        )
    row, bits = locate(choice.text, revision=flags.revision, quant=bits)
    if choice.origin != "argument":
        output.say(tr("serving {name} ({origin})", name=one_line(row.name), origin=choice.origin))
    options = engine_options(launch_installed(launch, row, bits))
    require_fit(options, "completion")
    folder = options.require_folder()
    try:
        check_chat(folder)
    except GlmchatError as problem:  # texts are completed all the same
        output.say(one_line(problem.message, 300))
    # A path is of no use to clients, and says more of this machine than they need to know.
    return replace(options, model=folder.name if options.model == str(folder) else options.model)


def _url(host: str, port: int) -> str:
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/v1"


def _tell(server: Server, as_json: bool) -> None:
    """Say when it is loaded; a model that cannot be loaded ends the server."""
    from glmchat.chat.connect import unused_card

    host = server.engine_host
    host.loaded.wait()
    if host.error is not None:
        server.stop()
        return
    facts = host.engine.facts() if host.engine is not None else {}
    if (words := unused_card(facts.get("device"), facts.get("device_reason"))) is not None:
        output.say(words)
    seconds = (host.load_ms or 0) / 1000
    output.say(tr("ready after {seconds} s; press Ctrl-C to stop", seconds=f"{seconds:.1f}"))
    if as_json:
        output.json_line({"event": "ready", "load_seconds": seconds})
