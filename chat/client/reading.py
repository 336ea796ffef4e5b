"""Server-sent events from bytes that may be cut anywhere: inside a line end, a character, a field name.

Follows the WHATWG event stream grammar as far as this API uses it: `data`, `event`, comments; LF, CRLF and CR.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from glmchat.chat.client.words import error_of, in_stream
from glmchat.core.errors import ServerFailed
from glmchat.core.language import tr
from glmchat.core.messages import Finished, FinishReason, Piece, Started, StreamEvent
from glmchat.core.text import one_line

ANSWER_LIMIT = 16 * 1024 * 1024  # bytes of a JSON answer
LINE_LIMIT = 16 * 1024 * 1024  # bytes of an event; a first chunk with the ids of a million-token prompt takes 8 MB
STREAM_LIMIT = 256 * 1024 * 1024  # bytes of one answer, streamed; each token takes some 300
PARTS = 200_000  # lists and objects in one JSON text: each takes some 60 bytes, whatever is in it


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event: its data lines joined, and its name ("message" where the server gives none)."""

    data: str
    name: str = "message"


@dataclass(frozen=True, slots=True)
class Comment:
    """A line that starts with a colon: keep-alive, or progress for those who know."""

    text: str


class EventParser:
    """Feed bytes, take events. Lines are cut as bytes and decoded whole, so no character is ever split."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # bytes of the buffer that hold no line end; keeps long lines linear
        self._data: list[str] = []
        self._size = 0  # characters of `_data`
        self._taken = 0  # bytes in all
        self._name = "message"
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[ServerEvent | Comment]:
        self._buffer += chunk
        self._taken += len(chunk)
        yield from self._lines(at_end=False)
        if len(self._buffer) + self._size > LINE_LIMIT:
            raise ServerFailed(
                tr("the server sent a line that does not end"),
                hint=tr("is this an OpenAI-compatible server?"),
                code="server.form",
            )
        if self._taken > STREAM_LIMIT:
            raise ServerFailed(
                tr("the server's answer does not end"),
                hint=tr("the answer so far is kept; try again"),
                code="server.form",
            )

    def end(self) -> Iterator[ServerEvent | Comment]:
        """What a server leaves behind that closes without the last blank line."""
        yield from self._lines(at_end=True)
        if self._buffer:
            yield from self._line(bytes(self._buffer))
            self._buffer.clear()
        yield from self._line(b"")

    def _lines(self, *, at_end: bool) -> Iterator[ServerEvent | Comment]:
        while True:
            positions = [p for p in (self._buffer.find(b, self._searched) for b in (b"\n", b"\r")) if p >= 0]
            if not positions:
                self._searched = len(self._buffer)
                return
            end = min(positions)
            width = 1
            if self._buffer[end] == 0x0D:
                if end + 1 == len(self._buffer) and not at_end:
                    self._searched = end  # the LF of this CRLF may be in the next chunk
                    return
                if self._buffer[end + 1 : end + 2] == b"\n":
                    width = 2
            line = bytes(self._buffer[:end])
            del self._buffer[: end + width]
            self._searched = 0
            yield from self._line(line)

    def _line(self, raw: bytes) -> Iterator[ServerEvent | Comment]:
        if self._first:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
            self._first = False
        line = raw.decode("utf-8", "replace")
        if not line:
            if self._data:
                yield ServerEvent("\n".join(self._data), self._name)
            self._data, self._size, self._name = [], 0, "message"
            return
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not field:
            yield Comment(value)
        elif field == "data":
            self._data.append(value)
            self._size += len(value) + 1
        elif field == "event":
            self._name = value


_REASONS: Mapping[str, FinishReason] = {"length": "length", "max_tokens": "length", "cancelled": "cancelled"}


@dataclass(frozen=True, slots=True)
class Progress:
    """What happens before the first piece. waiting: how many are served first (0: it is our turn).

    prefill_done of prefill_total: prompt tokens read so far.
    """

    waiting: int | None = None
    prefill_done: int | None = None
    prefill_total: int | None = None


class AnswerReader:
    """Turns the bytes of one answer into Started, Piece … and Finished. Times are measured from its construction."""

    def __init__(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        self.started = False
        self.finished = False
        self._parser = EventParser()
        self._on_progress = on_progress
        self._asked = time.monotonic()
        self._first: float | None = None
        self._reason: str | None = None
        self._usage: Mapping[str, Any] = {}
        self._timings: Mapping[str, Any] = {}
        self._facts: Mapping[str, Any] = {}
        self._thinking = False
        self._silent = True  # nothing was said that can be shown
        self._unread: set[str] = set()  # what was said instead

    def feed(self, part: bytes) -> Iterator[StreamEvent]:
        for event in self._parser.feed(part):
            yield from self._event(event)
            if self.finished:
                return

    def end(self) -> Iterator[StreamEvent]:
        """The connection ended. Without [DONE] that is fine if the answer had an end, and a failure if it had none."""
        if not self.finished:
            for event in self._parser.end():
                yield from self._event(event)
        if self.finished:
            return
        if self._reason is None and not self._usage:
            raise ServerFailed(
                tr("the connection closed before the answer was complete"),
                hint=tr("the answer so far is kept; try again"),
                code="server.broke",
            )
        yield from self._finish()

    def whole(self, data: Mapping[str, Any]) -> Iterator[StreamEvent]:
        """An answer that came in one piece, from a server that does not stream."""
        yield from self._data(data)
        if self._reason is None:
            raise ServerFailed(
                tr("the server's answer does not follow the API"),
                hint=tr("is this an OpenAI-compatible server?"),
                code="server.form",
            )
        yield from self._finish()

    def cancelled(self) -> Finished:
        self.finished = True
        return replace(self._summary(), finish_reason="cancelled")

    @staticmethod
    def with_ignored(event: Finished, names: list[str]) -> Finished:
        """Says which settings the server did not take: `facts["ignored"]`."""
        return replace(event, facts={**event.facts, "ignored": names})

    def _event(self, event: ServerEvent | Comment) -> Iterator[StreamEvent]:
        if isinstance(event, Comment):
            self._comment(event.text)
            return
        text = event.data.strip()
        if text == "[DONE]":
            yield from self._finish()
            return
        try:
            data = _read_json(text)
            said = list(self._data(data)) if isinstance(data, dict) else []
        except (ValueError, RecursionError):
            raise ServerFailed(
                tr("the server sent something that is not JSON"),
                hint=tr("is this an OpenAI-compatible server?"),
                code="server.form",
            ) from None
        yield from said

    def _comment(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        if name != "glmchat" or self._on_progress is None:
            return
        try:
            data = json.loads(rest)
            told = [_whole_number(data.get(name)) for name in ("waiting", "prefill", "of")]
        except (ValueError, AttributeError, RecursionError):  # a comment may hold anything
            return
        self._on_progress(Progress(*told))

    def _data(self, data: Mapping[str, Any]) -> Iterator[StreamEvent]:
        if problem := error_of(data):
            raise in_stream(problem)
        if not self.started:
            self.started = True
            ids = _ids(data.get("prompt_token_ids"))
            model = data.get("model")
            yield Started(
                model=model if isinstance(model, str) else None,
                prompt_ids=ids or None,
                prompt_tokens=len(ids) if ids else None,
            )
        for name, value in (("usage", "_usage"), ("timings", "_timings"), ("glmchat", "_facts")):
            if isinstance(data.get(name), dict):
                setattr(self, value, data[name])
        choices = data.get("choices")
        if isinstance(choices, list) and choices and isinstance(choices[0], dict):
            facts = data.get("glmchat")
            yield from self._choice(choices[0], facts if isinstance(facts, dict) else {})

    def _choice(self, choice: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[StreamEvent]:
        delta = choice.get("delta") or choice.get("message")
        delta = delta if isinstance(delta, dict) else {}
        text = ""
        for thought, said in parts_of(
            delta.get("reasoning_content") or delta.get("reasoning") or delta.get("thinking")
        ):
            text += self._with_thought("", thought + said)
        for thought, said in parts_of(delta.get("content", choice.get("text"))):
            text += self._with_thought(said, thought)
        text += self._with_thought("".join(said for _, said in parts_of(delta.get("refusal"))), "")
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self._reason = reason
            if self._thinking:
                text += self._close_thought()
        ids = _ids(choice.get("token_ids"))
        self._silent = self._silent and not text and not ids
        self._unread |= {name for name in ("tool_calls", "function_call", "audio", "images") if delta.get(name)}
        self._unread |= unread_kinds(delta.get("content"))
        if text or ids:
            self._first = self._first or time.monotonic()
            yield Piece(text, ids, facts)

    def _with_thought(self, content: str, thought: str) -> str:
        """A reasoning model's thoughts come in a field of their own: shown the way models without one write them."""
        text = ""
        if thought:
            text += thought if self._thinking else "<think>\n" + thought
            self._thinking = True
        if content and self._thinking:
            text += self._close_thought()
        return text + content

    def _close_thought(self) -> str:
        self._thinking = False
        return "\n</think>\n\n"

    def _finish(self) -> Iterator[StreamEvent]:
        self.finished = True
        unread = self._unread or ({"content_filter"} if self._reason == "content_filter" else set())
        if self._silent and unread:
            raise ServerFailed(
                tr("the server's answer holds nothing that can be shown: {kinds}", kinds=", ".join(sorted(unread))),
                hint=tr("ask it for text, or ask otherwise"),
                code="server.no_text",
            )
        if not self.started:
            self.started = True
            yield Started()
        yield self._summary()

    def _summary(self) -> Finished:
        usage, timings, facts = self._usage, self._timings, self._facts
        details = usage.get("prompt_tokens_details")
        cached = facts.get("cached_n", details.get("cached_tokens") if isinstance(details, dict) else None)
        load = _number(facts.get("load_ms"))
        seed = _whole_number(facts.get("seed"))
        rest = dict(facts)
        if self._reason and self._reason not in ("stop", "length"):
            rest["finish_reason"] = self._reason
        return Finished(
            finish_reason=None if self._reason is None else _REASONS.get(self._reason, "stop"),
            prompt_tokens=_whole_number(usage.get("prompt_tokens")),
            completion_tokens=_whole_number(usage.get("completion_tokens")),
            cached_tokens=_whole_number(cached if cached is not None else timings.get("cache_n")),
            ttft_seconds=None if self._first is None else self._first - self._asked,
            prefill_tokens_per_second=_speed(timings.get("prompt_n"), timings.get("prompt_ms")),
            # One token takes no time to decode: it came with the prefill.
            decode_tokens_per_second=_speed(timings.get("predicted_n"), timings.get("predicted_ms"), least=2),
            load_seconds=None if load is None else load / 1000,
            seed=seed,
            facts=rest,
        )


