"""Conversations as files: Markdown and text to read, JSON to keep and to bring back."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from glmchat.chat.history.foreign import from_other_program, seconds
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import (
    CLEAR,
    NO_IDS,
    UNFINISHED,
    ConversationSettings,
    State,
    StoredMessage,
    TokenIds,
    Tree,
    sound_details,
    title_from,
)
from glmchat.core.errors import Damaged, Usage
from glmchat.core.files import write_for_person
from glmchat.core.language import tr
from glmchat.core.locations import user_path
from glmchat.core.text import one_line, short_name, whole_text

Format = Literal["markdown", "json", "text"]
SUFFIXES: Mapping[str, Format] = {".md": "markdown", ".markdown": "markdown", ".json": "json", ".txt": "text"}
FORMAT_VERSION = 1
IMPORT_LIMIT = 512 * 1024 * 1024  # bytes of one file
_ROLES = frozenset({"system", "user", "assistant", "tool", "observation", CLEAR})
# The names other programs write; ShareGPT's "from" and "value" among them.
_OTHER_ROLES: Mapping[str, str] = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "developer": "system",
}


def export(tree: Tree, form: Format) -> str:
    """The open branch as Markdown or text, or the whole tree as JSON."""
    if form == "json":
        return json.dumps(to_json([tree]), ensure_ascii=False, indent=1) + "\n"
    return _markdown(tree) if form == "markdown" else _text(tree)


def file_name(tree: Tree, form: Format) -> str:
    """A name that keeps what the title says, Chinese too, and that every file system takes: at most 120 bytes."""
    suffix = {"markdown": ".md", "json": ".json", "text": ".txt"}[form]
    title = unicodedata.normalize("NFC", tree.conversation.title)
    title = "".join(" " if unicodedata.category(c)[0] in "CZ" or c in '/\\:*?"<>|%' else c for c in title)
    title = re.sub(r"\s+", "-", title.strip(" .-")) or "conversation"
    while len(title.encode()) > 120 - len(suffix):
        title = title[:-1]
    return f"{title.rstrip('.-') or 'conversation'}{suffix}"


def to_json(trees: Iterable[Tree]) -> dict[str, Any]:
    """Everything of these conversations: all branches, settings, token ids and details; deleted messages not."""
    return {"glmchat_history": FORMAT_VERSION, "conversations": [_conversation(tree) for tree in trees]}


def _conversation(tree: Tree) -> dict[str, Any]:
    head = tree.conversation
    gone = {m.id: m.parent for m in tree.messages.values() if m.deletion is not None}

    def above(parent: int | None) -> int | None:
        while parent in gone:
            parent = gone[parent]
        return parent

    return {
        "id": head.id,
        "title": head.title,
        "renamed": head.renamed,
        "model": head.model,
        "created": _iso(head.created),
        "updated": _iso(head.updated),
        "pinned": head.pinned,
        "settings": head.settings.to_json(),
        "leaf": above(head.leaf),
        "messages": [
            {
                "id": m.id,
                "parent": above(m.parent),
                "role": m.role,
                "text": m.text,
                "state": m.state,
                "created": _iso(m.created),
                "token_ids": list(m.token_ids),
                "details": dict(m.details),
            }
            for m in sorted(tree.messages.values(), key=lambda m: m.id)
            if m.deletion is None
        ],
    }


def _markdown(tree: Tree) -> str:
    head = tree.conversation
    lines = [f"# {one_line(head.title) or tr('Conversation')}", ""]
    facts = [_local(head.created), *([head.model] if head.model else [])]
    lines += [" · ".join(facts), ""]
    if head.settings.system:
        lines += [f"> {tr('System prompt')}: " + head.settings.system.replace("\n", "\n> "), ""]
    for message in tree.path():
        if message.is_clear:
            lines += ["---", "", f"*{tr('Context cleared here')}*", ""]
            continue
        lines += [f"## {_speaker(message)}", "", message.text.rstrip(), ""]
        if message.state in UNFINISHED:
            lines += [f"*({state_word(message.state)})*", ""]
    return "\n".join(lines).rstrip() + "\n"


def _text(tree: Tree) -> str:
    lines = [one_line(tree.conversation.title), _local(tree.conversation.created), ""]
    for message in tree.path():
        if message.is_clear:
            lines += ["-" * 40, ""]
            continue
        ending = f" [{state_word(message.state)}]" if message.state in UNFINISHED else ""
        lines += [f"{_speaker(message)}:", message.text.rstrip() + ending, ""]
    return "\n".join(lines).rstrip() + "\n"


def _speaker(message: StoredMessage) -> str:
    names = {"user": tr("You"), "assistant": tr("Assistant"), "system": tr("System prompt")}
    name = names.get(message.role, message.role)
    return f"{name} ({who})" if message.role == "assistant" and (who := answered_by(message)) else name


def answered_by(message: StoredMessage, otherwise: str = "") -> str:
    """The model, or `otherwise` where it was not recorded, and its adapters: "smollm2 + poet:0.5"."""
    from glmchat.chat.adapters_choice import shown  # here, because a list of conversations needs none of the hub

    model = str(message.details.get("model") or otherwise)
    records = [a for a in message.details.get("adapters") or () if isinstance(a, dict)]
    adapters = [shown(str(a.get("name")), float(a.get("scale") or 1), forced=a.get("forced") is True) for a in records]
    return " + ".join([short_name(model), *adapters]) if model else ""


def state_word(state: str) -> str:
    """How an answer ended, for people."""
    return {
        "streaming": tr("being written"),
        "stopped": tr("stopped"),
        "interrupted": tr("interrupted"),
        "failed": tr("failed"),
        "cut": tr("cut off at the token limit"),
    }.get(state, "")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _local(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


# The way back.


def read_import(data: bytes, where: str) -> list[dict[str, Any]]:
    """The conversations in a file: an export of glmchat's or of another program (`foreign.py`), a list of messages
    ({"role", "content"}), an object with `messages` or ShareGPT's `conversations`, or such objects in a list or one a
    line. Raises Damaged that names the file.
    """
    if len(data) > IMPORT_LIMIT:
        raise _bad(where, tr("it is too large"))
    if data.startswith(b"PK"):
        raise _bad(where, tr("it is a zip archive: unpack it, conversations.json is in it"))
    try:
        value = _parsed(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _bad(where, one_line(str(error), 120)) from None
    if isinstance(value, dict) and "glmchat_history" in value:
        if value["glmchat_history"] != FORMAT_VERSION:
            raise _bad(where, tr("format {format} is not known", format=one_line(repr(value["glmchat_history"]), 40)))
        conversations = value.get("conversations")
    elif isinstance(value, list) and value and all(isinstance(v, dict) and _is_message(v) for v in value):
        conversations = [{"messages": value}]
    else:
        conversations = value if isinstance(value, list) else [value]
    if not isinstance(conversations, list) or not conversations:
        raise _bad(where, tr("it holds no conversation"))
    return [_checked(_own_form(one, where, number), where, number) for number, one in enumerate(conversations)]


def _parsed(text: str) -> Any:
    """One JSON value; a list where each line holds one. Raises ValueError, RecursionError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2 or whole.msg != "Extra data":
            raise
        return [json.loads(line) for line in lines]


