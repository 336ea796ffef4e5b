"""What is asked, from files and from stdin."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glmchat.cli import output
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.hub.removal import RemovalPlan

_LIMIT = 64 * 1024 * 1024  # bytes; far above any context
_ROLES = frozenset({"system", "user", "assistant", "tool", "observation"})


def read_stdin(*, wait: bool) -> str | None:
    """What stdin holds, without its last newlines; None if it is closed or empty.

    wait: read from a terminal too, until Ctrl+D. Raises Usage for what is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        return None
    if output.is_terminal(sys.stdin):
        if not wait:
            return None
        output.say(tr("Type the prompt, then press Ctrl+D."))
    try:
        data = sys.stdin.buffer.read(_LIMIT + 1)
    except OSError:  # a descriptor that was open for writing only
        return None
    return decoded(data, tr("stdin")).rstrip("\n") or None


def decoded(data: bytes, where: str) -> str:
    """UTF-8 text; a byte order mark is taken off. Raises Usage that says where it goes wrong."""
    if len(data) > _LIMIT:
        raise Usage(tr("{where} is too long", where=where), hint=tr("send less text"), code="input.too_long")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Usage(
            tr(
                "{where} is not UTF-8: byte {offset} is 0x{value:02x}",
                where=where,
                offset=error.start,
                value=data[error.start],
            ),
            hint=tr("convert it first, for example: iconv -f GB18030 -t UTF-8"),
            code="input.encoding",
        ) from None


def read_messages(path: Path) -> tuple[Message, ...]:
    """A JSON list of messages. Raises Usage that names the message at fault."""
    if str(path) == "-":
        text = read_stdin(wait=True) or ""
    else:
        try:
            text = decoded(path.read_bytes(), one_line(str(path)))
        except OSError as error:
            raise Usage(
                tr("{path} cannot be read: {reason}", path=one_line(str(path)), reason=error.strerror or str(error)),
                hint=tr("a JSON list of messages"),
                code="input.messages",
            ) from None
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(path, one_line(str(error), 120)) from None
    if isinstance(data, dict):
        data = data.get("messages")
    if not isinstance(data, list) or not data:
        raise _wrong(path, tr("expected a list of messages"))
    return tuple(_message(item, number, path) for number, item in enumerate(data, 1))


def _message(item: Any, number: int, path: Path) -> Message:
    try:
        message = Message.from_json(item)
    except (AttributeError, ValueError):
        message = None
    if message is None or message.role not in _ROLES:
        raise _wrong(path, tr("message {number} has no valid role and content", number=number))
    return replace(message, content=message.content.encode("utf-8", "replace").decode())


def _wrong(path: Path, why: str) -> Usage:
    return Usage(
        f"{one_line(str(path))}: {why}",
        hint='[{"role": "user", "content": "Hello"}]',
        code="input.messages",
    )


def carry_out(plan: RemovalPlan, *, yes: bool, dry_run: bool, as_json: bool) -> None:
    from glmchat.hub.removal import execute

    if as_json:
        output.json_line({"event": "plan", **plan.to_json()} if not dry_run else plan.to_json())
    else:
        for step in plan.steps:
            size = human_bytes(step.size_bytes) if step.size_bytes else ""
            output.data(f"{step.path}  {size}".rstrip())
    for sentence in plan.keeps:
        output.say(sentence)
    if not plan.steps:
        output.say(tr("there is nothing to remove"))
        return
    size = human_bytes(plan.bytes_freed)
    if dry_run:
        output.say(tr("{size} would be freed", size=size))
        return
    names = ", ".join(plan.names) or tr("{count} leftovers", count=len(plan.steps))
    if not output.confirm(tr("remove {names} and free {size}?", names=names, size=size), assume_yes=yes):
        output.say(tr("nothing was removed"))
        return
    execute(plan)
    output.say(tr("{size} freed", size=size))
    if as_json:
        output.json_line({"event": "done", "bytes_freed": plan.bytes_freed})
