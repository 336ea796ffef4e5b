"""The conversations of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B, as their own code wrote them down.

What a person typed is encoded as text in every family: `<|user|>`, `</s>` or `[gMASK]` in a question stays a string of
characters, also where the original let it become a control token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmchat.checkpoints.spec import ModelSpec
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.engine.prompts.base import NO_VARIABLES, Answered, PromptFormat
from glmchat.engine.tokenizers import chatglm2
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.chatglm import ChatGLMTokenizer
from glmchat.engine.tokenizers.chatglm2 import IDS

_CJK = "([\u4e00-\u9fff])"
_MARKS = tuple(zip(",!:;?", "，！：；？", strict=True))
_TRAINING_TIME = ("[[训练时间]]", "2023年")  # a placeholder that the model learnt to write for its training date


class _Cleaned(PromptFormat):
    """What the three clean-ups have in common: how far into an unfinished answer they are settled."""

    def settled(self, text: str) -> int:
        """Up to the last place between two characters that are neither mark nor blank, outside a placeholder."""
        cut, size = len(text) - 1, len(_TRAINING_TIME[0])
        opened = text.rfind("[", max(0, len(text) - size))
        if opened >= 0:
            cut = min(cut, opened - (text[opened - 1 : opened] == "["))
        while cut > 0:
            placeholder = text.rfind(_TRAINING_TIME[0], max(0, cut - size + 1), cut + size - 1)
            if placeholder >= 0:
                cut = placeholder
            elif _is_plain(text[cut - 1]) and _is_plain(text[cut]):
                break
            else:
                cut -= 1
        return max(cut, 0)


def _is_plain(character: str) -> bool:
    return character not in ",!:;?[" and not character.isspace()


def rounds(messages: Sequence[Message]) -> tuple[list[tuple[str, str]], str]:
    """(question, answer) pairs and the open question, for families that know nothing else.

    A system prompt goes in front of the first question; a tool's answer counts as the person's words.
    """
    history: list[tuple[str, str]] = []
    system = [m.content for m in messages if m.role == "system"]
    question: str | None = None
    for message in messages:
        if message.role == "system":
            continue
        if message.role == "assistant":
            history.append((question or "", message.content))
            question = None
        else:
            question = message.content if question is None else f"{question}\n{message.content}"
    if question is None:
        raise Usage(
            tr("the conversation does not end with a question"),
            hint=tr("the last message must be from the user"),
            code="prompt.no_question",
        )
    if system:
        head = "\n".join(system)
        if history:
            history[0] = (f"{head}\n\n{history[0][0]}", history[0][1])
        else:
            question = f"{head}\n\n{question}"
    return history, question


class ChatGLMPrompt(_Cleaned):
    """ChatGLM-6B: a bare first question, then numbered rounds from 0; [gMASK] and <sop> open the answer."""

    has_system = False
    tokenizer: ChatGLMTokenizer

    def __init__(self, tokenizer: ChatGLMTokenizer, stop_ids: Sequence[int] = ()) -> None:
        super().__init__(tokenizer, stop_ids or (tokenizer.eop_id,))

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        history, question = rounds(messages)
        text = question
        if history:
            turns = [f"[Round {i}]\n问：{q}\n答：{a}\n" for i, (q, a) in enumerate(history)]
            text = "".join(turns) + f"[Round {len(history)}]\n问：{question}\n答："
        return [*self.tokenizer.encode(text), self.tokenizer.gmask_id, self.tokenizer.sop_id]

    def complete(self, text: str) -> list[int]:
        """Blank infilling: `[MASK]` in the text is filled in, `[gMASK]` or nothing is continued.

        A text without a mask gets [gMASK]; one that does not end in its mask is closed by </s>; <sop> opens the answer,
        unless the text brings it.
        """
        tokenizer = self.tokenizer
        masks = {tokenizer.mask_id, tokenizer.gmask_id}
        ids = tokenizer.encode_special(text)
        if not masks.intersection(ids):
            at = ids.index(tokenizer.sop_id) if tokenizer.sop_id in ids else len(ids)
            ids.insert(at, tokenizer.gmask_id)
        if tokenizer.sop_id not in ids:
            if ids[-1] not in masks:
                ids.append(tokenizer.end_id)
            ids.append(tokenizer.sop_id)
        return ids

    def clean(self, text: str) -> str:
        """Marks beside a Chinese character become full-width again: the vocabulary only has the half-width ones."""
        text = text.strip().replace(*_TRAINING_TIME)
        for half, full in _MARKS:
            text = re.sub(_CJK + re.escape(half), rf"\1{full}", text)
            text = re.sub(re.escape(half) + _CJK, rf"{full}\1", text)
        return text


class ChatGLM2Prompt(_Cleaned):
    """ChatGLM2-6B: numbered rounds from 1, with blank lines, behind [gMASK] and sop."""

    has_system = False
    prefix = (chatglm2.GMASK, chatglm2.SOP)

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        history, question = rounds(messages)
        turns = [f"[Round {i}]\n\n问：{q}\n\n答：{a}\n\n" for i, (q, a) in enumerate(history, 1)]
        text = "".join(turns) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："
        return [*self.prefix, *self.tokenizer.encode(text)]

    def complete(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_special(text)
        return ids if self.prefix[1] in ids else [*self.prefix, *ids]

    def clean(self, text: str) -> str:
        return text.strip().replace(*_TRAINING_TIME)


class ChatGLM3Prompt(_Cleaned):
    """ChatGLM3-6B: a role token, a header line and the content for each message; the header of a tool call is its name.

    Header and content are encoded apart from each other, as the original does.
    """

    takes_tools = True
    prefix: tuple[int, int] = (chatglm2.GMASK, chatglm2.SOP)

    def role(self, message: Message) -> int:
        """The id of the message's role token. Raises Usage for a role that the family does not have."""
        return chatglm2.ROLES[role_name(message)]

    def header(self, message: Message) -> str:
        """The name of the tool in the model's own calls; everybody else has none."""
        return message.name or "" if message.role == "assistant" else ""

    def turn(self, message: Message) -> list[int]:
        header, content = self.tokenizer.encode(f"{self.header(message)}\n"), message.content
        if message.tools is not None:
            content += "\n" + json.dumps(message.tools, indent=4, ensure_ascii=False)
        return [self.role(message), *header, *self.tokenizer.encode(content)]

    def _turns(self, messages: Sequence[Message]) -> list[int]:
        return [*self.prefix, *(token for message in messages for token in self.turn(message))]

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        return [*self._turns(messages), self.role(Message("assistant", ""))]

    def render_open(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> list[int]:
        if not messages or messages[-1].role != "assistant" or not messages[-1].content:
            return super().render_open(messages, variables)
        return self._turns(messages)  # the answer's header line stands before what there is of it

    def render_answered(self, messages: Sequence[Message], variables: Mapping[str, Any] = NO_VARIABLES) -> Answered:
        """The model writes the header line too; the next role's token ends a tool call, the end of a text all else."""
        last = messages[-1]
        stop = self.role(Message("observation", "")) if self.header(last) else self.stop_ids[0]
        return Answered(self.render(messages[:-1]), self.turn(last)[1:], [stop])

    def tool_call(self, name: str, arguments: Mapping[str, Any]) -> Message:
        """As the original's training data: a call of Python that is read and never run."""
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        return Message("assistant", f"```python\ntool_call({given})\n```", name)

    def tool_offer(self, system: str, functions: Sequence[Mapping[str, Any]]) -> Message:
        return Message("system", system or _OFFER, tools=tuple(functions))

    def complete(self, text: str) -> list[int]:
        ids = self.tokenizer.encode_special(text)
        return ids if self.prefix[1] in ids else [*self.prefix, *ids]

    def clean(self, text: str) -> str:
        """The last part of the answer; a tool call keeps its header line and is shown as it is, never evaluated."""
        part = text.split("<|assistant|>")[-1]
        header, newline, content = part.partition("\n")
        if not newline:
            header, content = "", part
        if header.strip():
            return f"{header.strip()}\n{content}"
        return content.strip().replace(*_TRAINING_TIME)

    def separable(self, text: str) -> int:
        """Nothing: the first line decides how the rest is read, and a later part takes the place of an earlier one."""
        return 0


def role_name(message: Message) -> str:
    role = "observation" if message.role == "tool" else message.role
    if role not in chatglm2.ROLES:
        raise Usage(
            tr("there is no role {role!r} in this family", role=role),
            hint="system, user, assistant, tool",
            code="prompt.role",
        )
    return role


# ruff: noqa: E501 - Chinese characters count twice

# The words of the template, which the model was trained on.
_TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当"
    "的答复和支持。\n\n# 可用工具"
)
_CALL = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"


