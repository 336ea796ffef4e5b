"""What a chat is started with: the flags of `glmchat run`, ready for the window, the line mode and one-shot answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from glmchat.core.engine_options import EngineOptions


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """One of three says what to talk to: `server`; the engine's `folder` (installed, or a path the user gave); or
    neither, then the window opens its picker. `chat/connect.py` turns it into a running engine and a session.

    engine:     its model is the reference as the user knows it ("smollm2", "chatglm3-6b:int4"), or the server's name;
                its sampling the catalogue's for this model. generation_config.json is read from its folder.
    sampling:   only what flags set, field of core.messages.Sampling -> value. The ranks below are merged later.
    """

    engine: EngineOptions = field(default_factory=EngineOptions)
    family: str | None = None
    keep_copy: bool = True  # a model quantised at load is kept in the store; False: only in memory
    server: str | None = None  # base URL of an OpenAI-compatible server, ".../v1"
    api_key: str | None = field(default=None, repr=False)
    # (name in the store, scale); None: as the conversation has it
    adapters: tuple[tuple[str, float], ...] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    resume: int | None = None  # conversation to open
    history: bool = True
    prompt: str | None = None  # what already stands in the prompt
    theme: str | None = None
    language: str | None = None
    finish_on_hangup: bool = False
    note: str | None = None  # to be told once by the window, which covers what was printed before it
