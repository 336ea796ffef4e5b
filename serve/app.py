"""The routes: the OpenAI API, vLLM's adapter calls, /tokenize and /health, over one Host."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from glmchat import __version__
from glmchat.core.decoding import PLAIN
from glmchat.core.errors import DoesNotFit, FieldError, GlmchatError, ServerFailed, UnknownModel, Usage
from glmchat.core.language import answer_in, tr
from glmchat.core.text import one_line
from glmchat.serve import fields, wire
from glmchat.serve.answer import Answer, Said, Silence
from glmchat.serve.face import EngineFace
from glmchat.serve.fields import fields_of_variables, invalid, template_variables, unread_variable
from glmchat.serve.guard import Guard
from glmchat.serve.host import Busy, Host, StillLoading
from glmchat.serve.leases import Leases
from glmchat.serve.render import (
    Rendering,
    comment,
    error_json,
    metrics_text,
    model_json,
    models_json,
    sse,
    status_of,
    to_bytes,
)
from glmchat.serve.wire import GenerationRequest

PROGRESS = "x-glmchat-progress"  # a client that sends this header reads SSE comments; others may stumble over them
PATIENCE = 10.0  # seconds of silence after which any other client is sent a chunk that says nothing

T = TypeVar("T")
Parse = Callable[[Mapping[str, Any], Mapping[str, Any]], GenerationRequest]


def build_app(
    host: Host, *, key: str | None = None, hosts: Iterable[str] | None = None, leases: Leases | None = None
) -> ASGIApp:
    """The ASGI application. `key` None asks for none; `hosts` are the names a request may call us by, None for any.

    leases: of an engine that several programs share.
    """
    routes = _Routes(host)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/metrics", routes.metrics),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
            Route("/detokenize", routes.detokenize, methods=["POST"]),
            Route("/tokenizer_info", routes.tokenizer_info),
            *(leases.routes() if leases else ()),
        ],
        exception_handlers={GlmchatError: _refusal, HTTPException: _http_refusal, Exception: _unexpected},
    )
    return Guard(_one_slash(app if hosts is not None else _in_their_language(app)), key, hosts)


def _one_slash(app: ASGIApp) -> ASGIApp:
    """A base address that was typed with a slash at its end makes clients ask for `/v1//models`: runs of slashes are
    one, as in nginx, and one at the end is none.
    """

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        path = re.sub(r"/{2,}", "/", scope["path"])
        scope = {**scope, "path": path.rstrip("/") or "/"}
        await app({**scope, "raw_path": quote(scope["path"]).encode()}, receive, send)

    return call


def _in_their_language(app: ASGIApp) -> ASGIApp:
    """Over the private socket several windows share an engine, each with a language of its own, which it names."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        names = dict(scope["headers"]).get(b"accept-language", b"")
        answer_in(names[:2].decode("latin-1").lower())
        await app(scope, receive, send)

    return call


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_bytes(data), status, {"Server": f"glmchat/{__version__}", **(headers or {})}, "application/json")


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, GlmchatError)
    headers = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, StillLoading):
        headers["Retry-After"] = "1"
    return _json(error_json(error, request.url.path), status_of(error), headers)


