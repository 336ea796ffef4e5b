"""Chinese and a model that knows only English: what to say, and which model answers Chinese on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.text import human_bytes

if TYPE_CHECKING:
    from glmchat.hub.catalogue import Entry

_ROOM = 0.8  # share of the machine's memory that weights may take


def advice_for_chinese(launch: LaunchOptions) -> tuple[str, str] | None:
    """(what is the case, what to do), or None if the model knows Chinese or is not in the catalogue."""
    from glmchat.chat.resources import total_memory
    from glmchat.hub import catalogue, references

    if launch.engine.model is None or launch.server is not None:
        return None
    try:
        known = catalogue.load()
        entry = known.find(references.parse(launch.engine.model))
    except GlmchatError:
        return None
    if entry is None or not entry.languages or "zh" in entry.languages:
        return None
    room = int(total_memory() * _ROOM)
    speakers = [e for e in known if "zh" in e.languages and e.default and 0 < _weights(e) <= room]
    text = tr("{model} speaks only English", model=entry.name)
    if not speakers:
        return text, tr(
            "no model in the catalogue that speaks Chinese fits into the {size} of this machine",
            size=human_bytes(total_memory()),
        )
    choice = min(speakers, key=_weights)  # the one that loads and answers soonest
    return text, tr(
        "`glmchat pull {name}` ({size}) answers Chinese", name=choice.reference, size=human_bytes(_weights(choice))
    )


def _weights(entry: Entry) -> int:
    return sum(file.size or 0 for file in entry.files)
