"""Chat templates, rendered in a helper process that lives as long as the model: a turn costs milliseconds."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged, Failed, Hostile, Usage
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.text import one_line

SECONDS = 2.0
_START_SECONDS = 20.0  # a cold interpreter on a busy machine
_LARGEST_TEMPLATE = 2**20
_LARGEST_REPLY = 32 * 2**20  # 4 MB of text, every character escaped


class ChatTemplate:
    """One compiled template. `render` may be called from any thread; `close` ends the helper."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """source: the Jinja text; tokens: bos_token, eos_token and their like, which templates write by name.

        The helper starts here and compiles while the weights load; what is wrong with the template is said by the
        first `render`.
        """
        if len(source) > _LARGEST_TEMPLATE:
            raise Hostile(tr("the chat template is larger than 1 MB"), hint=_HINT, code="template.size")
        self.source = source
        self._setup, self._tokens = {"template": source}, dict(tokens)
        self._lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self._compiled = False
        self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. variables: what the template is told beside it; they win over named tokens.

        Raises Usage with the template's own words if it refuses the conversation, Damaged if it is broken, Hostile if
        it loops, reaches for Python, or wants more memory or output than any honest one.
        """
        request = {
            **self._tokens,
            **(variables or {}),
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
        }
        with self._lock:
            if self.process is None or self.process.poll() is not None:
                self._stop()
                self._start()
            if not self._compiled:
                self._started()
                self._judge(self._reply(SECONDS))
                self._compiled = True
            self._send(request)
            return str(self._judge(self._reply(SECONDS)).get("text", ""))

    def close(self) -> None:
        """End the helper; the next `render` starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        passed = {
            name: value for name, value in os.environ.items() if name in ("PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH")
        }
        self._buffer = b""
        self._compiled = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "glmchat.engine.prompts.template_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={**passed, "PYTHONIOENCODING": "utf-8:surrogatepass"},
        )
        self._ending = weakref.finalize(self, _end, self.process)
        self._send(self._setup)

    def _started(self) -> None:
        if "ready" not in self._reply(_START_SECONDS):
            self._stop()
            raise Failed(
                tr("the process that renders the chat template did not start"),
                hint=tr("usually the system is out of memory: try again"),
                code="template.start",
            )

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
            self.process.stdin.flush()
        except OSError:
            return  # it has died; the missing reply says so

    def _reply(self, seconds: float) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        descriptor, deadline = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not _readable(descriptor, left):
                self._stop()
                return {"limit": f"it takes more than {seconds:g} seconds"}
            piece = os.read(descriptor, 2**20)
            if not piece or len(self._buffer) > _LARGEST_REPLY:
                self._stop()
                return {"died": True}
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        return reply if isinstance(reply, dict) else {"died": True}

    def _judge(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "limit" in reply:
            raise Hostile(
                tr("the model's chat template was stopped: {limit}", limit=reply["limit"]),
                hint=_HINT,
                code="template.limit",
            )
        if "refused" in reply:
            raise Usage(
                tr(
                    "the model's chat template refuses this conversation: {refused}", refused=one_line(reply["refused"])
                ),
                hint=tr("messages must come in the order that the model was trained on"),
                code="template.refused",
            )
        if "broken" in reply:
            words = one_line(str(reply["broken"]))
            if words.startswith("SecurityError"):
                raise Hostile(
                    tr("the model's chat template tries to access Python: {words}", words=words),
                    hint=_HINT,
                    code="template.hostile",
                )
            raise Damaged(
                tr("the model's chat template is broken: {words}", words=words), hint=_HINT, code="template.broken"
            )
        if "died" in reply:
            raise Hostile(tr("the model's chat template crashed its process"), hint=_HINT, code="template.limit")
        return reply

    def _stop(self) -> None:
        if self.process is not None:
            self._ending()
        self.process = None
        self._compiled = False


def _readable(descriptor: int, seconds: float) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()
    process.wait()


_HINT = "it comes with the model and was kept in a sandbox: do not use this model, or use --complete"


def folder_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template of a Hugging Face folder (None: it has none) and its named tokens.

    chat_template.jinja wins over tokenizer_config.json; of several named templates `default` is taken.
    """
    data = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    special = read_json(folder / "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {}
    tokens: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = data.get(name) or special.get(name)
        if isinstance(value, Mapping):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= _LARGEST_TEMPLATE:
        return file.read_text(encoding="utf-8", errors="replace"), tokens
    source = data.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, Mapping)}
        source = named.get("default")
    return (source if isinstance(source, str) else None), tokens
