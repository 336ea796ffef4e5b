"""What a server answered that was no answer, as one of our errors with a next step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from glmchat.core.errors import EngineDied, Failed, GlmchatError, NetworkFailed, ServerFailed
from glmchat.core.http import network_error
from glmchat.core.language import tr
from glmchat.core.text import one_line


def status_error(status: int, headers: httpx2.Headers, body: bytes, url: str, *, keyed: bool = True) -> GlmchatError:
    """An HTTP status that is not 200. Our own server's errors come back as the very error that was raised there.

    keyed: a key was sent with the request.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if "html" in kind or body.lstrip()[:1] == b"<":
        return ServerFailed(
            tr("{url} returned a web page (HTTP {status}) instead of an API answer", url=one_line(url), status=status),
            hint=tr("give the address of the API, usually http://HOST:PORT/v1"),
            code="server.html",
        )
    reported = error_of(_json(body))
    words = reported.message if reported else one_line(body[:1200].decode("utf-8", "replace"), 300)
    if reported and reported.hint and status != 401:  # ours; its hint on keys is for those who write programs
        return reported
    if status in (301, 302, 303, 307, 308):
        where = one_line(headers.get("location", ""), 120)
        return ServerFailed(
            tr("{url} has moved to {where}", url=one_line(url), where=where),
            hint=tr("give the new address: the key is not passed on to another host automatically"),
            code="server.moved",
        )
    if status in (401, 403):
        said = words or f"HTTP {status}"
        return ServerFailed(
            tr("the server rejected the key: {said}", said=said)
            if keyed
            else tr("the server wants a key: {said}", said=said),
            hint=tr("check that OPENAI_API_KEY or --api-key-file holds this server's key")
            if keyed
            else tr("put it in OPENAI_API_KEY, or use --api-key-file"),
            code="server.auth",
        )
    if status == 404:
        return ServerFailed(
            tr("the server does not know that model or address: {said}", said=words or "HTTP 404"),
            hint=tr("check the address ({url}) and the model's name", url=one_line(url)),
            code="server.not_found",
        )
    if status == 429:
        wait = one_line(headers.get("retry-after", ""), 20)
        return ServerFailed(
            tr("the server is busy: {said}", said=words or "HTTP 429"),
            hint=tr("try again in {wait} seconds", wait=wait) if wait else tr("try again later"),
            code="server.busy",
        )
    if status >= 500:
        return ServerFailed(
            tr("the server failed (HTTP {status}): {said}", status=status, said=words or "-"),
            hint=tr("its log should say why; try again later"),
            code="server.failed",
        )
    return ServerFailed(
        tr("the server refused the request (HTTP {status}): {said}", status=status, said=words or "-"),
        hint=tr("change the setting it names, or reset the sampling settings"),
        code="server.refused",
    )


def error_of(data: Any) -> GlmchatError | None:
    """The error in a JSON answer: OpenAI's object, Ollama's string, FastAPI's `detail`. None if there is none.

    An error of our own server is the only kind with a hint.
    """
    if not isinstance(data, dict):
        return None
    error = data.get("error", data.get("detail"))
    if error is None and data.get("object") == "error":  # older vLLM
        error = data
    if isinstance(error, dict):
        if isinstance(error.get("hint"), str) and isinstance(error.get("code"), str) and "exit" in error:
            ours = GlmchatError.from_json({**error, "message": one_line(str(error.get("message"))[:4000], 2000)})
            return ServerFailed(ours.message, hint=ours.hint, code=ours.code) if type(ours) is Failed else ours
        return ServerFailed(one_line(str(error.get("message") or error)[:2000], 500), hint="")
    if isinstance(error, str):
        return ServerFailed(one_line(error[:2000], 500), hint="")
    if error:
        return ServerFailed(one_line(json.dumps(error, ensure_ascii=False)[:2000], 500), hint="")
    return None


def in_stream(error: GlmchatError) -> GlmchatError:
    """An error that came as an event, after the answer had begun."""
    if error.hint:
        return error
    return ServerFailed(
        tr("the server stopped with an error: {said}", said=error.message),
        hint=tr("the answer so far is kept; try again"),
        code="server.failed",
    )


def broken(error: Exception, url: str, *, local: bool, answering: bool) -> GlmchatError:
    """An exception of the HTTP client. `local`: the engine is our own child; `answering`: the answer had begun."""
    if isinstance(error, GlmchatError):
        return error
    if local:
        return EngineDied(
            tr("the engine no longer responds"),
            hint=tr("start it again; the conversation is kept"),
            code="engine.died",
        )
    if isinstance(error, httpx2.ConnectError) and _refused(error):
        return NetworkFailed(
            tr("nothing is listening at {url}", url=one_line(url)),
            hint=tr("is the server running, and is the port right?"),
            code="server.unreachable",
        )
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError) and answering:
        return ServerFailed(
            tr("the connection was lost in the middle of the answer"),
            hint=tr("the answer so far is kept; try again"),
            code="server.broke",
        )
    hint = tr("is the server still running, and the connection to it up?")
    return network_error(error, url, code="server.network", hint=hint)


def _refused(error: Exception) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionRefusedError):
            return True
        seen = seen.__cause__ or seen.__context__
    return "refused" in str(error).lower()


def _json(body: bytes) -> Any:
    try:
        return json.loads(body) if len(body) < 1 << 20 else None
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True, slots=True)
class Health:
    """status "ok", "loading" (with stage and done, 0 to 1) or "failed" (with error)."""

    status: str
    stage: str | None = None
    done: float | None = None
    error: GlmchatError | None = None


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One row of `/v1/models`. parent: the base model, for an adapter."""

    name: str
    parent: str | None = None
    context: int | None = None
    owner: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def health_of(data: Mapping[str, Any], status: int) -> Health:
    """Our server's `/health`; a foreign one is "ok" if it answers at all, and "loading" while it says 503."""
    state = data.get("status")
    if state not in ("loading", "failed"):
        return Health("loading" if status == 503 else "ok")
    stage, done, problem = data.get("stage"), data.get("done"), data.get("error")
    return Health(
        str(state),
        stage=stage if isinstance(stage, str) else None,
        done=float(done) if isinstance(done, int | float) else None,
        error=GlmchatError.from_json(problem) if isinstance(problem, dict) else None,
    )


MOST_MODELS = 10_000  # OpenRouter has some 500


def rows_of(data: Mapping[str, Any]) -> list[ModelRow]:
    """The rows of `/v1/models`; what is no row is passed over, and what is behind MOST_MODELS."""
    models, rows = [], data.get("data")
    for row in rows[:MOST_MODELS] if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("id"), str):
            context = row.get("max_model_len")
            models.append(
                ModelRow(
                    row["id"],
                    parent=row.get("parent") if isinstance(row.get("parent"), str) else None,
                    context=context if isinstance(context, int) else None,
                    owner=row.get("owned_by") if isinstance(row.get("owned_by"), str) else None,
                    facts=row,
                )
            )
    return models
