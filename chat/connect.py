"""From launch options to something that answers: our own engine as a child, or somebody's server."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmchat.chat.client.endpoint import Endpoint
from glmchat.chat.engine_process import EngineOptions, EngineProcess, start_engine
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.sampling_choice import ranks_for_launch
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.checkpoints import fit
from glmchat.core.errors import EngineDied, GlmchatError, ServerFailed, Usage
from glmchat.core.language import tr
from glmchat.core.settings import Settings
from glmchat.hub import installed


@dataclass(slots=True)
class Connection:
    """Who answers. `process` is None for a server. Close it in the end, or use it in a `with` block."""

    endpoint: Endpoint
    identity: ModelIdentity
    process: EngineProcess | None = None

    def close(self) -> None:
        if self.process is not None:
            self.process.stop()

    def cause(self, error: GlmchatError) -> GlmchatError:
        """Why the engine is gone, where the end of its connection is all that `error` knows."""
        if self.process is None or not isinstance(error, EngineDied):
            return error
        deadline = time.monotonic() + 1.0
        while (found := self.process.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.02)  # the connection breaks a moment before the process can be asked
        return found or error

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def engine_options(launch: LaunchOptions) -> EngineOptions:
    """Raises Usage if no model was chosen. Every adapter in the store may be asked for later."""
    if launch.folder is None:
        raise Usage(tr("no model was chosen"), hint=tr("name one, or `glmchat list`"), code="model.none")
    adapters = tuple((row.name, row.path) for row in installed.list_adapters())
    return EngineOptions(
        folder=launch.folder,
        model=launch.model or launch.folder.name,
        revision=launch.revision,
        quant=launch.quant,
        quant_label=launch.quant_label,
        copy=launch.copy,
        dtype=launch.dtype,
        device=launch.device or "auto",
        threads=launch.threads,
        context=launch.context,
        adapters=adapters,
        sampling=dict(launch.defaults),
    )


def connect(
    launch: LaunchOptions,
    on_progress: Callable[[str, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Connection:
    """Start the engine and wait until it answers, or greet the server. Blocks; a window calls it in a worker.

    Raises what the load raised (Damaged, DoesNotFit, EngineDied …), NetworkFailed, ServerFailed, Usage, Interrupted.
    """
    if launch.server is not None:
        return _to_server(launch)
    options = engine_options(launch)
    fit.check(options.model, options.folder, options.quant, options.dtype, options.context)
    process = start_engine(options)
    try:
        process.wait_ready(on_progress, cancelled)
        return Connection(process.endpoint, identity_of(launch, process.endpoint), process)
    except BaseException:
        process.stop()
        raise


def _to_server(launch: LaunchOptions) -> Connection:
    endpoint = Endpoint(launch.server, key=launch.api_key, model=launch.model)
    if launch.model is None:
        endpoint.choose_model()
    return Connection(endpoint, identity_of(launch, endpoint))


def identity_of(launch: LaunchOptions, endpoint: Endpoint) -> ModelIdentity:
    """What is known of the model that answers. What a foreign server does not tell is None."""
    try:
        rows = endpoint.models()
    except ServerFailed:  # some servers list no models, and that is no reason not to chat
        rows = []
    row = next((r for r in rows if r.name == endpoint.model), rows[0] if len(rows) == 1 else None)
    facts = row.facts if row else {}

    def told(name: str) -> str | None:
        value = facts.get(name)
        return value if isinstance(value, str) else None

    return ModelIdentity(
        model=endpoint.model,
        revision=launch.revision or told("revision"),
        quant=launch.quant_label or told("quant"),
        context=row.context if row else None,
        family=told("family") or launch.family,
        launch=None if launch.server is not None else _loaded(launch),
    )


def _loaded(launch: LaunchOptions) -> dict[str, Any]:
    """What the engine was told to load, so that a replay can load it again."""
    copied = launch.copy is not None and launch.quant is not None
    folder = Path(launch.copy["out"]) if launch.copy is not None and copied else launch.folder
    return {
        "folder": str(folder.expanduser().absolute()) if folder else None,
        "quant": None if copied else launch.quant,
        "device": launch.device,
        "context": launch.context,
    }


def open_session(
    history: History, launch: LaunchOptions, settings: Settings, connection: Connection | None = None
) -> ChatSession:
    """A session for these options; without a connection it can be read and typed into, and is `reconnect`ed later.

    Raises Usage for an unknown conversation, a setting out of range or a broken config.
    """
    folder = launch.folder if launch.folder is None or launch.folder.is_dir() else launch.folder.parent
    return ChatSession(
        history,
        connection.endpoint if connection else None,
        launch.resume,
        identity=connection.identity if connection else ModelIdentity(model=launch.model, family=launch.family),
        ranks=ranks_for_launch(launch.sampling, catalogue=launch.defaults, folder=folder),
        system=launch.system,
        default_system=settings.system,
        adapters=launch.adapters,
        context_policy=settings.context_policy,
    )


def read_key(file: Path | None, environ_key: str | None) -> str | None:
    """The key for a server: the first line of a file, else from the environment. Raises Usage. Never shown."""
    if file is None:
        return environ_key or None
    try:
        lines = file.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Usage(
            tr("the key file {path} cannot be read: {reason}", path=str(file), reason=str(reason)),
            hint=tr("one line with the key, readable by you"),
            code="server.key_file",
        ) from None
    if not lines:
        raise Usage(
            tr("the key file {path} is empty", path=str(file)),
            hint=tr("one line with the key, readable by you"),
            code="server.key_file",
        )
    return lines[0]
