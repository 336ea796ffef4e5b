"""How one answer runs: sent, shortened where the context is full, read, written down, stopped; what is said of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmchat.chat.client.endpoint import Progress, Stop
from glmchat.chat.context import ContextFit, Overflow, is_overflow, reserve, sizes, too_long
from glmchat.chat.history.rows import State, StoredMessage, Tree
from glmchat.chat.stream import AnswerLog, Ended, Pump, Source, Switch, facts_of
from glmchat.core.errors import DoesNotFit, GlmchatError
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Message, Piece, Started
from glmchat.core.text import human_bytes

if TYPE_CHECKING:
    from glmchat.chat.history.rows import StoredMessage

_POLL = 0.05  # how soon a stop is noticed while nothing comes
_LAST_WORDS = 1.0  # how long a stopped server may take to say what it counted
_STATES: Mapping[str | None, State] = {"length": "cut", "cancelled": "stopped"}


@dataclass(frozen=True, slots=True)
class WentOn:
    """Another window went on in this conversation: what it said, and the message that the question stands below now."""

    messages: tuple[StoredMessage, ...]
    last: int | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """The question is stored and an empty answer stands below it. question None: nothing new was asked."""

    question: StoredMessage | None
    answer: StoredMessage


@dataclass(frozen=True, slots=True)
class Trimmed:
    """From this request on the model does not see these messages (oldest whole turns). Empty: it sees all again.

    greeting: not for want of room, but because the model wants a question before any answer.
    """

    unseen: tuple[int, ...]
    tokens: int | None
    limit: int | None
    greeting: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """The answer as it now stands in the history."""

    answer: StoredMessage


SessionEvent = WentOn | Begun | Trimmed | Progress | Started | Piece | Finished | Done
Answer = Generator[SessionEvent, None, None]


@dataclass(slots=True)
class SeenContext:
    """What the conversation knows of its context from one answer to the next.

    unseen: ids of messages that the last request left out. overflow: the last request that was too long.
    greeting: False once a template has refused a conversation that began with an answer.
    """

    unseen: tuple[int, ...] = ()
    overflow: Overflow | None = None
    greeting: bool = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """What an answer answers. stored: the messages of the branch, from its last clear mark on.

    fit: which of them are sent; None where `messages` go out as they are (nothing at all for a text to complete).
    open_stream: sends a request with these messages; stopped by the Stop.
    """

    stored: Sequence[StoredMessage]
    fit: ContextFit | None
    messages: tuple[Message, ...]
    open_stream: Callable[[tuple[Message, ...], Stop], Source]
    is_chat: bool = True


_ORDER = ("template.refused", "server.refused")  # what a template that wants a question first may come back as


class AnswerRun:
    """One answer. `events` runs it; the history holds what they say when it ends, however it ends."""

    def __init__(
        self,
        tree: Tree,
        question: StoredMessage | None,
        answer: StoredMessage,
        prompt: Prompt,
        log: AnswerLog,
        switch: Switch,
        seen: SeenContext,
        *,
        continued: StoredMessage | None = None,
    ) -> None:
        """question: None if nothing new was asked. continued: the answer that this is the rest of, as it stood."""
        self._tree, self._question, self._answer, self._continued = tree, question, answer, continued
        self._prompt, self._log, self._switch, self._seen = prompt, log, switch, seen
        self._pump: Pump | None = None
        self._connection: Stop | None = None
        self._deadline: float | None = None  # after a stop

    def events(self) -> Answer:
        """Begun, perhaps Trimmed, Started, Piece …, Finished, Done. Raises GlmchatError; what was said is kept."""
        log = self._log
        try:
            yield Begun(self._question, self._answer)
            self._send()
            finished: Finished | None = None
            while finished is None:
                event = self._next()
                if isinstance(event, Started):
                    if self._is_too_long(event.prompt_tokens):
                        continue
                    log.prompt_ids = event.prompt_ids
                    log.details["prompt_tokens"] = event.prompt_tokens
                    log.details["model"] = log.details["model"] or event.model
                    if (trimmed := self._trimmed(event.prompt_tokens)) is not None:
                        yield trimmed
                elif isinstance(event, Piece):
                    log.add(event)
                elif isinstance(event, Finished):
                    finished = event
                    log.record(event.facts)
                    log.end(_STATES.get(event.finish_reason, "complete"), facts_of(event))
                yield event
        except (GeneratorExit, KeyboardInterrupt):
            self._hang_up()
            log.end("stopped")
            raise
        except GlmchatError as error:
            if self._continued is not None and not log.has_pieces:
                log.end(self._continued.state)  # nothing has changed: it can be continued still
            else:
                log.end("failed", {"error": error.to_json()})
            raise
        except BaseException:
            log.end("failed")
            raise
        finally:
            if self._pump is not None:
                self._pump.stop()
        yield Done(self._tree.messages[self._answer.id])

    def _send(self) -> None:
        fit, prompt = self._prompt.fit, self._prompt
        unseen = self._unseen()
        self._log.details["seen_from"] = next((m.id for m in prompt.stored if m.id not in unseen), None)
        self._connection = self._switch.connection()
        messages = prompt.messages if fit is None else fit.messages
        self._pump = Pump(prompt.open_stream(messages, self._connection))

    def _hang_up(self) -> None:
        if self._pump is not None and self._connection is not None:
            self._pump.stop()
            self._connection.now()

    def _next(self) -> Progress | Started | Piece | Finished:
        """The next event. Where the server refuses the request as too long, that of a shorter one."""
        while True:
            assert self._pump is not None
            if self._switch.is_set and self._deadline is None:
                self._deadline = time.monotonic() + _LAST_WORDS
            if self._deadline is not None and time.monotonic() >= self._deadline:
                return Finished("cancelled")
            try:
                event = self._pump.get(_POLL)
            except Ended:
                return Finished("cancelled" if self._switch.is_set else None)
            except GlmchatError as error:
                self._shorten(error)
                self._send()
                continue
            if event is not None:
                return event
            self._log.beat()

    def _shorten(self, error: GlmchatError) -> None:
        """Drop turns if that is what `error` asks for; else raise it."""
        fit, numbers = self._prompt.fit, sizes(error)
        if error.code in _ORDER and not self._log.has_pieces and fit is not None and fit.drop_greeting():
            self._seen.greeting = False
            return
        if self._log.has_pieces or not is_overflow(error) or not self._prompt.is_chat:
            raise error
        ours = isinstance(error, DoesNotFit)
        if fit is None or not fit.can_drop:
            raise too_long(*numbers) if ours and numbers is not None else error
        tokens, limit = numbers or (None, None)
        if ours and limit is not None:  # the refusal of a foreign server counts the room for the answer already
            limit -= reserve(limit, fit.max_tokens)
        fit.drop(tokens, limit)
        self._seen.overflow = fit.overflow

    def _is_too_long(self, tokens: int | None) -> bool:
        """True if the prompt leaves too little room for an answer; then a shorter one is on its way."""
        fit = self._prompt.fit
        if fit is None or fit.accepts(tokens) or not fit.can_drop:
            return False
        self._hang_up()
        fit.drop(tokens, fit.most)
        self._seen.overflow = fit.overflow
        self._send()
        return True

    def _unseen(self) -> tuple[int, ...]:
        if self._prompt.fit is not None:
            return self._prompt.fit.unseen
        return () if self._prompt.is_chat else self._seen.unseen

    def _trimmed(self, tokens: int | None) -> Trimmed | None:
        unseen, fit = self._unseen(), self._prompt.fit
        if unseen == self._seen.unseen:
            return None
        self._seen.unseen = unseen
        return Trimmed(unseen, tokens, None if fit is None else fit.limit, greeting=not self._seen.greeting)


def trimmed_note(event: Trimmed) -> str:
    """Which messages the model does not see, and why."""
    if event.greeting and len(event.unseen) == 1:
        return tr("This model wants a question first: it does not see the greeting before it.")
    return tr("The context is full: the model no longer sees the first {n} messages.", n=len(event.unseen))


def cut_note(facts: Mapping[str, Any]) -> str:
    """For an answer whose finish reason is "length": what the engine said of the limit it met."""
    match facts.get("stopped_by"):
        case "loop":
            return tr("the answer kept repeating itself and was stopped")
        case "context":
            return tr("the context is full")
        case _:
            return tr("the token limit was reached; raise it with --max-tokens or /set max_tokens")


def system_note(facts: Mapping[str, Any]) -> str:
    """For the first answer of a family that knows no system prompt; "" for all others."""
    if facts.get("system_prepended") is not True:
        return ""
    return tr("this model has no system prompt: it was put before the first question")


# Facts of a machine that stand in the details of an answer.
_MACHINE = ("threads", "kernel", "device", "card", "capability", "driver", "cuda", "dtype")


def details_of(message: StoredMessage) -> list[tuple[str, str]]:
    """Titles and values, for /stats. What the server did not send is left out."""
    d: Mapping[str, Any] = message.details
    table: list[tuple[str, str]] = []

    def row(title: str, name: str, form: str = "{}") -> None:
        if d.get(name) is not None:
            table.append((title, form.format(d[name])))

    row(tr("model"), "model")
    row(tr("revision"), "revision")
    row(tr("weights"), "quant")
    row(tr("prompt tokens"), "prompt_tokens", "{:,}")
    row(tr("cached"), "cached_tokens", "{:,}")
    disk = (d.get("facts") or {}).get("disk")
    if isinstance(disk, Mapping):
        with suppress(KeyError, TypeError, ValueError):  # a server of another version
            came = tr("{tokens} tokens, {size}", tokens=f"{disk['ids']:,}", size=human_bytes(disk["bytes"]))
            table.append((tr("from the disk"), came))
            table.append((tr("saved"), f"{disk['saved']:.1f} s"))
    row(tr("answer tokens"), "completion_tokens", "{:,}")
    row(tr("first token"), "ttft_seconds", "{:.2f} s")
    row(tr("prefill"), "prefill_tokens_per_second", "{:,.0f} tok/s")
    row(tr("decode"), "decode_tokens_per_second", "{:,.1f} tok/s")
    row(tr("end reason"), "finish_reason")
    row(tr("seed"), "seed")
    sampling = d.get("sampling") or {}
    if sampling:
        shown = [f"{k} {v:g}" for k, v in sampling.items() if isinstance(v, int | float) and not isinstance(v, bool)]
        table.append((tr("sampling"), ", ".join(s for s in shown if not s.startswith("seed"))))
    for name, value in (d.get("facts") or {}).items():
        if name in _MACHINE and value is not None:
            table.append((str(name), str(value)))
    if d.get("stretches"):
        table.append((tr("replay"), f"glmchat replay m{message.id}"))
    return table
