"""An endpoint inside the test's own process: says what it was told to say, one character of the prompt a token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any

from polling import wait_until

from glmchat.chat.client.endpoint import Endpoint, Progress, Stop
from glmchat.core.errors import DoesNotFit, EngineDied, GlmchatError, ServerFailed
from glmchat.core.messages import Finished, Message, Piece, Sampling, Started, StreamEvent


class LocalSpeaker(Endpoint):
    """Answers with `pieces`, one token each.

    fail_after: raises `failure` after so many. counts: False if it has no /tokenize and tells no prompt's ids.
    context: tokens; a prompt that fills it is refused as our own server does. refuse_over: a server that refuses a
    longer request in its own words. Every request is kept in `asked`, every count in `counted`.
    """

    def __init__(
        self,
        *pieces: str,
        seconds: float = 0.0,
        finish: str = "stop",
        fail_after: int | None = None,
        failure: GlmchatError | None = None,
        counts: bool = True,
        is_local: bool = True,
        refuse_over: int | None = None,
        context: int | None = None,
        silent: bool = False,
    ) -> None:
        super().__init__(uds="/nowhere")
        self.pieces = pieces or ("one ", "two")
        self.seconds = seconds
        self.finish = finish
        self.fail_after = fail_after
        self.failure = failure or EngineDied("the engine went away", hint="start it again")
        self.counts = counts
        self.local = is_local
        self.context = context
        self.refuse_over = refuse_over
        self.silent = silent
        self.asked: list[dict[str, Any]] = []
        self.counted: list[int] = []
        self.closed = 0

    @property
    def is_local(self) -> bool:
        return self.local

    def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        continue_final: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        adapters: Sequence[tuple[str, float]] | None = None,
    ) -> list[int]:
        if not self.counts:
            raise ServerFailed("no such address", hint="", code="server.not_found")
        self.counted.append(count(text))
        return [0] * count(text)

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling,
        adapters: Sequence[tuple[str, float]] | None = None,
        continue_final: bool = False,
        *,
        continue_ids: Sequence[int] = (),
        asked: Collection[str] | None = None,
        conversation: str | None = None,
        stop: Stop | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generator[StreamEvent, None, None]:
        self.asked.append(
            {
                "messages": list(messages),
                "sampling": sampling,
                "adapters": adapters,
                "continue_final": continue_final,
                "continue_ids": tuple(continue_ids),
                "asked": asked,
                "conversation": conversation,
            }
        )
        if self.refuse_over is not None and count(messages) > self.refuse_over:
            raise ServerFailed("This model's maximum context length is exceeded", hint="", code="server.refused")
        if self.context is not None and count(messages) >= self.context:
            words = f"the prompt has {count(messages)} tokens, but the context holds only {self.context}"
            raise DoesNotFit(words, hint="shorten it", code="context.full")
        try:
            yield Started("spoken-model", prompt_tokens=count(messages) if self.counts else None)
            wait_until(lambda: not self.silent or (stop and stop.is_set))
            for number, piece in enumerate(() if self.silent else self.pieces):
                if stop and stop.is_set:
                    break
                if number == self.fail_after:
                    raise self.failure
                time.sleep(self.seconds)
                yield Piece(piece, (number,))
            reason: Any = "cancelled" if stop and stop.is_set else self.finish
            yield Finished(reason, completion_tokens=len(self.pieces), seed=7, facts={"kernel": "spoken"})
        finally:
            self.closed += 1

    def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        adapters: Sequence[tuple[str, float]] | None = None,
        *,
        asked: Collection[str] | None = None,
        conversation: str | None = None,
        stop: Stop | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Generator[StreamEvent, None, None]:
        return self.stream([Message("text", str(prompt))], sampling, adapters, conversation=conversation, stop=stop)


def count(text: str | Sequence[Message]) -> int:
    return len(text) if isinstance(text, str) else sum(len(m.content) for m in text)
