"""The helper process that renders chat templates. A template is a program from a stranger: it gets a sandbox, 512 MB
of memory and two seconds, and talks only through its own standard input and output (core/sandbox.py).

`{"template"}` compiles; what has messages renders, and the reply says whose words are where.
"""

from __future__ import annotations

import json
import signal
import sys
from datetime import datetime
from functools import wraps
from types import GeneratorType
from typing import Any, NoReturn

from glmchat.checkpoints.chat_template import extensions
from glmchat.core.sandbox import READY, confine, reply_stream
from glmchat.engine.prompts.typed_text import (
    MODEL,
    TYPED,
    concatenated,
    inherited,
    joined,
    owned,
    spans,
    written,
)

MEMORY = 512 * 2**20
SECONDS = 2.0
LARGEST_OUTPUT = 4 * 2**20
# What a long conversation adds to each limit, for one byte of its request. A template may write it out a few times.
_MEMORY_EACH, _OUTPUT_EACH, _BYTES_A_SECOND = 64, 4, 2 * 2**20
# No template marks the conversation's roles as somebody's words; any other role is somebody's.
_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "observation", "function"})


def seconds(size: int) -> float:
    """How long rendering a request of so many bytes may take."""
    return SECONDS + size / _BYTES_A_SECOND


def largest_output(size: int) -> int:
    """Characters that a request of so many bytes may be rendered to."""
    return LARGEST_OUTPUT + _OUTPUT_EACH * size


class _Refused(Exception):
    """What `raise_exception` in a template raises: the template's own words about the conversation."""


def _limit(size: int = 0) -> None:
    """Bound what the process may take. size: bytes of the request. No template can reach these calls to lift it."""
    confine(MEMORY + _MEMORY_EACH * size)


# Filters that hand on what they were given, piece by piece with its owners. Others may join pieces in their own way,
# so what they make belongs as a whole to whoever their input belongs to.
_EXACT = frozenset({"trim", "join", "replace", "string", "default", "d", "first", "last", "reverse", "attr"})


def _carrying(name: str, work: Any) -> Any:
    """A filter whose text belongs to whoever its input belongs to."""

    @wraps(work)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        result = work(*args, **kwargs)
        if isinstance(result, str) and name not in _EXACT:
            result = "".join(result)
        return inherited(result, *args, *kwargs.values())

    return filtered


def _owned(request: dict[str, Any]) -> dict[str, Any]:
    """The request with the owners of its words: roles and named tokens are the template's own."""
    messages = []
    for message in request["messages"]:
        role = message.get("role")
        mine = owned({key: value for key, value in message.items() if key != "role"}, TYPED)
        if role == "assistant" and isinstance(message.get("content"), str):
            mine["content"] = owned(message["content"], MODEL)
        messages.append({"role": role if role in _ROLES else owned(role, TYPED), **mine})
    told = {name: owned(value, TYPED) for name, value in request["variables"].items()}
    given = {"tools": None, "documents": None, **request["tokens"], **told}
    return {**given, "messages": messages, "add_generation_prompt": request["add_generation_prompt"]}


def _environment() -> Any:
    import jinja2.runtime
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Sandbox(ImmutableSandboxedEnvironment):
        concat = staticmethod(concatenated)
        intercepted_binops = frozenset({"%"})

        def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            args = tuple(list(arg) if isinstance(arg, GeneratorType) else arg for arg in args)
            result, of = super().call(__context, __obj, *args, **kwargs), getattr(__obj, "__self__", None)
            if isinstance(of, bytes):  # which know no owners
                return owned(result, TYPED)
            return inherited(result, of, *args, *kwargs.values())

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            return inherited(super().call_binop(context, operator, left, right), left, right)

    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=extensions(),
        cache_size=0,
        finalize=lambda value: written(value) if isinstance(value, list | tuple | dict) else value,
    )

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def join(value: Any, between: str = "", attribute: Any = None) -> str:
        parts = [environment.getitem(part, attribute) for part in value] if attribute is not None else value
        return joined(between, [written(part) for part in parts])

    def refuse(words: Any = "") -> NoReturn:
        raise _Refused(str(words)[:500])

    environment.filters["tojson"] = tojson
    environment.filters["join"] = join
    environment.filters = {name: _carrying(name, work) for name, work in environment.filters.items()}
    setattr(jinja2.runtime, "str_join", concatenated)  # noqa: B010 - what `~` joins by
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _answer(state: dict[str, Any], request: dict[str, Any], size: int) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        if "template" in request and "messages" not in request:
            state["template"] = state["environment"].from_string(request["template"])
            return {"ok": True}
        parts, length, most = [], 0, largest_output(size)
        for part in state["template"].generate(_owned(request)):
            length += len(part)
            if length > most:
                return {"limit": f"it writes more than {most // 2**20} MB"}
            parts.append(part)
        text = joined("", parts)
        return {"text": text, "spans": spans(text)}
    except _Refused as words:
        return {"refused": str(words)}
    except (MemoryError, OverflowError):
        return {"limit": f"it needs more than {MEMORY // 2**20} MB of memory"}
    except RecursionError:
        return {"limit": "it calls itself without end"}
    except TemplateError as error:
        return {"broken": f"{type(error).__name__}: {error}"[:500]}
    except Exception as error:  # noqa: BLE001 - a template can raise anything; all of it is the template's fault
        return {"broken": f"{type(error).__name__}: {error}"[:500]}


def main() -> None:
    """Answer requests until standard input ends. The timer ends the process if a template does not."""
    replies = reply_stream()
    environment = _environment()
    state: dict[str, Any] = {"environment": environment}
    environment.from_string("{% for a in b %}{{ a | trim | tojson }}{% endfor %}").render(b=["x"])  # import it all now
    _limit()
    replies.write(READY)
    replies.flush()
    for line in sys.stdin:
        # SIGALRM's default action ends the process even inside one long C call; the parent has given up by then.
        signal.setitimer(signal.ITIMER_REAL, seconds(len(line)) + 1)
        _limit(len(line))
        reply = _answer(state, json.loads(line), len(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
