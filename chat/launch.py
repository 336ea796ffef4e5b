"""What a chat is started with: the flags of `glmchat run`, ready for the window, the line mode and one-shot answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """One of three says what to talk to: `server`; `folder` (installed, or a path the user gave); or neither, then the
    window opens its picker. `chat/connect.py` turns it into a running engine and a session.

    sampling:   only what flags set, field of core.messages.Sampling -> value. The ranks below are merged later.
    defaults:   the catalogue's sampling for this model; generation_config.json is read from `folder`.
    """

    model: str | None = None  # the reference as the user knows it ("smollm2", "chatglm3-6b:int4"), or the server's name
    folder: Path | None = None  # checkpoint folder or GGUF file
    revision: str | None = None
    family: str | None = None
    quant: int | None = None  # 4 or 8: quantise at load; None: the weights as they are
    quant_label: str | None = None  # how the weights are named: "q4_1", "int4-g128"; None: not quantised
    keep_copy: bool = True  # a model quantised at load is kept in the store; False: only in memory
    copy: Mapping[str, Any] | None = None  # {"out": folder, "manifest": {…}} of that copy
    dtype: str | None = None
    device: str | None = None  # None: "auto"
    threads: int | None = None
    context: int | None = None
    server: str | None = None  # base URL of an OpenAI-compatible server, ".../v1"
    api_key: str | None = field(default=None, repr=False)
    adapters: tuple[tuple[str, float], ...] | None = (
        None  # (name in the store, scale); None: as the conversation has it
    )
    sampling: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    resume: int | None = None  # conversation to open
    history: bool = True
    prompt: str | None = None  # what already stands in the prompt
    theme: str | None = None
    language: str | None = None
    finish_on_hangup: bool = False
    note: str | None = None  # to be told once by the window, which covers what was printed before it


def device_word(text: str) -> str:
    """ "auto", "cpu", "mps", "cuda" or "cuda:1", in small letters. Raises Usage for anything else."""
    word = text.strip().lower()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,2})?", word):
        raise Usage(
            tr("{flag} cannot be {value}", flag="--device", value=repr(one_line(text, 60))),
            hint="auto, cpu, cuda, cuda:N, mps",
            code="usage.device",
        )
    return word