_OFFER = "Answer the following questions as best as you can. You have access to the following tools:"


class GLM4Prompt(ChatGLM3Prompt):
    """As ChatGLM3, but header and content are one text, messages without content are left out, and tools are a system
    message of their own."""

    prefix = (IDS["[gMASK]"], IDS["<sop>"])

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int] = ()) -> None:
        ends = (IDS["<|endoftext|>"], IDS["<|user|>"], IDS["<|observation|>"])
        super().__init__(tokenizer, (*stop_ids, *ends))

    def role(self, message: Message) -> int:
        return IDS[f"<|{role_name(message)}|>"]

    def tool_call(self, name: str, arguments: Mapping[str, Any]) -> Message:
        return Message("assistant", json.dumps(arguments, ensure_ascii=False), name)

    def tool_offer(self, system: str, functions: Sequence[Mapping[str, Any]]) -> Message:
        return PromptFormat.tool_offer(self, system, functions)

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
        description = json.dumps(function, indent=4, ensure_ascii=False)
        text += f"\n\n## {function.get('name', '')}\n\n{description}{_CALL}"
    return text


def chatglm_prompt(folder: Path, tokenizer: Tokenizer, spec: ModelSpec) -> PromptFormat:
    assert isinstance(tokenizer, ChatGLMTokenizer)
    return ChatGLMPrompt(tokenizer, spec.eos_ids)


def chatglm2_prompt(folder: Path, tokenizer: Tokenizer, spec: ModelSpec) -> PromptFormat:
    """The format of ChatGLM2, ChatGLM3 or GLM-4."""
    formats: dict[str, type[ChatGLM2Prompt] | type[ChatGLM3Prompt]]
    formats = {"chatglm2": ChatGLM2Prompt, "chatglm3": ChatGLM3Prompt, "glm4": GLM4Prompt}
    return formats[spec.family](tokenizer, spec.eos_ids)
