"""What the next request would hold: which turns fit into the model's context, and what happens to those that do not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from glmchat.chat.history.rows import StoredMessage
from glmchat.core.errors import DoesNotFit, GlmchatError, ServerFailed
from glmchat.core.language import tr
from glmchat.core.messages import Message

COMPLETION = "completion"  # details["mode"] of a text that was completed, not asked: no part of any other request
DEFAULT_ANSWER = 2048  # tokens an answer may have where nobody said
Count = Callable[[Sequence[Message]], int | None]  # tokens of the rendered request; None if the server cannot say


@dataclass(frozen=True, slots=True)
class Request:
    """The messages of one request. tokens and limit are None where the server does not tell."""

    messages: tuple[Message, ...]
    unseen: tuple[int, ...] = ()  # ids of messages of the open branch that the model no longer sees, oldest first
    tokens: int | None = None
    limit: int | None = None

    @property
    def room(self) -> int | None:
        """Tokens left for the answer."""
        return None if self.tokens is None or self.limit is None else max(0, self.limit - self.tokens)


def reserve(limit: int, max_tokens: int | None) -> int:
    """Tokens kept free for the answer: what it may have, but at most a quarter of the context."""
    return min(max_tokens or DEFAULT_ANSWER, limit // 4)


def turns(stored: Sequence[StoredMessage]) -> list[list[StoredMessage]]:
    """Whole turns: a question with everything up to the next question. System messages are kept apart."""
    found: list[list[StoredMessage]] = []
    for message in stored:
        if message.role == "system" or message.is_clear or is_completion(message):
            continue
        if message.role == "user" or not found:
            found.append([])
        found[-1].append(message)
    return found


def is_completion(message: StoredMessage) -> bool:
    return message.details.get("mode") == COMPLETION


def to_messages(system: str | None, stored: Sequence[StoredMessage]) -> tuple[Message, ...]:
    """The messages as the engine takes them: the system prompt first, answers that say nothing left out.

    Two questions in a row (the first one's answer failed or was deleted) are one message, and two answers too: chat
    templates know only turns.
    """
    said = [m.text for m in stored if m.role == "system"]
    if system:
        said = [system, *(text for text in said if text != system)]
    tools = next((tuple(m.details["tools"]) for m in stored if m.role == "system" and m.details.get("tools")), None)
    result = [Message("system", "\n\n".join(said), tools=tools)] if said else []
    for message in stored:
        silent = message.role == "assistant" and not message.text
        if message.role == "system" or message.is_clear or silent or is_completion(message):
            continue
        before = result[-1] if result else None
        if before is not None and before.role == message.role and message.role in ("user", "assistant"):
            result[-1] = Message(message.role, f"{before.content}\n\n{message.text}")
        else:
            result.append(Message(message.role, message.text, message.details.get("name")))
    return tuple(result)


def fit(
    system: str | None,
    stored: Sequence[StoredMessage],
    count: Count,
    limit: int | None,
    *,
    max_tokens: int | None = None,
    policy: str = "drop",
    drop_at_least: int = 0,
) -> Request:
    """The request for this branch: everything, or without its oldest whole turns.

    The system prompt and the last turn are never dropped. Where tokens cannot be counted nothing is dropped by guess.
    drop_at_least: turns that a server has already refused. Raises DoesNotFit (policy "refuse", or one turn too long).
    """
    systems = [m for m in stored if m.role == "system"]
    parts = turns(stored)

    def without(dropped: int) -> tuple[Message, ...]:
        return to_messages(system, [*systems, *(m for turn in parts[dropped:] for m in turn)])

    def request(dropped: int, tokens: int | None) -> Request:
        unseen = tuple(m.id for turn in parts[:dropped] for m in turn)
        return Request(without(dropped), unseen, tokens, limit)

    last = max(0, len(parts) - 1)
    low = min(drop_at_least, last)
    tokens = count(without(low))
    if tokens is None or limit is None:
        return request(low, tokens)
    wanted = limit - reserve(limit, max_tokens)
    if tokens <= wanted or (policy == "refuse" and tokens < limit):
        return request(low, tokens)
    if policy == "refuse":
        raise too_long(tokens, limit)
    # The count falls as turns go, so the fewest turns to drop are found by halving: each count is a request.
    high = last
    counted = {low: tokens}
    while low < high:
        middle = (low + high) // 2
        counted[middle] = count(without(middle)) or 0
        if counted[middle] <= wanted:
            high = middle
        else:
            low = middle + 1
    if low not in counted:
        counted[low] = count(without(low)) or 0
    if counted[low] >= limit:  # even alone the last turn does not fit
        raise too_long(counted[low], limit)
    return request(low, counted[low])


# How servers that are not ours say that a request is longer than their context.
_OVERFLOW = re.compile(
    r"context[ _](length|size|window)|maximum context|max_model_len|too many tokens"
    r"|exceed\w*.{0,40}context|context.{0,40}exceed",
    re.IGNORECASE,
)


def is_overflow(error: GlmchatError) -> bool:
    """True if the request was refused because it is too long."""
    if isinstance(error, DoesNotFit):
        return True
    return isinstance(error, ServerFailed) and _OVERFLOW.search(error.message) is not None


def too_long(tokens: int, limit: int) -> DoesNotFit:
    return DoesNotFit(
        tr("the prompt has {tokens} tokens, the context holds {limit}", tokens=tokens, limit=limit),
        hint=tr("shorten it, begin anew with /clear, or raise --context where the model allows it"),
        code="context.exceeded",
    )
