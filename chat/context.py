"""What the next request would hold: which turns fit into the model's context, and what happens to those that do not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glmchat.chat.history.rows import StoredMessage
from glmchat.core.errors import DoesNotFit, GlmchatError, ServerFailed
from glmchat.core.language import tr
from glmchat.core.messages import Message

COMPLETION = "completion"  # details["mode"] of a text that was completed, not asked: no part of any other request
DEFAULT_ANSWER = 2048  # tokens an answer may have where nobody said


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


@dataclass(frozen=True, slots=True)
class ContextParts:
    """What the next request is made of, in tokens as the server counts them; None where it cannot count.

    system: its prompt, and what the chat format sets around a question. system + sent + draft is the whole request.
    sent_turns, unsent_turns: how many; unsent are those that do not fit, and those above a new context.
    """

    system: int | None
    sent: int | None
    unsent: int | None
    draft: int | None
    limit: int | None
    sent_turns: int = 0
    unsent_turns: int = 0

    @property
    def tokens(self) -> int | None:
        if self.system is None or self.sent is None or self.draft is None:
            return None
        return self.system + self.sent + self.draft

    @property
    def room(self) -> int | None:
        """Tokens left for the answer."""
        return None if self.tokens is None or self.limit is None else max(0, self.limit - self.tokens)


def reserve(limit: int, max_tokens: int | None) -> int:
    """Tokens kept free for the answer: what it may have, but at most a quarter of the context."""
    return min(max_tokens or DEFAULT_ANSWER, limit // 4)


def turns(stored: Sequence[StoredMessage]) -> list[list[StoredMessage]]:
    """Whole turns: a question with everything up to the next question. System messages are kept apart."""
    turns: list[list[StoredMessage]] = []
    for message in stored:
        if message.role == "system" or message.is_clear or is_completion(message):
            continue
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return turns


def is_completion(message: StoredMessage) -> bool:
    return message.details.get("mode") == COMPLETION


def to_messages(system: str | None, stored: Sequence[StoredMessage]) -> tuple[Message, ...]:
    """The messages as the engine takes them: the system prompt first, answers that say nothing left out.

    Two questions in a row (the first one's answer failed or was deleted) are one message, and two answers too: chat
    templates know only turns.
    """
    systems = [m.text for m in stored if m.role == "system"]
    if system:
        systems = [system, *(text for text in systems if text != system)]
    tools = next((tuple(m.details["tools"]) for m in stored if m.role == "system" and m.details.get("tools")), None)
    result = [Message("system", "\n\n".join(systems), tools=tools)] if systems else []
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


@dataclass(frozen=True, slots=True)
class Overflow:
    """A request that was too long: no later one that holds all of its messages fits. tokens None: nobody said."""

    system: str | None
    messages: frozenset[int]
    tokens: int | None


class ContextFit:
    """Which turns a request holds: all, or all but as few of the oldest whole turns as it must do without.

    How long a request is only the server knows, which renders it. So one is tried; `accepts` is asked with the count
    that came back, and `drop` makes the next one shorter. The system prompt and the last turn are never dropped. Where
    tokens cannot be counted nothing is dropped by guess.
    """

    def __init__(
        self,
        system: str | None,
        stored: Sequence[StoredMessage],
        limit: int | None,
        *,
        max_tokens: int | None = None,
        policy: str = "drop",
        overflow: Overflow | None = None,
        greeting: bool = True,
    ) -> None:
        """limit: tokens of the context; None where the server does not tell. overflow: of an earlier request.

        greeting: False where an earlier request showed that the model wants a question first.
        """
        self.limit, self.max_tokens = limit, max_tokens
        self.most = None if limit is None else limit - reserve(limit, max_tokens)  # tokens of a prompt that leaves room
        self.overflow: Overflow | None = None
        self._system, self._policy = system, policy
        self._systems = [m for m in stored if m.role == "system"]
        self._turns = turns(stored)
        self._last = max(0, len(self._turns) - 1)
        self._dropped = 0
        if overflow is not None and policy == "drop" and self._still_holds(overflow):
            self.overflow = overflow
            first = min(overflow.messages, default=0)
            beyond = (n for n, turn in enumerate(self._turns) if turn[0].id > first)
            self._dropped = min(next(beyond, self._last), self._last)

        if not greeting:
            self.drop_greeting()

    def drop_greeting(self) -> bool:
        """Leave out the answers that stand before the first question; False where there are none in the request."""
        greeted = self._dropped == 0 < self._last and self._turns[0][0].role == "assistant"
        self._dropped += greeted
        return greeted

    def _still_holds(self, overflow: Overflow) -> bool:
        here = {m.id for turn in self._turns for m in turn}
        too_many = overflow.tokens is None or (self.most is not None and overflow.tokens > self.most)
        return overflow.system == self._system and overflow.messages <= here and too_many

    @property
    def sent(self) -> list[StoredMessage]:
        return [*self._systems, *(m for turn in self._turns[self._dropped :] for m in turn)]

    @property
    def messages(self) -> tuple[Message, ...]:
        return to_messages(self._system, self.sent)

    @property
    def unseen(self) -> tuple[int, ...]:
        return tuple(m.id for turn in self._turns[: self._dropped] for m in turn)

    def request(self, tokens: int | None) -> Request:
        return Request(self.messages, self.unseen, tokens, self.limit)

    def accepts(self, tokens: int | None) -> bool:
        """True if a prompt of so many tokens may be answered; the last turn needs no more room than a token."""
        if tokens is None or self.limit is None or self.most is None:
            return True
        return tokens < self.limit and (tokens <= self.most or not self.can_drop)

    @property
    def can_drop(self) -> bool:
        return self._policy == "drop" and self._dropped < self._last

    def drop(self, tokens: int | None, most: int | None) -> None:
        """The request has `tokens`, and may have `most`: do without turns that surely make up the difference, or fewer.

        One turn at least. Without numbers twice as many turns as before.
        """
        first = self._dropped
        self.overflow = Overflow(self._system, frozenset(m.id for t in self._turns[first:] for m in t), tokens)
        if tokens is None or most is None:
            self._dropped = min(self._last, max(1, first * 2))
            return
        saved = 0
        while self._dropped < self._last and (self._dropped == first or saved < tokens - most):
            saved += sum(_most_tokens(m) for m in self._turns[self._dropped])
            self._dropped += 1
            if (exact := self._measured(first, self._dropped)) is not None:
                saved = min(saved, exact)

    def foresee(self) -> None:
        """Drop what the counts of earlier answers show to be too long already, for a server that would cut it short.

        An answer's own prompt, with that answer, is part of every later request that begins where it began.
        """
        if self._policy != "drop" or self.most is None:
            return
        begins = {turn[0].id: n for n, turn in enumerate(self._turns)}
        for answer in (m for turn in self._turns for m in turn if m.details.get("system") == self._system):
            start, tokens = begins.get(answer.details.get("seen_from") or -1), _prompt_tokens(answer)
            if start is None or tokens is None or not self._dropped <= start < self._last:
                continue
            # A template may leave out what was thought, so such an answer counts for nothing.
            tokens += 0 if "</think>" in answer.text else min(len(answer.text), _answer_tokens(answer))
            if tokens > self.most:
                self._dropped = start
                self.drop(tokens, self.most)

    def _measured(self, first: int, end: int) -> int | None:
        """Tokens, at most, of the turns from `first` to before `end`, by the counts that came with their answers."""
        question, before = self._turns[first][0], _counted(self._turns[first])
        after = _counted(self._turns[end])
        if before is None or after is None or before[1:] != after[1:]:
            return None
        return after[0] - before[0] + _most_tokens(question)


_MARKS = 16  # tokens, at most, that a template sets around one message


def _most_tokens(message: StoredMessage) -> int:
    """No tokenizer makes more tokens than bytes."""
    return len(message.text.encode("utf-8", "replace")) + _MARKS


def _prompt_tokens(answer: StoredMessage) -> int | None:
    """Of the request that the whole answer came from; a continued one had a part of the answer in its request."""
    tokens = answer.details.get("prompt_tokens")
    return tokens if isinstance(tokens, int) and len(answer.details.get("spans") or ()) < 2 else None


def _answer_tokens(answer: StoredMessage) -> int:
    tokens = answer.details.get("completion_tokens")
    return tokens if isinstance(tokens, int) else len(answer.token_ids)


def _counted(turn: Sequence[StoredMessage]) -> tuple[int, Any, Any, Any] | None:
    """Prompt tokens of a turn's answer, and what they can only be compared under."""
    for answer in reversed(turn):
        if answer.role == "assistant" and (tokens := _prompt_tokens(answer)) is not None:
            details = answer.details
            return tokens, details.get("seen_from"), details.get("model"), details.get("system")
    return None


# How servers that are not ours say that a request is longer than their context.
_OVERFLOW = re.compile(
    r"context[ _](length|size|window)|maximum context|max_model_len|too many tokens"
    r"|exceed\w*.{0,40}context|context.{0,40}exceed",
    re.IGNORECASE,
)


def is_overflow(error: GlmchatError) -> bool:
    """True if the request was refused because it is too long."""
    if isinstance(error, DoesNotFit):
        return error.code.startswith("context.")
    return isinstance(error, ServerFailed) and _OVERFLOW.search(error.message) is not None


def sizes(error: GlmchatError) -> tuple[int, int] | None:
    """(tokens of the refused request, tokens of the context), where the refusal says both, in whatever words.

    A refused request is longer than the context, so the two need no names.
    """
    words = re.sub(r"HTTP \d+", "", error.message)
    numbers = [int(digits) for digits in re.findall(r"(?<![A-Za-z\d_.-])\d{1,15}(?![A-Za-z\d_]|\.\d)", words)][:2]
    return (max(numbers), min(numbers)) if len(numbers) == 2 else None


def too_long(tokens: int, limit: int) -> DoesNotFit:
    return DoesNotFit(
        tr("the prompt has {tokens} tokens, but the context holds only {limit}", tokens=tokens, limit=limit),
        hint=tr("shorten it, start over with /clear, or raise --context if the model allows it"),
        code="context.exceeded",
    )