_NOT_SERVED = {  # addresses of OpenAI's, vLLM's and Ollama's APIs, and what they are for
    "embeddings": "embeddings", "embed": "embeddings", "responses": "the Responses API's answers",
    "messages": "Anthropic's messages", "moderations": "moderations", "images": "images", "audio": "speech and sound",
    "rerank": "rankings", "score": "scores", "batches": "batches", "files": "files", "fine_tuning": "fine-tuning jobs",
    "assistants": "assistants", "threads": "threads", "api/": "Ollama's own addresses",
}  # fmt: skip


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = one_line(request.url.path, 200)
    other = next((what for name, what in _NOT_SERVED.items() if f"/{name}" in path), None)
    words = {
        404: (
            f"there is nothing at {path}" if other is None else f"{other} are not served: there is nothing at {path}",
            "the API is under /v1: /v1/chat/completions, /v1/completions, /v1/models",
        ),
        405: (f"{request.method} is not for {one_line(request.url.path)}", "see the Allow header"),
        413: ("the body is too large", f"at most {wire.BODY_LIMIT // 2**20} MiB"),
        415: (f"bodies compressed with {one_line(str(error.detail), 40)} are not supported", "send it as it is"),
    }
    message, hint = words.get(error.status_code, (str(error.detail), ""))
    usage = Usage(message, hint=hint, code=f"request.http_{error.status_code}")
    return _json(error_json(usage), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    """A mistake of ours. uvicorn logs its traceback; the client is told that there is one."""
    words = tr("the server failed over this request: {kind}", kind=type(error).__name__)
    bug = ServerFailed(words, hint=tr("see the engine's log for details"), code="server.bug")
    return _json(error_json(bug), 500)


class _Routes:
    def __init__(self, host: Host) -> None:
        self._host = host

    async def health(self, request: Request) -> Response:
        host = self._host
        if host.error:
            return _json({"status": "failed", "error": host.error.to_json()}, 500)
        if host.engine is None:
            loading = {"status": "loading", "stage": host.stage, "done": round(host.done, 4)}
            return _json(loading, 503, {"Retry-After": "1"})
        return _json({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(metrics_text(self._host), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        return _json(models_json(self._host))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        row = model_json(self._host, name)
        if row is None:
            raise self._unknown(name)
        return _json(row)

    def _unknown(self, name: str) -> UnknownModel:
        host = self._host
        return UnknownModel(
            tr("the model {name} is not served here", name=one_line(repr(name), 80)),
            hint=tr("models served: {names}", names=one_line(", ".join([host.model, *host.adapters()]))),
            code="model_not_found",
        )

    async def chat(self, request: Request) -> Any:
        return await self._generate(request, wire.parse_chat)

    async def completions(self, request: Request) -> Any:
        return await self._generate(request, wire.parse_completion)

    async def tokenize(self, request: Request) -> Response:
        """vLLM's form (`prompt` or `messages`), llama-server's (`content`), or `text`.

        A text is plain text. Only one that is nothing but a mark that `/tokenizer_info` names, asked for with
        `add_special_tokens: false`, is that mark's id: so harnesses ask for the ids.
        """
        host = self._host
        engine = host.ready()

        def parse(data: dict[str, Any]) -> Callable[[], list[int]]:
            named = wire.parse_adapters(data.get("adapters"))
            name = data.get("model")  # what vLLM names an adapter by
            folders = host.folders({name: 1.0} if named is None and isinstance(name, str) else named or {})
            if "messages" not in data:
                name = next((name for name in ("prompt", "text", "content") if name in data), "prompt")
                text = data.get(name)
                if not isinstance(text, str):
                    raise invalid("a text or messages are needed", '{"prompt": "Hello"} or {"messages": [...]}', name)
                if data.get("add_special_tokens") is False:
                    ids = dict(engine.marks().values())
                    if text in ids:
                        return lambda: [ids[text]]
                return lambda: engine.tokenize(text, folders)
            messages, variables = wire.parse_messages(data), template_variables(data)
            render = engine.render if wire.continues(data) is None else engine.render_open
            told_in.update(fields_of_variables(data))
            return lambda: render(messages, variables, folders)

        told_in: dict[str, str] = {}
        count, long = await self._parsed(request, parse)
        try:
            ids = await host.text.do(count, long=long)
        except FieldError as error:
            raise unread_variable(error, told_in) from None
        return _json({"count": len(ids), "tokens": ids, "max_model_len": engine.context})

    async def detokenize(self, request: Request) -> Response:
        """vLLM's form: `tokens`, in the words of an adapter that `model` may name."""
        host = self._host
        engine = host.ready()

        def parse(data: dict[str, Any]) -> Callable[[], str]:
            ids, name = fields.ids(data, "tokens"), data.get("model")
            folders = host.folders({name: 1.0} if isinstance(name, str) else {})

            def text() -> str:
                engine.decoder(PLAIN, ids, folders)  # refuses ids that are none of this vocabulary
                return engine.detokenize(ids, folders)

            return text

        text, long = await self._parsed(request, parse)
        return _json({"prompt": await host.text.do(text, long=long)})

    async def tokenizer_info(self, request: Request) -> Response:
        """vLLM's form, by which evaluation harnesses know that `/tokenize` and `/detokenize` are here.

        No chat template is told: a client would render it to a text, and the marks in that would be read as letters.
        """
        names = {mark: name for mark, (name, _) in self._host.ready().marks().items()}
        found = {"bos_token": names.get("bos_token"), "eos_token": names.get("eos_token"), "pad_token": None}
        return _json({"tokenizer_class": "glmchat", **found, "chat_template": None})

    async def load_adapter(self, request: Request) -> Response:
        name = await self._adapter_name(request)
        await self._in_turn(lambda: self._host.attach(name))
        return _json({"status": "ok", "name": name})

    async def unload_adapter(self, request: Request) -> Response:
        name = await self._adapter_name(request)
        await self._in_turn(lambda: self._host.detach(name))
        return _json({"status": "ok", "name": name})

    async def _adapter_name(self, request: Request) -> str:
        data, _ = await self._parsed(request, dict)
        self._host.ready()
        name = data.get("lora_name")
        if not isinstance(name, str) or not name:
            raise invalid("lora_name must be a text", '{"lora_name": "my-lora"}', "lora_name")
        if data.get("lora_path") not in (None, "", name):
            raise invalid(
                "adapters are loaded by their name in the store, never by a path",
                "glmchat adapters add PATH",
                "lora_path",
            )
        return name

    async def _in_turn(self, work: Callable[[], None]) -> None:
        """Adapters are changed between answers, never under one."""
        place = self._host.line.join()
        try:
            async for _ in place.turns():
                pass
            await self._host.call(work)
        finally:
            place.leave()

    async def _parsed(self, request: Request, parse: Callable[[dict[str, Any]], T]) -> tuple[T, bool]:
        """What a body says, and whether it is so long that what is done with it may take seconds."""
        body = await _body(request)
        long = len(body) > _LONG
        if not long:
            return parse(wire.parse_json(body)), False
        return await self._host.text.do(lambda: parse(wire.parse_json(body)), long=True), True

    async def _generate(self, request: Request, parse: Parse) -> Any:
        host = self._host
        host.ready()
        generation, long = await self._parsed(request, lambda data: parse(data, host.sampling))
        adapters = self._adapters(generation)
        place = host.line.join()
        try:
            folders = host.folders(adapters)
            prompts, continued = await self._prompts(generation, folders, long=long)
            engine = host.ready()
            _check_rows(generation, prompts)
            for ids in prompts:
                _check_length(len(ids), engine.context)
                if (
                    generation.decoding != PLAIN or generation.brings_ids
                ):  # what is wrong is said before a stream begins
                    has_form = generation.decoding.grammar is not None
                    await host.text.do(partial(engine.decoder, generation.decoding, ids, folders), long=has_form)
            echoes = await host.text.do(lambda: _echoes(engine, generation, folders), long=long)
            return _Response(Answer(host, place, generation, prompts, adapters, continued, echoes), request)
        except FieldError as error:
            place.leave()
            raise unread_variable(error, generation.variables_in) from None
        except BaseException:
            place.leave()
            raise

    def _adapters(self, generation: GenerationRequest) -> dict[str, float]:
        host, name = self._host, generation.model
        if (
            name is not None
            and name not in (host.model, f"{host.model}@{host.revision}")
            and not host.has_adapter(name)
        ):
            raise self._unknown(name)
        if generation.adapters is not None:
            for adapter in generation.adapters:
                if not host.has_adapter(adapter):
                    raise UnknownModel(
                        tr("there is no adapter {adapter} in the store", adapter=one_line(repr(adapter), 80)),
                        hint=tr("known names: {names}", names=one_line(", ".join(host.adapters())) or tr("none")),
                        code="adapter.unknown",
                    )
            return dict(generation.adapters)
        named = name is not None and name not in (host.model, f"{host.model}@{host.revision}")
        return {str(name): 1.0} if named else {}

    async def _prompts(
        self, generation: GenerationRequest, folders: Sequence[Path], *, long: bool
    ) -> tuple[list[list[int]], int]:
        """The ids of each prompt, and how many at the end of a conversation are the answer so far.

        folders: of the adapters that will answer. long: the request is, so this may take time. Rendering and tokenising
        need no torch and no turn: they are done beside an answer that is being made.
        """
        engine, messages, do = self._host.ready(), generation.messages, self._host.text.do
        variables = generation.sampling.template_variables
        if messages is None:
            prompts = []
            for prompt in generation.prompts:
                if isinstance(prompt, str):
                    if len(prompt) > _HOPELESS * engine.context:
                        await self._refuse_hopeless([prompt], len(prompt))
                    prompts.append(await do(partial(engine.complete, prompt, folders), long=long))
                else:
                    prompts.append(list(prompt))
            return prompts, 0
        texts = [message.content for message in messages]
        if (size := sum(map(len, texts))) > _HOPELESS * engine.context or len(texts) > engine.context:
            await self._refuse_hopeless(texts, size)
        if not generation.continue_final:
            return [await do(lambda: engine.render(messages, variables, folders), long=long)], 0
        before = await do(lambda: engine.render(messages[:-1], variables, folders), long=long)
        if generation.continue_ids:
            return [before + list(generation.continue_ids)], len(generation.continue_ids)
        opened = await do(lambda: engine.render_open(messages, variables, folders), long=long)
        return [opened], max(0, len(opened) - len(before))

    async def _refuse_hopeless(self, texts: Sequence[str], size: int) -> None:
        """A text of many times the context is refused by its beginning: to render and count 15 MB takes half a minute.
        So is a conversation of more messages than the context has tokens.

        Raises DoesNotFit; returns where the beginning says nothing (blanks that are few tokens).
        """
        engine = self._host.ready()
        sample = "\n".join(texts)[: _HOPELESS * engine.context]
        tokens = len(await self._host.text.do(lambda: engine.tokenize(sample, ()), long=True))
        about = max(tokens * size // max(len(sample), 1), len(texts) if len(texts) > 1 else 0)
        if about >= engine.context:
            raise DoesNotFit(
                tr(
                    "the prompt has about {length} tokens, but the context holds only {context}",
                    length=about,
                    context=engine.context,
                ),
                hint=tr("shorten the conversation, or load the model with a larger --context"),
                code="context.full",
            )


_LONG = 100_000  # bytes of a body; tokenising so many takes some 20 to 400 ms
_MOST_ROWS = 1_000_000  # log probabilities of prompts, with the alternatives that are told beside each
_HOPELESS = 16  # characters for each token of the context; no language has half as many


def _echoes(engine: EngineFace, generation: GenerationRequest, folders: Sequence[Path]) -> list[str]:
    """What stands before each answer: its prompt as it was sent, ids as the text they are to these adapters' words."""
    if not generation.echo:
        return []
    return [one if isinstance(one, str) else engine.detokenize(one, folders) for one in generation.prompts]


def _check_rows(generation: GenerationRequest, prompts: Sequence[Sequence[int]]) -> None:
    """Log probabilities of prompts are told at once when all are known; each takes some 200 bytes until then."""
    told = (generation.decoding.top_logprobs or 0) + 1
    if generation.decoding.of_prompt and sum(map(len, prompts)) * generation.choices * told > _MOST_ROWS:
        raise invalid(
            f"the prompts have more than {_MOST_ROWS} log probabilities", "send fewer prompts in one request", "prompt"
        )


def _check_length(length: int, context: int) -> None:
    if length >= context:
        raise DoesNotFit(
            tr("the prompt has {length} tokens, but the context holds only {context}", length=length, context=context),
            hint=tr("shorten the conversation, or load the model with a larger --context"),
            code="context.full",
        )
    if length == 0:
        raise invalid("the prompt is empty", "send some text", "prompt")


async def _body(request: Request) -> bytes:
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 12 or int(declared) > wire.BODY_LIMIT:
        raise HTTPException(413)
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise HTTPException(415, coding, {"Accept-Encoding": "identity"})
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > wire.BODY_LIMIT:
                raise HTTPException(413)
    except ClientDisconnect:
        raise HTTPException(400, "the client left before it had said everything") from None
    return bytes(body)


class _Response:
    """Sends an Answer as it comes, or whole. Errors before the first byte have a status; later ones are an event."""

    def __init__(self, answer: Answer, request: Request) -> None:
        self._answer = answer
        self._rendering = Rendering(answer)
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._answer.events(receive)) as events:
                if self._answer.request.stream:
                    await self._stream(events, send)
                    return
                response = await self._whole(events)
            if response is not None:  # None: the client has gone
                await response(scope, receive, send)
        finally:
            self._answer.place.leave()

    async def _stream(self, events: Any, send: Send) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", "Server": f"glmchat/{__version__}"}
        start = Response(None, 200, headers, "text/event-stream")
        raw = [(k, v) for k, v in start.raw_headers if k != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

        told = PROGRESS in self._request.headers
        spoken = time.monotonic()

        async def out(data: bytes | None) -> None:
            nonlocal spoken
            if data:
                spoken = time.monotonic()
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await out(self._rendering.first())
            async for event in events:
                if not isinstance(event, Said):
                    if told:
                        await out(comment(event))
                    elif isinstance(event, Silence) and time.monotonic() - spoken > PATIENCE:
                        await out(self._rendering.silence())
                    continue
                await out(self._rendering.said(event))
        except GlmchatError as error:
            await out(sse(error_json(error)) + b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, events: Any) -> Response | None:
        pieces: list[Said] = []
        try:
            async for event in events:
                if isinstance(event, Said):
                    pieces.append(event)
        except GlmchatError as error:
            return await _refusal(self._request, error)
        return _json(self._rendering.whole(pieces)) if pieces and pieces[-1].final else None