def parts_of(content: Any) -> Iterator[tuple[str, str]]:
    """(thought, text) of each part of a message: content is a text, a part, or a list of parts.

    Mistral's thinking parts hold a text or a list of text parts, Anthropic's a text; a part that is neither text nor
    thought nor refusal (a reference, a picture, the call of a tool) says nothing that could be shown.
    """
    if isinstance(content, str):
        yield "", content
    elif isinstance(content, list):
        for part in content:
            yield from parts_of(part)
    elif isinstance(content, dict):
        kind = content.get("type")
        if kind in ("thinking", "reasoning", "reasoning_content"):
            inner = next(
                (content[name] for name in ("thinking", "reasoning", "text", "content") if name in content), ""
            )
            yield "".join(thought + said for thought, said in parts_of(inner)), ""
        elif kind == "refusal":
            yield from parts_of(content.get("refusal"))
        elif kind in ("text", "output_text", None):
            said = content.get("text", content.get("content"))
            yield from parts_of(said.get("value") if isinstance(said, dict) and "value" in said else said)


def unread_kinds(content: Any) -> set[str]:
    """Kinds of the parts that cannot be shown."""
    parts = content if isinstance(content, list) else [content]
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    return kinds - {"text", "output_text", "thinking", "reasoning", "reasoning_content", "refusal", "None"}


