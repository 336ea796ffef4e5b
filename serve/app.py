"""The routes: the OpenAI API, vLLM's adapter calls, /tokenize and /health, over one Host."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from glmchat import __version__
from glmchat.core.errors import DoesNotFit, GlmchatError, UnknownModel, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line
from glmchat.serve import wire
from glmchat.serve.answer import Answer, in_words
from glmchat.serve.guard import Guard
from glmchat.serve.host import Busy, Host, StillLoading
from glmchat.serve.render import Rendering, comment, error_json, models_json, sse, status_of, to_bytes
from glmchat.serve.wire import GenerationRequest

Parse = Callable[[Mapping[str, Any], Mapping[str, Any]], GenerationRequest]


def build_app(host: Host, *, key: str | None = None, hosts: Iterable[str] | None = None) -> ASGIApp:
    """The ASGI application. `key` None asks for none; `hosts` are the names a request may call us by, None for any."""
    routes = _Routes(host)
    app = Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.models),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.completions, methods=["POST"]),
            Route("/v1/load_lora_adapter", routes.load_adapter, methods=["POST"]),
            Route("/v1/unload_lora_adapter", routes.unload_adapter, methods=["POST"]),
            Route("/tokenize", routes.tokenize, methods=["POST"]),
        ],
        exception_handlers={GlmchatError: _refusal, HTTPException: _http_refusal, Exception: _unexpected},
    )
    return Guard(app, key, hosts)


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_bytes(data), status, {"Server": f"glmchat/{__version__}", **(headers or {})}, "application/json")


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, GlmchatError)
    headers = {}
    if isinstance(error, Busy):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, StillLoading):
        headers["Retry-After"] = "1"
    return _json(error_json(error), status_of(error), headers)


async def _http_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    words = {
        404: (
            f"there is nothing at {one_line(request.url.path)}",
            "the API is under /v1: /v1/chat/completions, /v1/models",
        ),
        405: (f"{request.method} is not for {one_line(request.url.path)}", "see the Allow header"),
        413: ("the body is too large", f"at most {wire.BODY_LIMIT // 2**20} MiB"),
    }
    message, hint = words.get(error.status_code, (str(error.detail), ""))
    usage = Usage(message, hint=hint, code=f"request.http_{error.status_code}")
    return _json(error_json(usage), error.status_code, error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    return _json(error_json(in_words(error)), 500)


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

    async def models(self, request: Request) -> Response:
        return _json(models_json(self._host))

    async def chat(self, request: Request) -> Any:
        return await self._generate(request, wire.parse_chat)

    async def completions(self, request: Request) -> Any:
        return await self._generate(request, wire.parse_completion)

    async def tokenize(self, request: Request) -> Response:
        """vLLM's form (`prompt` or `messages`), llama-server's (`content`), or `text`."""
        host, data = self._host, await _body(request)
        engine = host.ready()
        if "messages" in data:
            messages = wire.parse_messages(data)
            is_open = data.get("continue_final") is True or data.get("continue_final_message") is True
            variables, render = wire.template_variables(data), engine.render_open if is_open else engine.render
            ids = await self._text(lambda: render(messages, variables))
        else:
            text = next((data[name] for name in ("prompt", "text", "content") if name in data), None)
            if not isinstance(text, str):
                raise wire.invalid("a text or messages are needed", '{"prompt": "Hello"} or {"messages": [...]}')
            ids = await self._text(lambda: engine.tokenize(text.encode("utf-8", "replace").decode()))
        return _json({"count": len(ids), "tokens": ids, "max_model_len": engine.context})

    async def load_adapter(self, request: Request) -> Response:
        name = await self._adapter_name(request)
        await self._in_turn(lambda: self._host.attach(name))
        return _json({"status": "ok", "name": name})

    async def unload_adapter(self, request: Request) -> Response:
        name = await self._adapter_name(request)
        await self._in_turn(lambda: self._host.detach(name))
        return _json({"status": "ok", "name": name})

    async def _adapter_name(self, request: Request) -> str:
        data = await _body(request)
        self._host.ready()
        name = data.get("lora_name")
        if not isinstance(name, str) or not name:
            raise wire.invalid("lora_name must be a text", '{"lora_name": "my-lora"}')
        if data.get("lora_path") not in (None, "", name):
            raise wire.invalid(
                "adapters are loaded by their name in the store, never by a path", "glmchat adapters add PATH"
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

    async def _text(self, work: Callable[[], list[int]]) -> list[int]:
        """Rendering and tokenising need no torch and no turn: they run beside an answer that is being made."""

        def locked() -> list[int]:
            with self._host.text_lock:
                return work()

        return await asyncio.to_thread(locked)

    async def _generate(self, request: Request, parse: Parse) -> Any:
        host = self._host
        host.ready()
        generation = parse(await _body(request), host.sampling)
        adapters = self._adapters(generation)
        place = host.line.join()
        try:
            ids, continued = await self._ids(generation)
            _check_length(len(ids), host.ready().context)
            return _Response(Answer(host, place, generation, ids, adapters, continued), request)
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
            raise UnknownModel(
                tr("the model {name} is not served here", name=one_line(repr(name), 80)),
                hint=tr("models served: {names}", names=one_line(", ".join([host.model, *host.adapters()]))),
                code="model_not_found",
            )
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

    async def _ids(self, generation: GenerationRequest) -> tuple[list[int], int]:
        """The prompt's ids, and how many at the end are the answer so far."""
        engine, messages = self._host.ready(), generation.messages
        variables = generation.sampling.template_variables
        if generation.prompt_ids is not None:
            return list(generation.prompt_ids), 0
        if messages is None:
            text = generation.prompt or ""
            return await self._text(lambda: engine.complete(text)), 0
        if not generation.continue_final:
            return await self._text(lambda: engine.render(messages, variables)), 0
        if generation.continue_ids:
            before = await self._text(lambda: engine.render(messages[:-1], variables))
            return before + list(generation.continue_ids), len(generation.continue_ids)
        opened = await self._text(lambda: engine.render_open(messages, variables))
        before = await self._text(lambda: engine.render(messages[:-1], variables))
        return opened, max(0, len(opened) - len(before))


def _check_length(length: int, context: int) -> None:
    if length >= context:
        raise DoesNotFit(
            tr("the prompt has {length} tokens, but the context holds only {context}", length=length, context=context),
            hint=tr("shorten the conversation, or load the model with a larger --context"),
            code="context.full",
        )
    if length == 0:
        raise wire.invalid("the prompt is empty", "send some text")


async def _body(request: Request) -> dict[str, Any]:
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or len(declared) > 12 or int(declared) > wire.BODY_LIMIT:
        raise HTTPException(413)
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > wire.BODY_LIMIT:
                raise HTTPException(413)
    except ClientDisconnect:
        raise HTTPException(400, "the client left before it had said everything") from None
    return wire.parse_json(bytes(body))


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

        async def out(data: bytes | None) -> None:
            if data:
                await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            await out(self._rendering.first())
            async for event in events:
                if not hasattr(event, "token_ids"):
                    await out(comment(event))
                    continue
                await out(self._rendering.piece(event))
                if event.finish_reason is not None:
                    await out(self._rendering.last(event))
        except GlmchatError as error:
            await out(sse(error_json(error)) + b"data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _whole(self, events: Any) -> Response | None:
        last = None
        try:
            async for event in events:
                if hasattr(event, "token_ids"):
                    self._rendering.piece(event)
                    last = event if event.finish_reason is not None else last
        except GlmchatError as error:
            return await _refusal(self._request, error)
        return None if last is None else _json(self._rendering.whole(last))
