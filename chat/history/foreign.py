"""Conversations that other programs exported, in the form that `transcript.py` checks and stores.

ChatGPT (`mapping`), Open WebUI (`chat.history`), LibreChat (`messageId`, nested or flat) and Claude (`chat_messages`)
keep trees: every message names the one above it. They become branches, with the times and the models that are named.
What passed between a model and its tools, hidden system words and empty messages are left out; what hung on them hangs
on the message above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from glmchat.chat.history.rows import LAST_TIME
from glmchat.core.language import tr

_ROLES = {"human": "user", "model": "assistant", "ai": "assistant"}
_SPOKEN = frozenset({"system", "user", "assistant"})


@dataclass(frozen=True, slots=True)
class _Node:
    """One message as it was exported. A text of None: nothing that was said."""

    key: str
    parent: str | None
    role: str
    text: str | None
    created: float | None = None
    model: str | None = None


def from_other_program(one: Any) -> dict[str, Any] | None:
    """The conversation in glmchat's form, or None if it is of none of these programs. Raises ValueError that says why.

    What is returned still passes through the checks of every import.
    """
    if not isinstance(one, dict):
        return None
    chat = one.get("chat")
    if isinstance(one.get("mapping"), dict):
        return _tree(one, _chatgpt(one["mapping"]), one.get("current_node"))
    if isinstance(chat, dict) and isinstance(history := chat.get("history"), dict):
        messages = history.get("messages")
        nodes = _open_webui(messages.values() if isinstance(messages, dict) else ())
        return _tree({**one, **chat, "created": one.get("created_at")}, nodes, history.get("currentId"))
    messages = one.get("messages")
    if isinstance(messages, list) and any(isinstance(m, dict) and "messageId" in m for m in messages):
        return _tree(one, _librechat(messages), None)
    if isinstance(said := one.get("chat_messages"), list):
        return _tree({**one, "title": one.get("name"), "created": one.get("created_at")}, _claude(said), None)
    return None


def _chatgpt(mapping: Mapping[str, Any]) -> Iterator[_Node]:
    parents = {
        child: key
        for key, node in mapping.items()
        if isinstance(node, dict)
        for child in _list(node.get("children"))
        if isinstance(child, str)
    }
    for key, node in mapping.items():
        if not isinstance(node, dict):
            continue
        message = node.get("message")
        message = message if isinstance(message, dict) else {}
        author, content, facts = (_object(message.get(name)) for name in ("author", "content", "metadata"))
        unseen = facts.get("is_visually_hidden_from_conversation") is True or message.get("recipient", "all") != "all"
        thought = content.get("content_type") in ("thoughts", "reasoning_recap", "model_editable_context")
        yield _Node(
            key,
            node["parent"] if isinstance(node.get("parent"), str) else parents.get(key),
            _role(author.get("role")),
            None if unseen or thought else _text(content.get("parts", content.get("text"))),
            seconds(message.get("create_time")),
            _name(facts.get("model_slug")),
        )


def _open_webui(messages: Iterable[Any]) -> Iterator[_Node]:
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("id"), str):
            yield _Node(
                message["id"],
                _name(message.get("parentId")),
                _role(message.get("role")),
                _text(message.get("content")),
                seconds(message.get("timestamp")),
                _name(message.get("model")),
            )


def _librechat(messages: Iterable[Any]) -> Iterator[_Node]:
    """Flat, or each message with those below it in `children`."""
    waiting = list(messages)[::-1]
    while waiting:
        message = waiting.pop()
        if not isinstance(message, dict) or not isinstance(message.get("messageId"), str):
            continue
        waiting += [m for m in reversed(_list(message.get("children"))) if isinstance(m, dict)]
        yield _Node(
            message["messageId"],
            _name(message.get("parentMessageId")),
            "user" if message.get("isCreatedByUser") is True else "assistant",
            _text(message.get("text")) or _text(message.get("content")),
            seconds(message.get("createdAt")),
            _name(message.get("model")),
        )


def _claude(messages: Iterable[Any]) -> Iterator[_Node]:
    above: str | None = None
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            continue
        key = _name(message.get("uuid")) or f"message {number + 1}"
        parent = message.get("parent_message_uuid", above)
        text = _text(message.get("content")) or _text(message.get("text"))
        yield _Node(key, _name(parent), _role(message.get("sender")), text, seconds(message.get("created_at")))
        above = key


def _tree(head: Mapping[str, Any], exported: Iterable[_Node], current: Any) -> dict[str, Any]:
    """Messages with numbers, each below the nearest one above it that was said. current: the key of the open end."""
    nodes = {node.key: node for node in exported}
    children: dict[str | None, list[str]] = {}
    for node in nodes.values():
        children.setdefault(node.parent if node.parent in nodes else None, []).append(node.key)
    numbers: dict[str, int | None] = {}  # of a message that was left out: the number of the one above it
    messages: list[dict[str, Any]] = []
    below: list[tuple[str, int | None]] = [(key, None) for key in reversed(children.get(None, ()))]
    while below:
        key, parent = below.pop()
        node = nodes[key]
        number = parent
        if node.text and node.role in _SPOKEN:
            number = len(messages) + 1
            details = {"model": node.model} if node.model and node.role == "assistant" else {}
            messages.append(
                {
                    "id": number, "parent": parent, "role": node.role, "text": node.text,
                    "created": node.created, "details": details,
                }
            )  # fmt: skip
        numbers[key] = number
        below += [(child, number) for child in reversed(children.get(key, ()))]
    if len(numbers) < len(nodes):
        raise ValueError(tr("its messages hang on each other in a ring"))
    if not messages:
        raise ValueError(tr("nothing was said in it"))
    title, created = head.get("title"), seconds(head.get("create_time", head.get("created", head.get("created_at"))))
    ages: dict[int | None, float] = {None: 0.0}  # a message without a time is as old as the one above it
    for m in messages:
        ages[m["id"]] = m["created"] or ages[m["parent"]]
    newest = max(messages, key=lambda m: (ages[m["id"]], m["id"]))
    models = [m["details"]["model"] for m in messages if m["details"]]
    return {
        "title": title if isinstance(title, str) else None,
        "model": models[-1] if models else None,
        "created": created,
        "leaf": numbers.get(current) if isinstance(current, str) and current in numbers else newest["id"],
        "messages": messages,
    }


def _role(value: Any) -> str:
    role = value.lower() if isinstance(value, str) else ""
    return _ROLES.get(role, role)


def _text(value: Any) -> str | None:
    """A text, or parts joined; an image or a file becomes its name in brackets, since glmchat keeps text."""
    if isinstance(value, str):
        return value.strip("\n") or None
    if not isinstance(value, list):
        return None
    parts = [part if isinstance(part, str) else _part(part) for part in value]
    return "\n".join(part for part in parts if part) or None


def _part(part: Any) -> str:
    part = _object(part)
    kind = str(part.get("content_type") or part.get("type") or "text")
    text = part.get("text")
    if isinstance(text, dict):
        text = text.get("value")
    if isinstance(text, str):
        return text
    return f"[{kind.partition('_')[0]}]" if kind.startswith(("image", "audio", "video", "file")) else ""


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _name(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def seconds(value: Any) -> float | None:
    """A time as ISO 8601, or as seconds or milliseconds since 1970; None for anything else."""
    try:
        if isinstance(value, str):
            value = datetime.fromisoformat(value).timestamp()
            return value if 0 <= value < LAST_TIME else None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LAST_TIME * 1000:
            return value / 1000 if value >= LAST_TIME else float(value)  # above it a time is not in seconds
    except (ValueError, OverflowError, OSError):
        return None
    return None
