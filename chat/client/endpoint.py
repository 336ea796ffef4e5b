"""The one client of the API: our own engine over its Unix socket, or any OpenAI-compatible server.

What a server does not send is None, never guessed. To stop an answer, close the generator that `stream` returned; from
another thread, call `Stop.now()` on the Stop that was given to it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakSet

import httpx2

from glmchat.chat.client.reading import AnswerReader, Progress, json_object, plain_parts, read_body
from glmchat.chat.client.request import (
    EXTENSIONS,
    Stop,
    adapter_fields,
    header_key,
    messages_json,
    sampling_fields,
)
from glmchat.chat.client.words import Health, ModelRow, broken, error_of, health_of, rows_of, status_error
from glmchat.core.errors import EngineDied, GlmchatError, Interrupted, ServerFailed, Usage
from glmchat.core.http import make_client
from glmchat.core.http_bounds import result_of
from glmchat.core.language import language, tr
from glmchat.core.messages import Finished, Message, Sampling, StreamEvent
from glmchat.core.servers import api_url
from glmchat.core.text import one_line, whole_text

__all__ = ["Endpoint", "Health", "ModelRow", "Progress", "Stop"]

ASK_SECONDS = 15.0  # for a question that costs a server nothing
PROGRESS = "X-Glmchat-Progress"  # asks our own server for the SSE comments that `Progress` is read from
_asked: WeakSet[Stop] = WeakSet()  # of the questions of this process that are not answered yet
SILENCE = 600.0  # seconds a foreign server may take over a long prompt without sending a byte


class Endpoint:
    """base_url: of any OpenAI-compatible server, with or without /v1; or `uds`, the socket of our own engine.

    key: sent as a bearer token. model: None until `choose_model` (our own engine needs none). Thread-safe: every call
    makes its own connection, so one may stop an answer and ask for health meanwhile.
    """

    def __init__(
        self, base_url: str | None = None, *, uds: str | None = None, key: str | None = None, model: str | None = None
    ) -> None:
        if (base_url is None) == (uds is None):
            raise Usage(tr("an endpoint is a URL or a Unix socket"), hint=tr("give one of the two"), code="server.url")
        self.uds = uds
        self.url = "http://localhost/v1" if uds else api_url(str(base_url))
        self.model = model
        self._key = header_key(key)
        self.broke = False  # a connection to our own engine broke: it may be dying
        self._ours: bool | None = True if uds else None  # None: not asked yet

    def __repr__(self) -> str:  # never the key
        return f"Endpoint({self.uds or self.url!r}, model={self.model!r})"

    @property
    def is_local(self) -> bool:
        """Our own child over its socket."""
        return self.uds is not None

    @property
    def is_glmchat(self) -> bool:
        """The server is glmchat's, so that it knows the extensions. Asks `/v1/models` the first time."""
        if self._ours is None:
            self._greet(None)
        return bool(self._ours)

    def _greet(self, stop: Stop | None) -> None:
        """Learn whether the server is ours. One that lists no models is none, and may be chatted with all the same."""
        try:
            self.models(stop)
        except ServerFailed:
            self._ours = False

    # What the server is and has.

    def health(self) -> Health:
        """Our server's `/health`; of a foreign one, "ok" if it answers at all. Raises NetworkFailed or EngineDied."""
        try:
            status, _, text = self._answer("GET", self._root + "/health", None, 10.0, None)
            return health_of(json_object(text), status)
        except (httpx2.HTTPError, OSError, GlmchatError) as error:
            raise self._broken(error, answering=False) from None

    def models(self, stop: Stop | None = None) -> list[ModelRow]:
        """What `/v1/models` lists. Raises ServerFailed or NetworkFailed."""
        rows = rows_of(self._ask("GET", self.url + "/models", timeout=ASK_SECONDS, stop=stop))
        if self._ours is None:
            self._ours = any(row.owner == "glmchat" for row in rows)
        return rows

    def choose_model(self, name: str | None = None, stop: Stop | None = None) -> str:
        """The model to ask for: the one named, else the only base model that the server has. Remembers it.

        A name that the list does not hold is believed: servers have aliases. Raises Usage where there is a choice.
        """
        if name is None:
            names = [row.name for row in self.models(stop) if row.parent is None]
            if len(names) != 1:
                shown = ", ".join(one_line(n, 60) for n in names[:20]) or tr("none")
                raise Usage(
                    tr("the server has {n} models, name one", n=len(names)),
                    hint=tr("it has: {names}", names=shown),
                    code="server.choose_model",
                )
            name = names[0]
        self.model = name
        return name

    def tokenize(
        self,
        text: str | Sequence[Message],
        *,
        continue_final: bool = False,
        template_variables: Mapping[str, Any] | None = None,
        adapters: Sequence[tuple[str, float]] | None = None,
    ) -> list[int]:
        """Ids of a text, or of a rendered conversation. Our own server only (and vLLM's). Raises ServerFailed."""
        body: dict[str, Any] = (
            {"prompt": whole_text(text)} if isinstance(text, str) else {"messages": messages_json(text)}
        )
        if continue_final:
            body["continue_final"] = True
        if template_variables:
            body["chat_template_kwargs"] = dict(template_variables)
        if self.model:
            body["model"] = self.model
        if adapters:  # one may bring a chat template of its own
            body |= adapter_fields(adapters, ours=True)
        ids = self._ask("POST", self._root + "/tokenize", body).get("tokens")
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise ServerFailed(
                tr("the server cannot count tokens"), hint=tr("only glmchat and vLLM servers can"), code="server.form"
            )
        return ids

    def load_adapter(self, name: str) -> None:
        """Attach an adapter by its name in the server's store. Raises what the server raised."""
        self._ask("POST", self.url + "/load_lora_adapter", {"lora_name": name})

    def unload_adapter(self, name: str) -> None:
        self._ask("POST", self.url + "/unload_lora_adapter", {"lora_name": name})

    # Answers.

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
        """One answer to a conversation: Started, Piece …, Finished. Close the generator to stop it.

        adapters: (store name, scale); None leaves them to the server, () means none. continue_final: the last message
        is an answer to be continued; continue_ids: its exact ids, where they are known (our own server).
        asked: the fields of `sampling` that somebody set; what else is in it stays with a server that is not our child.
        conversation: the name under which our own engine may keep its cache on the disk (`History.cache_name`).
        on_progress: told of the place in the server's line and of the prefill; called in the caller's thread.
        Raises EngineDied, NetworkFailed, ServerFailed, or what our own server raised (DoesNotFit, Usage, …).
        """

        def body() -> dict[str, Any]:
            fields = {**self._fields(sampling, adapters, asked, conversation), "messages": messages_json(messages)}
            if continue_final and self.is_glmchat:
                fields["continue_final"] = True
                if continue_ids:
                    fields["continue_token_ids"] = list(continue_ids)
            elif continue_final:  # vLLM's and transformers' names for the same
                fields |= {"continue_final_message": True, "add_generation_prompt": False}
            return fields

        return self._stream("/chat/completions", body, stop or Stop(), on_progress)

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
        """Completion mode: the continuation of a text (or of ids), without a chat template."""

        def body() -> dict[str, Any]:
            text = whole_text(prompt) if isinstance(prompt, str) else list(prompt)
            # A completion that names no limit has 16 tokens, as OpenAI's; ours is asked for all there is room for.
            unlimited = {"max_tokens": -1} if self.is_glmchat and sampling.max_tokens is None else {}
            return {**self._fields(sampling, adapters, asked, conversation), **unlimited, "prompt": text}

        return self._stream("/completions", body, stop or Stop(), on_progress)

    def _fields(
        self,
        sampling: Sampling,
        adapters: Sequence[tuple[str, float]] | None,
        asked: Collection[str] | None,
        conversation: str | None,
    ) -> dict[str, Any]:
        model = {"model": self.model} if self.model else {}
        keep = {"keep_as": conversation} if conversation is not None and self.is_local else {}
        if adapters and not self.is_glmchat:  # elsewhere (vLLM) an adapter is asked for as a model
            if len(adapters) > 1 or adapters[0][1] != 1:
                raise Usage(
                    tr("this server takes one adapter, with the weight 1"),
                    hint="/adapter NAME",
                    code="server.one_adapter",
                )
            model, adapters = {"model": adapters[0][0]}, None
        return {
            **model,
            **sampling_fields(sampling, ours=self.is_glmchat, asked=None if self.is_local else asked),
            **adapter_fields(adapters, ours=self.is_glmchat),
            **keep,
        }

    def _stream(
        self,
        path: str,
        make_body: Callable[[], dict[str, Any]],
        stop: Stop,
        on_progress: Callable[[Progress], None] | None,
    ) -> Generator[StreamEvent, None, None]:
        reader = AnswerReader(on_progress)
        try:
            if self._ours is None and not stop.is_set:
                self._greet(stop)
        except GlmchatError:
            if not stop.is_set:
                raise
        if stop.is_set:
            yield reader.cancelled()
            return
        body = make_body()
        ignored: list[str] = []
        while True:
            try:
                with contextlib.closing(self._one_stream(path, body, stop, reader)) as events:
                    for event in events:
                        if isinstance(event, Finished) and ignored:
                            event = reader.with_ignored(event, ignored)
                        yield event
                return
            except _Refused as refused:
                if "continue_final_message" in body and "continue_final_message" in refused.text:
                    raise ServerFailed(
                        tr("this server cannot resume an unfinished answer"),
                        hint=tr("/regen asks for another answer"),
                        code="server.cannot_continue",
                    ) from None
                # transformers serve and api.openai.com refuse fields that they do not know; said in the last event.
                extra = [name for name in (*EXTENSIONS, "seed", "stream_options") if name in body]
                named = [name for name in extra if name in refused.text]
                if self.is_glmchat or not named:
                    raise refused.error from None
                for name in named:
                    del body[name]
                ignored += [name for name in named if name != "stream_options"]

    def _one_stream(
        self, path: str, body: Mapping[str, Any], stop: Stop, reader: AnswerReader
    ) -> Generator[StreamEvent, None, None]:
        client = self._client(None if self.uds else SILENCE)  # an engine's end closes its socket
        try:
            with client, contextlib.ExitStack() as opened:
                asked = self._open(client, path, body, stop)
                answer = result_of(lambda: opened.enter_context(asked), lambda: stop.is_set)
                if answer.status_code != 200:
                    text = read_body(answer)
                    error = self._refusal(answer.status_code, answer.headers, text)
                    if answer.status_code in (400, 422):
                        raise _Refused(error, text.decode("utf-8", "replace"))
                    raise error
                kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
                if kind == "application/json":  # a server that does not stream answers at once
                    yield from reader.whole(json_object(read_body(answer)))
                    return
                if "html" in kind:
                    raise status_error(200, answer.headers, read_body(answer), self.url)
                for part in plain_parts(answer):
                    for event in reader.feed(part):
                        yield event
                        if stop.is_set and not reader.finished:
                            yield reader.cancelled()
                    if reader.finished:
                        return
                yield from reader.end()
        except (httpx2.HTTPError, httpx2.StreamError, OSError, ServerFailed, Interrupted) as error:
            if stop.is_set:
                yield reader.cancelled()
                return
            if isinstance(error, _Refused):
                raise
            raise self._broken(error, answering=reader.started) from None

    def _open(
        self, client: httpx2.Client, path: str, body: Mapping[str, Any], stop: Stop
    ) -> AbstractContextManager[httpx2.Response]:
        return client.stream(
            "POST",
            self.url + path,
            content=json.dumps(body).encode(),
            headers={
                **self._headers(),
                "Content-Type": "application/json",
                "Accept": "text/event-stream",
                **({PROGRESS: "1"} if self.is_glmchat else {}),
            },
            extensions={"trace": stop.watch},
        )

    # Plumbing.

    @property
    def _root(self) -> str:
        return self.url.rpartition("/")[0]

    def _client(self, timeout: float | None) -> httpx2.Client:
        return make_client(uds=self.uds, timeout=timeout, headers={"Accept-Encoding": "identity"})

    def _broken(self, error: Exception, *, answering: bool) -> GlmchatError:
        problem = broken(error, self.url, local=self.is_local, answering=answering)
        self.broke = self.broke or isinstance(problem, EngineDied)
        return problem

    def _headers(self) -> dict[str, str]:
        if self.is_local:  # other windows may use the same engine in another language
            return {"Accept-Language": language()}
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _refusal(self, status: int, headers: httpx2.Headers, text: bytes) -> GlmchatError:
        return status_error(status, headers, text, self.url, keyed=self._key is not None)

    def _answer(
        self, method: str, url: str, body: Mapping[str, Any] | None, seconds: float, stop: Stop | None
    ) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body, complete within `seconds`, also where each of its bytes comes in time.

        Raises Interrupted as soon as `stop` is set, ServerFailed, and what httpx2 and the system raise.
        """
        headers = {**self._headers(), **({"Content-Type": "application/json"} if body is not None else {})}
        content = None if body is None else json.dumps(body).encode()
        own = Stop()

        def ask() -> tuple[int, httpx2.Headers, bytes]:
            trace = {"trace": own.watch}
            with (
                self._client(seconds) as client,
                client.stream(method, url, content=content, headers=headers, extensions=trace) as answer,
            ):
                return answer.status_code, answer.headers, read_body(answer)

        _asked.add(own)
        try:
            return result_of(ask, lambda: own.is_set or (stop is not None and stop.is_set), seconds)
        except TimeoutError:
            raise httpx2.ReadTimeout("it took too long") from None
        finally:
            own.now()  # a thread that was left behind has nothing more to read, once it is connected
            _asked.discard(own)

    def _ask(
        self,
        method: str,
        url: str,
        body: Mapping[str, Any] | None = None,
        timeout: float = 60.0,
        stop: Stop | None = None,
    ) -> dict[str, Any]:
        try:
            status, headers, text = self._answer(method, url, body, timeout, stop)
        except (httpx2.HTTPError, httpx2.StreamError, OSError) as error:
            raise self._broken(error, answering=False) from None
        if status != 200 or text.lstrip()[:1] == b"<":
            raise self._refusal(status, headers, text)
        data = json_object(text)
        if problem := error_of(data):
            raise problem
        return data


def hang_up() -> None:
    """End every question of this process that some server has not answered: nobody waits for the answers any more."""
    for stop in list(_asked):
        stop.now()


class _Refused(ServerFailed):
    """A 400 or 422: perhaps only for a field that the server does not know."""

    def __init__(self, error: GlmchatError, text: str) -> None:
        super().__init__(error.message, hint=error.hint, code=error.code)
        self.error, self.text = error, text
