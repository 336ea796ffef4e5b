"""GLM-4's conversations, as the chat template in its tokenizer_config.json writes them down, tools included."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from glmchat.core.messages import Message
from glmchat.engine.prompts_chatglm import ChatGLM3Prompt, role_name
from glmchat.engine.tokenizers.base import Tokenizer
from glmchat.engine.tokenizers.glm4 import IDS

# ruff: noqa: E501 - Chinese characters count twice

# The words of the template, which the model was trained on.
_TOOLS = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，你的任务是针对用户的问题和要求提供适当"
    "的答复和支持。\n\n# 可用工具"
)
_CALL = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
_BUILT_IN = {
    "python": (
        "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n`python` 返回"
        "代码执行的输出，或在执行 60 秒后返回超时。\n`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
        "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。"
    ),
    "simple_browser": (
        "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n`search(query: str, recency_days: int)`：使用搜索引擎进行查询并"
        "显示结果，可以使用 `recency_days` 参数控制搜索内容的时效性。\n`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。"
        "每次调用时，须选择3-10个页面。选择多个角度的页面，同时尽可能选择可信任的信息来源。考虑到部分页面是无法加载的，你也可以多打开"
        "一些可能有用的页面而不用担心内容过多。\n`open_url(url: str)`：打开指定的 URL。\n\n使用 `【{引用 id}†{引用文本}】` 来引用"
        "内容。\n\n操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; 3. 根据获得的内容进行回复。"
        "在回复中应当引用信息来源。\n 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n如果初次搜索结果没有找到合适的信息，"
        "也可以再次使用 `search` 进行搜索。"
    ),
    "cogview": (
        "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。你需要向 `cogview` 发送图像描述，规则：\n"
        "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n- 应当尽可能详细地描述图像生成的需求，需求描述约 "
        "100 英文单词。\n- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n- 如无特殊说明，所在地为中国，持有中国立场并遵循"
        "中国社会主义价值观。"
    ),
}  # fmt: skip


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
    """The system message that offers `tools`; kinds that the template does not know are left out, as it does."""
    text = _TOOLS
    for tool in tools:
        kind, function = tool.get("type"), tool.get("function")
        if kind == "function" and isinstance(function, Mapping):
            said = json.dumps(function, indent=4, ensure_ascii=False)
            text += f"\n\n## {function.get('name', '')}\n\n{said}{_CALL}"
        elif kind in _BUILT_IN:
            text += f"\n\n## {kind}\n\n{_BUILT_IN[kind]}"
    return text
