"""What the server sends: OpenAI's objects and chunks, llama-server's `timings`, and our `glmchat` object.

What is not known is null, never guessed.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from glmchat.core.decoding import TokenLogprob
from glmchat.core.errors import DoesNotFit, GlmchatError, UnknownModel, Usage
from glmchat.core.kv_files import kv_bytes
from glmchat.serve.answer import Answer, Begun, Event, Prefill, Said, Waiting
from glmchat.serve.face import Chunk
from glmchat.serve.host import OF_ADAPTERS, Busy, Host, StillLoading

LEAST = -9999.0  # what OpenAI gives for a token that is all but impossible; JSON has no minus infinity


def to_bytes(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")


def sse(data: Any) -> bytes:
    """One event. JSON holds no raw newline, so one `data:` line is enough."""
    return b"data: " + to_bytes(data) + b"\n\n"


def comment(event: Event) -> bytes:
    """Progress as an SSE comment, for a client that asked for it. The standard lets every client skip them; some
    cannot.
    """
    match event:
        case Waiting(place):
            return b": glmchat " + to_bytes({"waiting": place}) + b"\n\n"
        case Begun():
            return b": glmchat " + to_bytes({"waiting": 0}) + b"\n\n"
        case Prefill(done, total):
            return b": glmchat " + to_bytes({"prefill": done, "of": total}) + b"\n\n"
        case _:
            return b": keep-alive\n\n"


def error_json(error: GlmchatError, path: str = "") -> dict[str, Any]:
    """OpenAI's form, with our stable code, the hint, and the exit code for the command line.

    path: the address that was asked, which says where a request has what the engine's room refuses.
    """
    kind = {400: "invalid_request_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status_of(error), "server_error"
    )
    param = getattr(error, "param", None) or _param(error.code, path)
    return {"error": {**error.to_json(), "type": kind, "param": param}}


def _param(code: str, path: str) -> str | None:
    """The field behind an error that knows of no fields."""
    chat = path.endswith("/chat/completions")
    match code.partition(".")[0], code:
        case _, "model_not_found":
            return "model"
        case _, "adapter.unknown":
            return "lora_name" if path.endswith("_lora_adapter") else "adapters"
        case _, "prompt.ids" if chat:  # the only ids that a conversation brings
            return "continue_token_ids"
        case (("context" | "prompt" | "template"), _) | (_, "tokenizer.slow") if path:
            return "prompt" if path.endswith("/completions") and not chat else "messages"
    return None


def status_of(error: GlmchatError) -> int:
    match error:
        case Busy():
            return 429
        case StillLoading():
            return 503
        case UnknownModel():
            return 404
        case Usage():
            return 400
        case DoesNotFit() if error.code.startswith(("context", "prompt")):
            return 400
        case _:
            return 500


class _Choice:
    """One of the answers to a request, as far as it has come."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.text: list[str] = []
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.opened = False
        self.facts: Mapping[str, Any] = {}  # of its end

    def take(self, chunk: Chunk) -> int:
        """Keep a piece; returns how long the text of the tokens before it was, as `text_offset` counts."""
        offset = sum(len(_token(one.piece)) for one in self.logprobs)
        self.ids.extend(chunk.token_ids)
        self.text.append(chunk.text)
        self.logprobs.extend(chunk.logprobs)
        self.finish_reason = chunk.finish_reason or self.finish_reason
        if chunk.finish_reason is not None:
            self.facts = chunk.facts
        return offset

    @property
    def made(self) -> int:
        """Tokens, with one that ended it."""
        made: int = self.facts.get("predicted_n", len(self.ids))
        return made

    def own(self) -> dict[str, Any]:
        """What a replay of this answer needs, beside what is true of all of them."""
        return {name: self.facts.get(name) for name in ("seed", "cached_n", "passes", "stopped_by")}


