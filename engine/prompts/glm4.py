"""GLM-4's conversations, as the chat template in its tokenizer_config.json writes them down, tools included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.prompts.chatglm import ChatGLM3Prompt, role_name
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.glm4 import IDS

# ruff: noqa: E501 - Chinese characters count twice

# The words of the template, which the model was trained on.
_TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当"
    "的答复和支持。\n\n# 可用工具"
)
_CALL = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


class GLM4Prompt(ChatGLM3Prompt):
    """As ChatGLM3, but header and content are one text, messages without content are left out, and tools are a system
    message of their own."""

    prefix = (IDS["[gMASK]"], IDS["<sop>"])

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
        ends = (IDS["<|endoftext|>"], IDS["<|user|>"], IDS["<|observation|>"])
        super().__init__(tokenizer, (*stop_ids, *ends))

    def role(self, message: Message) -> int:
        return IDS[f"<|{role_name(message)}|>"]

    def turn(self, message: Message) -> list[int]:
        ids: list[int] = []
        if message.tools is not None:
            ids += [IDS["<|system|>"], *self.tokenizer.encode("\n" + _describe(message.tools))]
        if message.content:
            ids += [self.role(message), *self.tokenizer.encode(f"{self.header(message)}\n{message.content}")]
        return ids


def _describe(tools: Sequence[Mapping[str, Any]]) -> str:
    """The system message that offers `tools`. Raises Usage for a kind that nobody here could run."""
    text = _TOOLS
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise Usage(
                tr("a tool of the kind {tool!r} cannot be offered", tool=tool.get("type")),
                hint=tr('describe functions: {"type": "function", "function": {"name": …, "parameters": …}}'),
                code="tools.kind",
            )
        said = json.dumps(function, indent=4, ensure_ascii=False)
        text += f"\n\n## {function.get('name', '')}\n\n{said}{_CALL}"
    return text
