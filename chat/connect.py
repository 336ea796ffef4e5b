"""From launch options to something that answers: our own engine as a child, or somebody's server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from glmchat.chat import shared_engine
from glmchat.chat.adapters_choice import brings_template
from glmchat.chat.client.endpoint import Endpoint, Stop
from glmchat.chat.engine_process import RunningEngine
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.sampling_choice import ranks_for_launch
from glmchat.chat.session import ChatSession, ModelIdentity
from glmchat.chat.shared_engine import start_engine
from glmchat.checkpoints import card_fit
from glmchat.checkpoints.chat_template import no_template
from glmchat.checkpoints.fit import check_chat, has_chat
from glmchat.core.cards import look
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import EngineDied, GlmchatError, ServerFailed
from glmchat.core.language import said_here, tr
from glmchat.core.settings import Settings
from glmchat.core.text import one_line
from glmchat.hub import adapters as adapter_store


@dataclass(slots=True)
class Connection:
    """Who answers. `process` is None for a server. Close it in the end, or use it in a `with` block."""

    endpoint: Endpoint
    identity: ModelIdentity
    process: RunningEngine | None = None

    def close(self) -> None:
        if self.process is not None:
            self.process.stop()

    def cause(self, error: GlmchatError) -> GlmchatError:
        """Why the engine is gone, where the end of its connection is all that `error` knows."""
        if self.process is None or not isinstance(error, EngineDied):
            return error
        deadline = time.monotonic() + 1.0
        while (failure := self.process.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.02)  # the connection breaks a moment before the process can be asked
        return failure or error

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def engine_options(launch: LaunchOptions) -> EngineOptions:
    """Raises Usage if no model was chosen. Every adapter in the store may be asked for later."""
    folder = launch.engine.require_folder()
    adapters = tuple((row.name, row.path) for row in adapter_store.list_adapters())
    return replace(launch.engine, model=launch.engine.model or folder.name, adapters=adapters)


# What a model is loaded for: a conversation, one answer and nothing else, or to go on with texts as they are.
Purpose = Literal["chat", "answer", "completion"]


def require_fit(options: EngineOptions, purpose: Purpose = "chat", adapters: Sequence[tuple[str, float]] = ()) -> None:
    """Raises what tells beforehand that a load would fail, or be of no use: DoesNotFit, Damaged, NotInstalled …

    A conversation may be opened with a model that has no chat template, since /complete works in it. Where an engine
    that can be joined runs already nothing is loaded and nothing is looked at: that engine has read the same files, and
    says the same of them at once. Engines that only wait for somebody make room. adapters: of the store, which answer
    from the beginning: one may bring the chat template that the model lacks.
    """
    if shared_engine.runs(options):
        return
    folder, name = options.require_folder(), options.model or options.require_folder().name
    shared_engine.making_room(
        lambda: card_fit.check(
            name, folder, options.quant, options.dtype, options.context, options.device, options.cache_type
        )
    )
    if purpose != "completion":
        check_chat(folder)
    if purpose == "answer" and not has_chat(folder) and not any(brings_template(name) for name, _ in adapters):
        raise no_template()


def connect(
    launch: LaunchOptions,
    on_progress: Callable[[str, float], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
    purpose: Purpose = "chat",
) -> Connection:
    """Start the engine and wait until it answers, or greet the server. Blocks; a window calls it in a worker.

    Raises what the load raised (Damaged, DoesNotFit, EngineDied …), NetworkFailed, ServerFailed, Usage, Interrupted.
    """
    if launch.server is not None:
        return greet(launch)
    options = engine_options(launch)
    require_fit(options, purpose, launch.adapters or ())
    process = start_engine(options)
    try:
        process.wait_ready(on_progress, cancelled)
        return Connection(process.endpoint, identity_of(launch, process.endpoint), process)
    except BaseException:
        process.stop()
        raise


def greet(launch: LaunchOptions, stop: Stop | None = None) -> Connection:
    """Ask a server what it has. Raises NetworkFailed, ServerFailed, Usage, and Interrupted where it was stopped."""
    endpoint = Endpoint(launch.server, key=launch.api_key, model=launch.engine.model)
    if launch.engine.model is None:
        endpoint.choose_model(stop=stop)
    return Connection(endpoint, identity_of(launch, endpoint, stop))


def identity_of(launch: LaunchOptions, endpoint: Endpoint, stop: Stop | None = None) -> ModelIdentity:
    """What is known of the model that answers. What a foreign server does not tell is None."""
    try:
        rows = endpoint.models(stop)
    except ServerFailed:  # some servers list no models, and that is no reason not to chat
        rows = []
    row = next((r for r in rows if r.name == endpoint.model), rows[0] if len(rows) == 1 else None)
    facts = row.facts if row else {}

    def fact(name: str) -> str | None:
        value = facts.get(name)
        return value if isinstance(value, str) else None

    return ModelIdentity(
        model=endpoint.model,
        revision=launch.engine.revision or fact("revision"),
        quant=launch.engine.quant_label or fact("quant"),
        context=row.context if row else None,
        family=fact("family") or launch.family,
        device=fact("device"),
        device_reason=said_here(fact("device_reason")),  # a shared engine speaks as the window that started it
        launch=None if launch.server is not None else _loaded(launch),
    )


def unused_card(device: str | None, reason: str | None) -> str | None:
    """The words for an engine that computes on the CPU of a machine with an NVIDIA driver; None for any other."""
    if device != "cpu" or not reason or look().driver is None:
        return None
    return tr("on the CPU: {reason}; `glmchat doctor` says what helps", reason=one_line(reason, 300))


def _loaded(launch: LaunchOptions) -> dict[str, Any]:
    """What the engine was told to load, so that a replay can load it again."""
    copied = launch.engine.copy is not None and launch.engine.quant is not None
    folder = Path(launch.engine.copy["out"]) if launch.engine.copy is not None and copied else launch.engine.folder
    return {
        "folder": str(folder.expanduser().absolute()) if folder else None,
        "quant": None if copied else launch.engine.quant,
        "device": launch.engine.device,
        "context": launch.engine.context,
    }


def open_session(
    history: History, launch: LaunchOptions, settings: Settings, connection: Connection | None = None
) -> ChatSession:
    """A session for these options; without a connection it can be read and typed into, and is `reconnect`ed later.

    Raises Usage for an unknown conversation, a setting out of range or a broken config.
    """
    folder = launch.engine.files_folder
    return ChatSession(
        history,
        connection.endpoint if connection else None,
        launch.resume,
        identity=connection.identity if connection else ModelIdentity(model=launch.engine.model, family=launch.family),
        ranks=ranks_for_launch(launch.sampling, catalogue=launch.engine.sampling, folder=folder),
        system=launch.system,
        default_system=settings.system,
        adapters=launch.adapters,
        context_policy=settings.context_policy,
    )
