"""Chat templates, rendered in a helper process that lives as long as the model: a turn costs milliseconds."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmchat.core.errors import Damaged, Failed, Hostile, Usage
from glmchat.core.files import TooLarge, read_text, unreadable
from glmchat.core.json_files import read_json
from glmchat.core.language import tr
from glmchat.core.sandbox import Sandbox
from glmchat.core.text import one_line
from glmchat.engine.prompts.template_process import SECONDS, largest_output, seconds
from glmchat.engine.prompts.typed_text import OwnedText, from_spans
from glmchat.engine.tokenizers.words import named_tokens

_LARGEST_TEMPLATE = 2**20


class ChatTemplate:
    """One compiled template. `render` may be called from any thread; `close` ends the helper."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """source: the Jinja text; tokens: bos_token, eos_token and their like, which templates write by name.

        The helper starts here and compiles while the weights load; what is wrong with the template is said by the
        first `render`.
        """
        if len(source) > _LARGEST_TEMPLATE:
            raise _too_large()
        self.source = source
        self._setup, self._tokens = {"template": source}, dict(tokens)
        self._lock = threading.Lock()
        self._sandbox: Sandbox | None = None
        self._compiled = False
        self._start()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> OwnedText:
        """The text of a conversation, and whose words are where.

        variables: what the template is told beside it; they win over named tokens.

        Raises Usage with the template's own words if it refuses the conversation, Damaged if it is broken, Hostile if
        it loops, reaches for Python, or wants more memory or output than any honest one.
        """
        request = {
            "variables": dict(variables or {}),
            "tokens": self._tokens,
            "messages": list(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        with self._lock:
            if self._sandbox is None or self._sandbox.process.poll() is not None:
                self._stop()
                self._start()
            assert self._sandbox is not None
            if not self._compiled:
                self._started(self._sandbox)
                self._judge(self._sandbox.reply(SECONDS))
                self._compiled = True
            size = self._sandbox.send(request)
            reply = self._judge(self._sandbox.reply(seconds(size), 8 * largest_output(size)))
            return from_spans(str(reply.get("text", "")), reply.get("spans", ()))

    @property
    def process(self) -> subprocess.Popen[bytes] | None:
        """The helper, where one runs."""
        return None if self._sandbox is None else self._sandbox.process

    def close(self) -> None:
        """End the helper; the next `render` starts another."""
        with self._lock:
            self._stop()

    def _start(self) -> None:
        self._compiled = False
        self._sandbox = Sandbox("glmchat.engine.prompts.template_process")
        self._sandbox.send(self._setup)

    def _started(self, sandbox: Sandbox) -> None:
        words = sandbox.obstacle()
        if words is None:
            return
        self._stop()
        if words:
            raise Failed(
                tr("the process that renders the chat template did not start: {words}", words=words),
                hint=tr("it runs {python}: mend that Python, or try again", python=one_line(sys.executable)),
                code="template.start",
            )
        raise Failed(
            tr("the process that renders the chat template did not start"),
            hint=tr("usually the system is out of memory: try again"),
            code="template.start",
        )

    def _judge(self, reply: dict[str, Any]) -> dict[str, Any]:
        if "died" in reply or "late" in reply:
            self._stop()
        if limit := reply.get("limit") or reply.get("late"):
            raise Hostile(
                tr("the model's chat template was stopped: {limit}", limit=limit),
                hint=_HINT,
                code="template.limit",
            )
        if "refused" in reply:
            raise Usage(
                tr(
                    "the model's chat template refuses this conversation: {refused}", refused=one_line(reply["refused"])
                ),
                hint=tr(
                    "most templates want questions and answers in turn, a question first: join what follows its like"
                ),
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
        if self._sandbox is not None:
            self._sandbox.stop()
        self._sandbox = None
        self._compiled = False


def _too_large() -> Hostile:
    return Hostile(tr("the chat template is larger than 1 MB"), hint=_HINT, code="template.size")


_HINT = "it comes with the model and was kept in a sandbox: do not use this model, or use --complete"


def folder_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template of a Hugging Face folder (None: it has none) and its named tokens.

    chat_template.jinja wins over tokenizer_config.json; of several named templates `default` is taken.
    """
    data = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    tokens = named_tokens(folder)
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return read_text(file, errors="replace"), tokens
        except TooLarge:
            raise _too_large() from None
        except OSError as error:
            raise unreadable(file, error) from None
    source = data.get("chat_template")
    if isinstance(source, list):
        named = {item.get("name"): item.get("template") for item in source if isinstance(item, Mapping)}
        source = named.get("default")
    return (source if isinstance(source, str) else None), tokens