def _token(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")


def _number(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LEAST)


def chat_logprobs(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    def row(piece: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": _token(piece), "logprob": _number(logprob), "bytes": list(piece)}

    rows = [
        {**row(one.piece, one.logprob), "top_logprobs": [row(piece, logprob) for piece, logprob in one.top]}
        for one in told
    ]
    return {"content": rows, "refusal": None}


def completion_logprobs(told: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """Of a prompt's first token all numbers are null, as OpenAI's are."""
    tokens = [_token(one.piece) for one in told]
    return {
        "tokens": tokens,
        "token_logprobs": [_number(one.logprob) for one in told],
        "top_logprobs": [_likeliest(one) for one in told],
        "text_offset": [offset + before for before in accumulate(map(len, tokens[:-1]), initial=0)] if tokens else [],
    }


def _likeliest(told: TokenLogprob) -> dict[str, float] | None:
    """The chosen token stands beside the likeliest, so there may be one more than was asked for. Of two that are the
    same text (halves of characters) the likelier one is told."""
    if told.logprob is None:
        return None
    said: dict[str, float] = {}
    for piece, logprob in (*told.top, (told.piece, told.logprob)) if told.top else ():
        said.setdefault(_token(piece), max(logprob, LEAST))
    return said


class Rendering:
    """The objects of one request: completions or chats, one or several, streamed or whole."""

    def __init__(self, answer: Answer) -> None:
        self._answer, self._host = answer, answer.host
        self._chat = answer.request.is_chat
        self._head = {
            "id": ("chatcmpl-" if self._chat else "cmpl-") + secrets.token_hex(12),
            "created": int(time.time()),
            "model": answer.request.model or answer.host.model,
        }
        self._choices = [_Choice() for _ in range(answer.choices)]
        self._opening: Mapping[str, Any] = {}  # facts of the first piece, until they were sent with every hash

    def first(self, choice: int = 0) -> bytes | None:
        """The chunk that opens a stream, and each further answer. A completion has none unless ids or the prompt are
        asked for.
        """
        self._choices[choice].opened = True
        echo = self._echo(choice)
        if not self._chat and not self._answer.request.return_token_ids and not echo:
            return None
        delta: Any = {"role": "assistant", "content": ""} if self._chat else echo
        told = self._answer.request.return_token_ids and not choice
        extra = {"prompt_token_ids": self._answer.prompts[0]} if told else {}
        return sse(self._chunk(choice, delta, extra=extra))

    def _echo(self, choice: int) -> str:
        echoes = self._answer.echoes
        return echoes[choice // self._answer.request.choices] if echoes else ""

    def silence(self) -> bytes:
        """A chunk that says nothing, for a client that must not take a long prefill for a dead connection."""
        return sse(self._chunk(0, {"content": ""} if self._chat else ""))

    def said(self, event: Said) -> bytes | None:
        """What a stream says of a piece: text, ids, an end; None if there is nothing to say (half a character)."""
        choice, chunk = event.choice, event.chunk
        told = (not self._choices[choice].opened and self.first(choice)) or b""
        told += self._piece(choice, chunk) or b""
        if event.final:
            return told + self._last(choice, chunk)
        if chunk.finish_reason is not None:
            told += sse(self._end(choice, chunk))
        return told or None

    def _piece(self, choice: int, chunk: Chunk) -> bytes | None:
        offset = self._choices[choice].take(chunk)
        asked = self._answer.request.return_token_ids
        if not chunk.text and not (asked and chunk.token_ids) and not chunk.logprobs:
            return None
        extra = self._replay_facts(chunk) if asked and not chunk.finish_reason else {}
        delta: Any = {"content": chunk.text} if self._chat else chunk.text
        logprobs = self._logprobs(chunk.logprobs, offset)
        return sse(self._chunk(choice, delta, chunk.token_ids, extra=extra, logprobs=logprobs))

    def _logprobs(self, told: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any] | None:
        if self._answer.request.decoding.top_logprobs is None:
            return None
        return chat_logprobs(told) if self._chat else completion_logprobs(told, offset)

    def _replay_facts(self, chunk: Chunk) -> dict[str, Any]:
        """With the first piece, so that whoever stops before the end knows all the same what a replay needs; once more
        with the first piece after the weights were hashed, if that took longer.
        """
        engine = self._host.engine
        identified = engine is None or engine.identified
        opening = chunk.facts or (self._opening if identified else {})
        self._opening = {} if identified else chunk.facts or self._opening
        return {"glmchat": self._identity(opening)} if opening else {}

    def _last(self, choice: int, chunk: Chunk) -> bytes:
        """The chunk with the finish reason, and what is known of the answer; with include_usage that comes apart."""
        facts = self._facts()
        if not self._answer.request.include_usage:
            return sse(self._end(choice, chunk, facts)) + b"data: [DONE]\n\n"
        closing = self._end(choice, chunk, {"usage": None})
        usage = {**self._kind(".chunk"), "choices": [], **facts}
        return sse(closing) + sse(usage) + b"data: [DONE]\n\n"

    def _end(self, choice: int, chunk: Chunk, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The chunk with the finish reason of one answer; of several each tells its own facts."""
        ended = self._chunk(choice, {} if self._chat else "", finish=chunk.finish_reason, extra=extra)
        if len(self._choices) > 1:
            ended["choices"][0]["glmchat"] = self._choices[choice].own()
        return ended

    def whole(self, pieces: Sequence[Said]) -> dict[str, Any]:
        """The answer to a request that does not stream; the last of `pieces` is the final one."""
        for piece in pieces:
            self._choices[piece.choice].take(piece.chunk)
        choices = []
        for index, choice in enumerate(self._choices):
            text = self._echo(index) + "".join(choice.text)
            row: dict[str, Any] = {"index": index, "finish_reason": choice.finish_reason}
            row["logprobs"] = self._logprobs(choice.logprobs)
            row.update({"message": {"role": "assistant", "content": text}} if self._chat else {"text": text})
            if self._answer.request.return_token_ids:
                row["token_ids"] = choice.ids
            if len(self._choices) > 1:
                row["glmchat"] = choice.own()
            choices.append(row)
        data: dict[str, Any] = {**self._kind(""), "choices": choices, **self._facts()}
        if self._answer.request.return_token_ids:
            data["prompt_token_ids"] = self._answer.prompts[0]
        return data

    def _kind(self, suffix: str) -> dict[str, Any]:
        name = "chat.completion" + suffix if self._chat else "text_completion"
        return {"id": self._head["id"], "object": name, **self._head}

    def _chunk(
        self,
        choice: int,
        delta: Any,
        ids: Sequence[int] = (),
        *,
        finish: str | None = None,
        extra: Mapping[str, Any] | None = None,
        logprobs: Any = None,
    ) -> dict[str, Any]:
        name = "delta" if self._chat else "text"
        row = {"index": choice, name: delta, "logprobs": logprobs, "finish_reason": finish}
        if self._answer.request.return_token_ids:
            row["token_ids"] = list(ids)
        return {**self._kind(".chunk"), "choices": [row], **(extra or {})}

    def _identity(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The `glmchat` object: what answers, and how."""
        host = self._host
        engine = host.engine.facts() if host.engine else {}
        return {
            "kernel": None,
            # The others are of what is active now, which may be another answer's.
            **{name: value for name, value in engine.items() if name not in OF_ADAPTERS},
            "seed": facts.get("seed"),
            "model": host.model,
            "revision": host.revision,
            "quant": host.quant or engine.get("quant"),
            **self._answer.began,
            "cached_n": facts.get("cached_n"),
            **({"disk": facts["disk"]} if facts.get("disk") else {}),
            "passes": facts.get("passes"),
            "sampling": self._answer.request.sampling.to_json(),
            # Always None, as nothing speculates (docs/decisions/0013); kept because every record of an answer has it.
            "speculation": None,
            "stopped_by": facts.get("stopped_by"),
            "system_prepended": self._system_prepended(),
            "threads": engine.get("threads"),
            "load_ms": host.load_ms,
        }

    def _system_prepended(self) -> bool:
        engine, messages = self._host.engine, self._answer.request.messages
        folders = self._host.folders(self._answer.adapters)
        return engine is not None and messages is not None and engine.prepends_system(messages, folders)

    def _facts(self) -> dict[str, Any]:
        """Of all answers together: tokens and times are sums; `glmchat` tells the first one's seed and passes."""
        told, again = [choice.facts for choice in self._choices], self._answer.request.choices

        def total(name: str, some: Sequence[Mapping[str, Any]] = told) -> Any:
            values = [facts[name] for facts in some if facts.get(name) is not None]
            return sum(values) if values else None

        prompt, made = sum(map(len, self._answer.prompts)), sum(choice.made for choice in self._choices)
        read, cached = total("prompt_n"), total("cached_n")
        # Each prompt counts once, however many answers it has: what its first answer found in a cache.
        found = total("cached_n", told[::again])
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": made,
                "total_tokens": prompt + made,
                "prompt_tokens_details": None if found is None else {"cached_tokens": found},
            },
            "timings": {
                # llama-server counts the tokens it read, not those it still knew: the speed is prompt_n / prompt_ms.
                "prompt_n": None if read is None else read - (cached or 0),
                "cache_n": cached,
                **{name: total(name) for name in ("prompt_ms", "predicted_n", "predicted_ms")},
            },
            "glmchat": self._identity(told[0]),
        }


def model_json(host: Host, name: str) -> dict[str, Any] | None:
    """The row of one model by its name; None where nothing of that name is served."""
    name = name.lstrip("/")  # doubled slashes of an address are one
    rows = {row["id"].lstrip("/"): row for row in models_json(host)["data"]}
    rows.setdefault(f"{host.model}@{host.revision}".lstrip("/"), rows[host.model.lstrip("/")])
    return rows.get(name)


def models_json(host: Host) -> dict[str, Any]:
    """The base first, then the adapters that a request may name as its model (vLLM's form: `parent` is the base)."""
    context = host.engine.context if host.engine else None
    family = host.engine.family if host.engine else None
    facts = host.engine.facts() if host.engine else {}

    def row(name: str, parent: str | None) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": host.created,
            "owned_by": "glmchat",
            "root": host.model,
            "parent": parent,
            "max_model_len": context,
            "family": family,
            "revision": host.revision,
            "quant": host.quant,
            **{name: facts[name] for name in ("device", "device_reason") if name in facts},
        }

    return {"object": "list", "data": [row(host.model, None), *(row(name, host.model) for name in host.adapters())]}


def metrics_text(host: Host) -> str:
    """What a server does, in Prometheus' text form (github.com/prometheus/docs, exposition formats)."""
    counts, line = host.counts, host.line
    running = min(host.running, len(line))
    rows = (
        ("requests_running", "gauge", "Requests that are being answered.", running),
        ("requests_waiting", "gauge", "Requests that wait for their turn.", len(line) - running),
        ("parallel", "gauge", "Answers that are written at once, at most.", line.parallel),
        ("answers_total", "counter", "Answers that were written.", counts.answers),
        ("prompt_tokens_total", "counter", "Tokens of prompts.", counts.prompt_tokens),
        ("cached_tokens_total", "counter", "Tokens of prompts that a cache held already.", counts.cached_tokens),
        ("kv_disk_bytes", "gauge", "Bytes of the caches on the disk, of all engines.", kv_bytes()),
        ("kv_disk_tokens_total", "counter", "Cached tokens that came from the disk.", counts.disk_tokens),
        (
            "kv_disk_saved_seconds_total",
            "counter",
            "What computing those would have taken longer.",
            round(counts.disk_seconds_saved, 6),
        ),
        ("answer_tokens_total", "counter", "Tokens that were written.", counts.answer_tokens),
        (
            "prompt_seconds_total",
            "counter",
            "Time to first tokens, of all.",
            round(counts.prompt_seconds, 6),
        ),
        ("answer_seconds_total", "counter", "Time from the first token, of all.", round(counts.answer_seconds, 6)),
    )
    return "".join(
        f"# HELP glmchat_{name} {words}\n# TYPE glmchat_{name} {kind}\nglmchat_{name} {value}\n"
        for name, kind, words, value in rows
    )
