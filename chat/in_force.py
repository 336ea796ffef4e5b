"""What the next answer is made with, in words: marks for the status line, rows for a panel and for plain lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glmchat.chat.adapters_choice import shown
from glmchat.chat.sampling_choice import PRESETS, WORDS, Origin, choose_sampling, value_text
from glmchat.core.language import tr
from glmchat.core.text import one_line, short_name
from glmchat.hub.adapters import is_forced

if TYPE_CHECKING:
    from glmchat.chat.context import ContextParts
    from glmchat.chat.session import ChatSession

_MODELS_OWN: tuple[Origin, ...] = ("catalogue", "generation_config", "default")
Rows = list[tuple[str, str]]


def changed_sampling(chat: ChatSession) -> Mapping[str, Any]:
    """Settings that are other than the model's own; on a server, whose own nobody knows, all that somebody set."""
    chosen = chat.sampling()
    own = choose_sampling({origin: chat.ranks.asked.get(origin, {}) for origin in _MODELS_OWN}).sampling
    asked = {name: getattr(chosen.sampling, name) for name, by in chosen.origins.items() if by not in _MODELS_OWN}
    return {name: value for name, value in asked.items() if not chat.decides or value != getattr(own, name)}


def preset_in_force(chat: ChatSession) -> str | None:
    """The preset whose values this conversation has set, and nothing else."""
    settings = dict(chat.settings.sampling)
    return next((name for name, values in PRESETS.items() if values and values == settings), None)


def adapters_in_force(chat: ChatSession) -> tuple[str, ...]:
    """With their weights, and said of those that were attached by force."""
    return tuple(shown(name, scale, forced=is_forced(name)) for name, scale in chat.adapters)


def marks(chat: ChatSession) -> tuple[str, ...]:
    """A word for each thing that is not the default, for a line that has little room; adapters have their own place."""
    changed, words = changed_sampling(chat), []
    if changed and (preset := preset_in_force(chat)) is not None:
        words.append(tr(preset))
    elif changed:
        name = "temperature" if "temperature" in changed else next(iter(changed))
        word = f"{'temp' if name == 'temperature' else name} {one_line(value_text(changed[name]), 12)}"
        words.append(word if len(changed) == 1 else f"{word} +{len(changed) - 1}")
    if chat.system_prompt:
        words.append(tr("system prompt"))
    if chat.context_policy != "drop":
        words.append(tr("refuses when full"))
    return tuple(words)


def rows_in_force(chat: ChatSession) -> Rows:
    """Model, sampling, system prompt, policy and adapters of the next answer."""
    identity = chat.identity
    facts = (short_name(identity.model or ""), identity.revision, identity.quant, identity.device)
    model = " · ".join(one_line(str(fact), 60) for fact in facts if fact and fact != "none")
    changed, preset = changed_sampling(chat), preset_in_force(chat)
    chosen = chat.sampling()
    settings = ", ".join(
        f"{name} {one_line(value_text(value), 60)} ({tr(WORDS[chosen.origins[name]])})"
        for name, value in changed.items()
    )
    if changed and preset:
        settings = f"{tr(preset)}: {settings}"
    drops = chat.context_policy == "drop"
    return [
        (tr("model"), model or tr("none")),
        (tr("sampling"), settings or (tr("the model's own") if chat.decides else tr("chosen by the server"))),
        (tr("system prompt"), chat.system_prompt or tr("none")),
        (tr("adapters"), ", ".join(adapters_in_force(chat)) or tr("none")),
        (tr("full context"), tr("drops the oldest turns") if drops else tr("refuses new questions")),
    ]


def context_rows(parts: ContextParts) -> Rows:
    """Tokens of each part of the next request; without a count only what is sent of the conversation."""

    def count(tokens: int | None) -> str:
        return f"{tokens:,}" if tokens is not None else "?"

    def turns(number: int, tokens: int | None) -> str:
        text = tr("1 turn") if number == 1 else tr("{n} turns", n=f"{number:,}")
        return text if tokens is None else f"{tokens:,} ({text})"

    rows = [(tr("turns sent"), turns(parts.sent_turns, parts.sent))]
    if parts.unsent_turns:
        rows.append((tr("turns not sent"), turns(parts.unsent_turns, parts.unsent)))
    if parts.tokens is None:
        return rows
    rows.insert(0, (tr("system prompt and chat format"), count(parts.system)))
    rows.append((tr("draft"), count(parts.draft)))
    whole = count(parts.tokens)
    if parts.limit is not None:
        whole = tr("{used} of {limit}", used=whole, limit=count(parts.limit))
    rows.append((tr("next request"), whole))
    if parts.room is not None:
        rows.append((tr("room for the answer"), count(parts.room)))
    return rows