def _ids(value: Any) -> tuple[int, ...]:
    return tuple(i for i in value if isinstance(i, int) and 0 <= i < 1 << 31) if isinstance(value, list) else ()


def _number(value: Any) -> float | None:
    """None too for what no float holds: JSON can spell 1e999 and integers of 400 digits."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e300 < value < 1e300:
        return None
    return float(value)


def _whole_number(value: Any) -> int | None:
    """A count or a seed; None for one that no honest server sends, and that no database takes."""
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    return value if good else None


def _speed(count: Any, milliseconds: Any, least: int = 1) -> float | None:
    tokens, time_taken = _number(count), _number(milliseconds)
    return None if tokens is None or tokens < least or not time_taken else tokens * 1000 / time_taken


def read_body(answer: httpx2.Response) -> bytes:
    """The whole body, where it has an end. Raises ServerFailed."""
    body = bytearray()
    for part in plain_parts(answer):
        body += part
        if len(body) > ANSWER_LIMIT:
            raise ServerFailed(
                tr("the server's answer does not end"),
                hint=tr("is this an OpenAI-compatible server?"),
                code="server.form",
            )
    return bytes(body)


def plain_parts(answer: httpx2.Response) -> Iterator[bytes]:
    """The bytes of a body as they come. Nothing compressed was asked for: a few kilobytes could unfold to gigabytes.

    Raises ServerFailed.
    """
    coding = answer.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise ServerFailed(
            tr("the server's answer is compressed ({coding}), which was not asked for", coding=one_line(coding, 40)),
            hint=tr("switch compression off in the server, or in the gateway before it"),
            code="server.form",
        )
    yield from answer.iter_raw()


def json_object(text: bytes) -> dict[str, Any]:
    """Empty for what is no JSON object."""
    try:
        data = _read_json(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _read_json(text: str) -> Any:
    """Half characters, which JSON can spell and no database takes, are replaced. Raises ValueError, RecursionError."""
    if text.count("[") + text.count("{") > PARTS:
        raise ValueError("too many lists and objects")
    data = json.loads(text)
    if _HALF.search(text):
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    return data


_HALF = re.compile(r"\\u[dD][89a-fA-F]")
