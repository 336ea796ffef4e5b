"""Conversations of other programs come in with their branches and times, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import Tree
from glmchat.chat.history.transcript import add_to_history, read_import
from glmchat.core.errors import Damaged


def bring(history: History, value: Any) -> list[Tree]:
    data = value if isinstance(value, bytes) else json.dumps(value, ensure_ascii=False).encode()
    return add_to_history(history, read_import(data, "file.json"))


def said(role: str, *parts: Any, at: float | None = None, **more: Any) -> dict[str, Any]:
    content = {"content_type": "text", "parts": list(parts)}
    return {"author": {"role": role}, "content": content, "create_time": at, "metadata": {}, **more}


def chatgpt(*, children: bool = True) -> dict[str, Any]:
    nodes: dict[str, tuple[str | None, Any]] = {
        "a": (None, None),
        "hidden": ("a", said("system", "be nice", metadata={"is_visually_hidden_from_conversation": True})),
        "b": ("hidden", said("user", "hi", at=1700000000.5)),
        "call": ("b", said("assistant", "search()", recipient="browser")),
        "result": ("call", said("tool", "found")),
        "c": ("result", said("assistant", "yes", at=1700000010.0, metadata={"model_slug": "gpt-x"})),
        "d": ("b", said("assistant", "no", at=1700000020.0)),
        "e": ("c", said("user", {"content_type": "image_asset_pointer"}, "what is it?")),
    }
    mapping: dict[str, dict[str, Any]] = {}
    for key, (parent, message) in nodes.items():
        mapping[key] = {"id": key, "message": message, "parent": parent}
        if children:
            mapping[key]["children"] = [k for k, (p, _) in nodes.items() if p == key]
    return {"title": "T", "create_time": 1700000000.5, "current_node": "c", "mapping": mapping}


@pytest.mark.parametrize("children", [True, False])
def test_a_chatgpt_export_opens_where_it_stood_and_keeps_the_other_answer_as_a_branch(
    history: History, children: bool
) -> None:
    (tree,) = bring(history, [chatgpt(children=children)])
    assert [(m.role, m.text) for m in tree.path()] == [("user", "hi"), ("assistant", "yes")]
    question, answer = tree.path()
    assert [m.text for m in tree.siblings(answer)] == ["yes", "no"]
    assert question.created == 1700000000.5 and answer.created == 1700000010.0
    assert answer.details["model"] == "gpt-x" and tree.conversation.title == "T"
    assert {m.text for m in tree.messages.values()} == {"hi", "yes", "no", "[image]\nwhat is it?"}


def test_parents_are_read_from_children_where_they_are_named_there_alone(history: History) -> None:
    one = chatgpt()
    for node in one["mapping"].values():
        del node["parent"]
    (tree,) = bring(history, [one])
    assert [m.text for m in tree.path()] == ["hi", "yes"]


def test_an_open_webui_export_keeps_branches_times_and_models(history: History) -> None:
    messages = {
        "u": {"id": "u", "parentId": None, "role": "user", "content": "hi", "timestamp": 1700000000},
        "x": {"id": "x", "parentId": "u", "role": "assistant", "content": "yes", "timestamp": 1700000001000,
              "model": "m:7b"},
        "y": {"id": "y", "parentId": "u", "role": "assistant", "content": "no", "timestamp": 1700000002},
    }  # fmt: skip
    export = [{"id": "1", "title": "T", "chat": {"title": "T", "history": {"messages": messages, "currentId": "x"}}}]
    (tree,) = bring(history, export)
    assert [m.text for m in tree.path()] == ["hi", "yes"]
    assert [m.text for m in tree.siblings(tree.path()[-1])] == ["yes", "no"]
    assert [m.created for m in tree.path()] == [1700000000, 1700000001]
    assert tree.conversation.model == "m:7b"


ROOT = "00000000-0000-0000-0000-000000000000"


@pytest.mark.parametrize("nested", [True, False])
def test_a_librechat_export_is_read_flat_and_nested(history: History, nested: bool) -> None:
    question = {"messageId": "q", "parentMessageId": ROOT, "isCreatedByUser": True, "text": "hi",
                "createdAt": "2024-01-01T00:00:00.000Z"}  # fmt: skip
    answers = [
        {"messageId": "x", "parentMessageId": "q", "isCreatedByUser": False, "text": "yes", "model": "m",
         "createdAt": "2024-01-01T00:00:01.000Z"},
        {"messageId": "y", "parentMessageId": "q", "isCreatedByUser": False, "text": "",
         "content": [{"type": "think", "think": "hm"}, {"type": "text", "text": {"value": "no"}}],
         "createdAt": "2024-01-01T00:00:02.000Z"},
    ]  # fmt: skip
    messages = [{**question, "children": answers}] if nested else [question, *answers]
    (tree,) = bring(history, {"conversationId": "c", "title": "T", "messages": messages})
    assert [m.text for m in tree.path()] == ["hi", "no"]  # the newest answer is the open one
    assert [m.text for m in tree.siblings(tree.path()[-1])] == ["yes", "no"]
    assert tree.path()[0].created == 1704067200.0


def test_a_claude_export_is_a_line_of_messages_or_a_tree(history: History) -> None:
    messages = [
        {"uuid": "1", "sender": "human", "text": "hi", "created_at": "2024-01-01T00:00:00Z"},
        {"uuid": "2", "sender": "assistant", "content": [{"type": "text", "text": "yes"}]},
    ]  # fmt: skip
    (tree,) = bring(history, [{"uuid": "c", "name": "T", "chat_messages": messages}])
    assert [(m.role, m.text) for m in tree.path()] == [("user", "hi"), ("assistant", "yes")]
    assert tree.conversation.title == "T"


def test_json_lines_are_conversations_or_the_messages_of_one(history: History) -> None:
    message = '{"role": "user", "content": "hi"}'
    assert len(bring(history, f'{{"messages": [{message}]}}\n{{"messages": [{message}]}}\n'.encode())) == 2
    (tree,) = bring(history, f"{message}\n{message}\n".encode())
    assert [m.text for m in tree.path()] == ["hi", "hi"]


RING = {
    "mapping": {"a": {"parent": "b", "message": said("user", "x")}, "b": {"parent": "a", "message": said("user", "y")}}
}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([chatgpt(), RING], "conversation 2: its messages hang on each other in a ring"),
        (
            [chatgpt(), {"title": "empty", "mapping": {"a": {"message": None}}}],
            "conversation 2: nothing was said in it",
        ),
        ([chatgpt(), {"mapping": {"a": 5, "b": {"message": 5, "children": 7}}}], "conversation 2: nothing was said"),
        (b"PK\x03\x04 zip", "zip archive"),
        (b'{"messages": []}\nnot json', "Expecting value"),
    ],
)
def test_what_cannot_be_read_is_named_and_nothing_comes_in(history: History, value: Any, words: str) -> None:
    with pytest.raises(Damaged, match=words) as refused:
        bring(history, value)
    assert "ChatGPT" in refused.value.hint
    assert history.conversations() == []