def _own_form(one: Any, where: str, number: int) -> Any:
    try:
        return from_other_program(one) or one
    except ValueError as error:
        raise _bad(where, tr("conversation {number}: {why}", number=number + 1, why=str(error))) from None


def add_to_history(history: History, conversations: Iterable[Mapping[str, Any]]) -> list[Tree]:
    """Bring conversations in as new ones, all or none; what is there stays as it is.

    Each stands in the order of use where its last message does: the last one used before stays that, if it was later.
    """
    trees = []
    with history.batch():
        for one in sorted(conversations, key=_last_said):
            settings = ConversationSettings.from_json(one["settings"])
            tree = history.new(one["model"], settings)
            ids: dict[int, int] = {}
            for m in one["messages"]:
                parent = ids.get(m["parent"]) if m["parent"] is not None else None
                added = history.append(
                    tree, m["role"], m["text"], parent=parent, root=parent is None, created=m["created"]
                )
                ids[m["id"]] = added.id
                rest = {"state": m["state"], "token_ids": m["token_ids"], "details": m["details"]}
                tree.put(replace(added, **rest))
            leaf = ids.get(one["leaf"], tree.leaf)
            title = one["title"] or tree.conversation.title
            values = {"created": one["created"]} if one["created"] is not None else {}
            history.change(tree, title=title, pinned=one["pinned"], renamed=one["renamed"], leaf=leaf, **values)
            trees.append(tree)
        for tree in trees:
            history.place_by_time(tree, trees[0].conversation.id)
    return trees


def _last_said(one: Mapping[str, Any]) -> float:
    """What bears no time counts as said now."""
    return max((m["created"] for m in one["messages"] if m["created"] is not None), default=math.inf)


def _is_message(value: Mapping[str, Any]) -> bool:
    return ("role" in value or "from" in value) and ("content" in value or "value" in value or "text" in value)


