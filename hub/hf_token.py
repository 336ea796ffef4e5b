"""The user's Hugging Face token: where it comes from, and what is said when a hub refuses it.

A hub answers 401 to an expired token even for what is public, so it is then asked again without one.
"""

from __future__ import annotations

import os

from glmchat.core.language import tr
from glmchat.core.text import one_line

_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # in huggingface_hub's order; then its file


def token() -> str | None:
    """HF_TOKEN, or what `hf auth login` saved; None if there is none or the user wants none sent. Never print it."""
    from huggingface_hub import constants, get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def token_origin() -> str:
    """The variable or the file that the token was read from."""
    from huggingface_hub.constants import HF_TOKEN_PATH

    return next((name for name in _VARIABLES if os.environ.get(name, "").strip()), HF_TOKEN_PATH)


def refused_words(host: str) -> str:
    """That a hub does not take the user's token, and which one that is."""
    return tr(
        "{host} refuses the token from {origin}, which may have expired", host=host, origin=one_line(token_origin())
    )


def without_words(host: str) -> str:
    """That a hub does not take the user's token, and is asked again without one."""
    _TOLD.add((host, token()))
    return refused_words(host) + tr("; going on without it")


def is_told(host: str) -> bool:
    """Whether `without_words` were said of this token already: each of several steps finds out for itself."""
    return (host, token()) in _TOLD


_TOLD: set[tuple[str, str | None]] = set()


def refused_hint() -> str:
    """What helps then."""
    return tr(
        "renew it with `hf auth login` or at https://huggingface.co/settings/tokens, or remove it from {origin}",
        origin=one_line(token_origin()),
    )
