"""Conversations as files: readable, complete, and safe to bring back."""

from __future__ import annotations

import copy
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import Tree
from glmchat.chat.history.transcript import add_to_history, export, file_name, read_import, to_json
from glmchat.core.errors import Damaged


@pytest.fixture
def tree(history: History) -> Tree:
    tree = history.new("smollm2")
    first = history.append(tree, "user", "什么是\n量化？")
    history.append(tree, "assistant", "```python\nx = 1\n```", token_ids=(5, 6), details={"seed": 7})
    history.append_clear(tree)
    history.append(tree, "user", "more")
    history.append(tree, "assistant", "half", state="stopped")
    history.append(tree, "assistant", "other", parent=first.id)
    history.open_branch(tree, tree.messages[5])
    gone = history.append(tree, "user", "delete me")
    history.delete_messages(tree, [gone], leaf=5)
    history.rename(tree, "量化: a/b?")
    return tree


def test_markdown_holds_the_open_branch_with_its_marks(tree: Tree) -> None:
    text = export(tree, "markdown")
    assert text.startswith("# 量化: a/b?\n")
    assert "```python\nx = 1\n```" in text and "*(stopped)*" in text and "*Context cleared here*" in text
    assert "other" not in text and "delete me" not in text


def test_an_export_says_which_model_and_adapters_answered_and_what_was_forced(history: History, tree: Tree) -> None:
    adapters = [{"name": "poet", "scale": 0.5}, {"name": "medical", "scale": 1.0, "forced": True}]
    history.append(tree, "assistant", "Yes.", details={"model": "/srv/models/qwen:int4", "adapters": adapters})
    who = "Assistant (qwen:int4 + poet:0.5 + medical (forced))"
    assert f"## {who}\n" in export(tree, "markdown") and f"{who}:\n" in export(tree, "text")


def test_text_is_plain(tree: Tree) -> None:
    text = export(tree, "text")
    assert "You:\n什么是\n量化？\n" in text and "half [stopped]" in text and "#" not in text


def test_json_comes_back_whole_as_a_new_conversation(history: History, tree: Tree) -> None:
    data = export(tree, "json").encode()
    (copy,) = add_to_history(history, read_import(data, "x.json"))
    again = history.load(copy.conversation.id)
    assert [m.text for m in again.path()] == [m.text for m in tree.path()]
    assert [m.state for m in again.path()] == [m.state for m in tree.path()]
    assert again.path()[1].token_ids == (5, 6) and again.path()[1].details == {"seed": 7}
    assert len(again.messages) == len(tree.messages) - 1  # deleted ones stay behind
    assert again.conversation.title == "量化: a/b?" and again.conversation.model == "smollm2"
    assert len(history.conversations()) == 2
    one, two = (to_json([t])["conversations"][0] for t in (tree, again))
    assert one["created"] == two["created"]
    assert [m["created"] for m in one["messages"]] == [m["created"] for m in two["messages"]]
    assert history.search("量化")[0].conversation == copy.conversation.id


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}],
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"text": "hello"}]}]},
        [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "S"}],
    ],
)  # fmt: skip
def test_other_programs_forms_are_read(history: History, value: object) -> None:
    data = ("\ufeff" + json.dumps(value)).encode()
    (tree,) = add_to_history(history, read_import(data, "x"))
    assert [(m.role, m.text) for m in tree.path()] == [("user", "hi"), ("assistant", "hello")]
    assert tree.conversation.title == "hi"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"[1]",
        b"{}",
        b'{"messages": []}',
        b'{"messages": [{"role": "root", "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"glmchat_history": 99, "conversations": []}',
        b'[{"id": 1, "parent": 2, "role": "user", "text": "a"}, {"id": 2, "parent": 1, "role": "user", "text": "x"}]',
        b'[{"id": 1, "role": "user", "text": "a"}, {"id": 1, "role": "user", "text": "b"}]',
        b'{"settings": {"adapters": 5}, "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_and_nothing_is_added(history: History, data: bytes) -> None:
    with pytest.raises(Damaged) as wrong:
        add_to_history(history, read_import(data, "bad.json"))
    assert "bad.json" in wrong.value.message and wrong.value.exit == 3
    assert history.conversations() == []


def test_a_half_good_file_adds_nothing(history: History) -> None:
    data = json.dumps([{"messages": [{"role": "user", "content": "good"}]}, {"messages": [{"role": "user"}]}]).encode()
    with pytest.raises(Damaged):
        add_to_history(history, read_import(data, "x"))
    assert history.conversations() == []


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("关于量化", "关于量化.md"),
        ("a/b\\c:d*e?f\"g<h>i|j", "a-b-c-d-e-f-g-h-i-j.md"),
        ("..", "conversation.md"),
        ("", "conversation.md"),
        ("\x1b[31mred\x00", "[31mred.md"),
        (" two  words\n", "two-words.md"),
    ],
)  # fmt: skip
def test_file_names_keep_chinese_and_harm_nobody(history: History, title: str, name: str) -> None:
    tree = history.new()
    history.change(tree, title=title)
    assert file_name(tree, "markdown") == name


def test_long_titles_fit_every_file_system(history: History) -> None:
    tree = history.new()
    history.change(tree, title="量" * 300)
    assert len(file_name(tree, "json").encode()) <= 120


