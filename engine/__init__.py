"""Text in, text out: a checkpoint folder behind one face.

The names are loaded when they are first asked for, so that importing a part of the engine does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from glmchat.core.messages import Message, Sampling

if TYPE_CHECKING:
    from glmchat.engine.decoding.answer import Chunk
    from glmchat.engine.engine import Engine, load_tokenizer

__all__ = ["Chunk", "Engine", "Message", "Sampling", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    if name in ("Chunk", "Engine", "load_tokenizer"):
        from glmchat.engine import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