def _checked(one: Any, where: str, number: int) -> dict[str, Any]:
    """One conversation with every field in its place and of its type."""
    messages = one.get("messages", one.get("conversations")) if isinstance(one, dict) else None
    if not isinstance(one, dict) or not isinstance(messages, list) or not messages:
        raise _bad(where, tr("conversation {number} has no messages", number=number + 1))
    checked: list[dict[str, Any]] = []
    ids: set[int] = set()
    for place, raw in enumerate(messages):
        message = _checked_message(raw, f"{where}, {number + 1}.{place + 1}", checked[-1]["id"] if checked else None)
        # A parent stands before its children, so no ring can come in.
        if message["id"] in ids or (message["parent"] is not None and message["parent"] not in ids):
            raise _bad(
                where,
                tr(
                    "message {message} of conversation {number} hangs on none before it",
                    message=place + 1,
                    number=number + 1,
                ),
            )
        ids.add(message["id"])
        checked.append(message)
    settings = one.get("settings")
    try:
        ConversationSettings.from_json(settings if isinstance(settings, dict) else {})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, Usage):
        raise _bad(where, tr("the settings of conversation {number} are not readable", number=number + 1)) from None
    title, model, system = one.get("title"), one.get("model"), one.get("system")
    first = next((m["text"] for m in checked if m["role"] == "user"), "")
    plain = (
        settings if isinstance(settings, dict) else {"system": whole_text(system) if isinstance(system, str) else None}
    )
    leaf = one.get("leaf")
    return {
        "title": one_line(whole_text(title), 120) if isinstance(title, str) and title else title_from(first),
        "renamed": one.get("renamed") is True,
        "model": whole_text(model) if isinstance(model, str) else None,
        "created": seconds(one.get("created")),
        "pinned": one.get("pinned") is True,
        "settings": plain,
        "leaf": leaf if isinstance(leaf, int) else None,
        "messages": checked,
    }


def _checked_message(raw: Any, where: str, before: int | None) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise _bad(where, tr("a message is not an object"))
    role = raw.get("role", raw.get("from"))
    role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
    text = raw.get("text", raw.get("content", raw.get("value")))
    if isinstance(text, list):  # OpenAI's parts
        parts = [part.get("text") for part in text if isinstance(part, dict)]
        text = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise _bad(where, tr("role {role} with a text is needed", role=repr(one_line(str(role), 40))))
    own = "id" in raw and isinstance(raw["id"], int)
    if own and not isinstance(raw.get("parent"), int | None):
        raise _bad(where, tr("a message hangs on what is no message"))
    ids, details, state = raw.get("token_ids"), raw.get("details"), raw.get("state")
    whole = isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < 1 << 31 for i in ids)
    states: list[Any] = [s for s in get_args(State) if s != "streaming"]
    return {
        "id": raw["id"] if own else (before or 0) + 1,
        "parent": raw.get("parent") if own else before,
        "role": role,
        "text": whole_text(text),
        "state": state
        if isinstance(state, str) and state in states
        else "interrupted"
        if state == "streaming"
        else "complete",
        "created": seconds(raw.get("created")),
        "token_ids": TokenIds(ids) if whole and isinstance(ids, list) else NO_IDS,
        "details": sound_details(details),
    }


def _bad(where: str, why: str) -> Damaged:
    return Damaged(
        tr("{path} is not a conversation that can be imported: {why}", path=one_line(where), why=why),
        hint=tr(
            "JSON of glmchat, ChatGPT, Open WebUI, LibreChat, Claude or ShareGPT, or objects with role and content"
        ),
        code="history.import",
    )


_FORMS: Mapping[str, Format] = {
    "md": "markdown",
    "markdown": "markdown",
    "json": "json",
    "txt": "text",
    "text": "text",
}


def write_export(tree: Tree, argument: str) -> Path:
    """The file that was written, named after the title unless a path was given. Raises Usage; replaces nothing."""
    word, _, rest = argument.partition(" ")
    name = rest.strip() if word in _FORMS else argument
    form = _FORMS.get(word) or SUFFIXES.get(Path(name).suffix.lower(), "markdown")
    path = user_path(name) if name else Path.cwd() / file_name(tree, form)
    try:
        write_for_person(path, export(tree, form))
    except FileExistsError:
        raise Usage(
            tr("{path} already exists", path=str(path)), hint=tr("give another path"), code="export.exists"
        ) from None
    except OSError as error:
        raise Usage(
            tr("{path} cannot be written: {reason}", path=str(path), reason=str(error.strerror)),
            hint=tr("give another path"),
            code="export.unwritable",
        ) from None
    return path