def test_half_a_surrogate_pair_does_not_break_the_database(history: History) -> None:
    (tree,) = add_to_history(history, read_import(b'[{"role": "user", "content": "a\\ud83d b"}]', "x"))
    assert history.saved and tree.path()[0].text == "a? b"


FOUND = sorted((Path(__file__).parents[1] / "fuzz" / "found").glob("history-*.bin"))


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_mutation_found_is_refused_or_comes_in_and_can_be_shown_and_exported(history: History, path: Path) -> None:
    before = len(history.conversations())
    try:
        trees = add_to_history(history, read_import(path.read_bytes(), path.name))
    except Damaged as refused:
        assert path.name in refused.message and len(history.conversations()) == before
        return
    assert history.saved and len(history.conversations()) == before + len(trees)
    for tree in trees:
        again = history.load(tree.conversation.id)
        for form in ("markdown", "text", "json"):
            export(again, form)
            export(tree, form)


WHOLE = {
    "glmchat_history": 1,
    "conversations": [
        {
            "id": 1, "title": "t", "renamed": False, "model": "m", "created": "2026-01-01T00:00:00+00:00",
            "pinned": False, "leaf": 2,
            "settings": {
                "system": "s", "sampling": {"temperature": 0.5, "stop": ["a"], "seed": 1},
                "adapters": [{"name": "x", "scale": 0.5}], "context_policy": "drop",
            },
            "messages": [
                {"id": 1, "parent": None, "role": "user", "text": "q", "state": "complete", "created": None},
                {
                    "id": 2, "parent": 1, "role": "assistant", "text": "a", "state": "stopped", "created": 7,
                    "token_ids": [1, 2], "details": {
                        "model": "m", "adapters": [{"name": "x", "scale": 1}], "spans": [0], "prompt_tokens": 3,
                        "facts": {"quant": "int4"}, "sampling": {"top_p": 1}, "seen_from": 1,
                    },
                },
            ],
        }
    ],
}  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, -1, 1.5, 10**400, "x", "9999-12-31T23:59:59", [], [{}], {}, {"a": []}, "\ud800")


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inside:
        yield (*before, key)
        yield from places(below, (*before, key))


@pytest.mark.parametrize("place", list(places(WHOLE)), ids=lambda place: ".".join(map(str, place)))
def test_a_field_of_any_other_type_is_refused_or_left_out(place: tuple[Any, ...]) -> None:
    for other in OTHERS:
        data = copy.deepcopy(WHOLE)
        at: Any = data
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = other
        with History.open(None) as history:
            try:
                trees = add_to_history(history, read_import(json.dumps(data).encode(), "file"))
            except Damaged:
                continue
            for tree in trees:
                again = history.load(tree.conversation.id)
                for form in ("markdown", "text", "json"):
                    assert export(again, form)
                assert "\ud800" not in again.conversation.title


def test_cells_of_another_type_cost_themselves_and_nothing_else(tmp_path: Path) -> None:
    with History.open(tmp_path / "history.db") as history:
        tree = add_to_history(history, read_import(json.dumps(WHOLE).encode(), "file"))[0]
    number = tree.conversation.id
    columns = {
        "conversation": ("title", "model", "created", "updated", "settings", "draft", "leaf"),
        "message": ("text", "created", "token_ids", "details", "chosen", "owner", "state"),
    }
    for table, names in columns.items():
        for name in names:
            for cell in ("x", 7, 1e300, b"\x00\xff", "[1]", '{"sampling": {"top_k": "x"}, "system": "kept"}'):
                with closing(sqlite3.connect(tmp_path / "history.db")) as connection:
                    connection.execute(f"UPDATE {table} SET {name} = ?", (cell,))
                    connection.commit()
                with History.open(tmp_path / "history.db") as history:
                    assert [one.id for one in history.conversations()] == [number]
                    assert export(history.load(number), "json")
                    if name == "settings" and "kept" in str(cell):
                        assert history.load(number).conversation.settings.system == "kept"


def test_what_is_imported_stands_where_its_time_is_and_stays_there(history: History) -> None:
    day = 86_400.0
    now = time.time()

    def conversation(text: str, at: float) -> dict[str, object]:
        said = [{"role": "user", "content": text, "created": at}, {"role": "assistant", "content": "x", "created": at}]
        return {"messages": said}

    for text in ("old", "late"):
        tree = history.new()
        history.append(tree, "user", text, created=now - 5 * day if text == "old" else now - day)
    times = {"oldest": 9, "newest": 0.1, "middle": 3, "before all": 40}
    incoming = [conversation(text, now - days * day) for text, days in times.items()]
    trees = add_to_history(history, read_import(json.dumps(incoming).encode(), "x.json"))
    order = ["newest", "late", "middle", "old", "oldest", "before all"]
    assert [c.title for c in history.conversations()] == order
    for tree in trees:
        history.rename(tree, tree.conversation.title + "!")
    assert [c.title.rstrip("!") for c in history.conversations()] == order
    history.append(trees[0], "user", "again")
    last = history.last()
    assert last is not None and last.id == trees[0].conversation.id == history.conversations()[0].id
