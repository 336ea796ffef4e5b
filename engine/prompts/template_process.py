"""The helper process that renders chat templates. A template is a program from a stranger: it gets a sandbox, 512 MB
of memory and two seconds, and talks only through its own standard input and output.

Requests and replies are one line of JSON each, after a first line that says the process is ready.
`{"template"}` compiles; what has messages renders.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

MEMORY = 512 * 2**20
SECONDS = 2.0
LARGEST_OUTPUT = 4 * 2**20


class _Refused(Exception):
    """What `raise_exception` in a template raises: the template's own words about the conversation."""


def _limit() -> None:
    for kind, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 16)):
        try:
            hard = resource.getrlimit(kind)[1]
            bound = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(kind, (bound, bound))
        except (ValueError, OSError):  # macOS refuses RLIMIT_AS; the two seconds still hold
            continue


def _environment() -> Any:
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant said, for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            return super().call(__context, __obj, *args, **kwargs)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"], cache_size=0
    )

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    def refuse(words: Any = "") -> NoReturn:
        raise _Refused(str(words)[:500])

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _answer(state: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        if "template" in request and "messages" not in request:
            state["template"] = state["environment"].from_string(request["template"])
            return {"ok": True}
        parts, size = [], 0
        for part in state["template"].generate(**request):
            size += len(part)
            if size > LARGEST_OUTPUT:
                return {"limit": "it writes more than 4 MB"}
            parts.append(part)
        return {"text": "".join(parts)}
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
    # The real stdout is kept for replies; nothing a template could reach writes into them.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    environment = _environment()
    state: dict[str, Any] = {"environment": environment}
    environment.from_string("{% for a in b %}{{ a | trim | tojson }}{% endfor %}").render(b=["x"])  # import it all now
    _limit()
    replies.write('{"ready": true}\n')
    replies.flush()
    for line in sys.stdin:
        # SIGALRM's default action ends the process even inside one long C call; the parent has given up by then.
        signal.setitimer(signal.ITIMER_REAL, SECONDS + 1)
        reply = _answer(state, json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
