"""Chat templates, rendered in a helper process that lives as long as the model: a turn costs milliseconds."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmchat.checkpoints.chat_template import LARGEST, broken_template, template_of, too_large
from glmchat.core.errors import Failed, Hostile, Usage
from glmchat.core.language import tr
from glmchat.core.sandbox import Sandbox
from glmchat.core.text import one_line
from glmchat.engine.prompts.template_process import SECONDS, largest_output, seconds
from glmchat.engine.prompts.typed_text import OwnedText, from_spans
from glmchat.engine.tokenizers.words import named_tokens


def _hint() -> str:
    return tr("it comes with the model and was kept in a sandbox: do not use this model, or use --complete")


class ChatTemplate:
    """One compiled template. `render` may be called from any thread; `close` ends the helper."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """source: the Jinja text; tokens: bos_token, eos_token and their like, which templates write by name.

        The helper starts here and compiles while the weights load; what is wrong with the template is said by the
        first `render`.
        """
        if len(source) > LARGEST:
            raise too_large()
        self.source = source
        self.tokens = dict(tokens)
        self._setup = {"template": source}
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
            "tokens": self.tokens,
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
                hint=_hint(),
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
                    hint=_hint(),
                    code="template.hostile",
                )
            raise broken_template(words)
        if "died" in reply:
            raise Hostile(tr("the model's chat template crashed its process"), hint=_hint(), code="template.limit")
        return reply

    def _stop(self) -> None:
        if self._sandbox is not None:
            self._sandbox.stop()
        self._sandbox = None
        self._compiled = False


def folder_template(folder: Path) -> tuple[str | None, dict[str, str]]:
    """The template of a Hugging Face folder (None: it has none) and its named tokens."""
    return template_of(folder), named_tokens(folder)
