"""What is asked: on the command line, from files and from stdin."""

from __future__ import annotations

import json
import os
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperOption

from glmchat.cli import output
from glmchat.core.errors import Usage
from glmchat.core.files import read_given
from glmchat.core.language import tr
from glmchat.core.messages import Message
from glmchat.core.text import human_bytes, one_line

if TYPE_CHECKING:
    from glmchat.hub.removal import RemovalPlan

_LIMIT = 64 * 1024 * 1024  # bytes; far above any context
_ROLES = frozenset({"system", "user", "assistant", "tool", "observation"})


SILENCE_SECONDS = 2.0  # of stdin, until it is said that it is being waited for
_CHUNK = 1 << 16


class TextCommand(TyperCommand):
    """A command that takes text: a word that begins with a dash and holds a blank is text, not an option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        options = [p for p in self.get_params(ctx) if isinstance(p, TyperOption) and not p.is_flag]
        takes_value = {name for option in options for name in option.opts}
        return super().parse_args(ctx, options_first(args, takes_value))


def options_first(arguments: Sequence[str], takes_value: set[str]) -> list[str]:
    """The same arguments with options before `--` and texts behind it, if there is a text that looks like an option.

    `-1 + 2 = ?` and `-p means what?` are texts; `-pwhat is it` and `--prompt=what is it` are options with values.
    """
    options: list[str] = []
    texts: list[str] = []
    rest = list(arguments)
    found = False
    while rest:
        word = rest.pop(0)
        if word == "--":
            texts += rest
            break
        if word in takes_value:
            options += [word, *rest[:1]]
            del rest[:1]
        elif not word.startswith("-") or word == "-":
            texts.append(word)
        elif _is_text(word, takes_value):
            found = True
            texts.append(word)
        else:
            options.append(word)
    return [*options, "--", *texts] if found else list(arguments)


def _is_text(word: str, takes_value: set[str]) -> bool:
    name, equals, _ = word.partition("=")
    if not any(map(str.isspace, word)) or (word.startswith("--") and equals and not any(map(str.isspace, name))):
        return False
    return word[:2] not in takes_value or word[2].isspace()


def read_stdin(*, wait: bool, beside: bool = False) -> str | None:
    """What stdin holds, without its last newlines; None if it is closed or empty.

    wait: read from a terminal too, until Ctrl+D. beside: it is added to a prompt that was given. Then a file that
    somebody else is in the middle of (the loop `while read`) is left alone, and it is said how much was added. A stdin
    that is open and silent is waited for, with a line that says so. Raises Usage for what is not UTF-8.
    """
    if sys.stdin is None or sys.stdin.closed:
        return None
    if output.is_terminal(sys.stdin):
        if not wait:
            return None
        output.say(tr("Type the prompt, then press Ctrl+D."))
        return decoded(_typed(), tr("stdin")).rstrip("\n") or None
    if beside and _is_being_read():
        output.say(tr("stdin is left to whoever reads that file (a loop?); a pipe would be added to the prompt"))
        return None
    try:
        data = _read_all()
    except OSError:  # a descriptor that was open for writing only
        return None
    text = decoded(data, tr("stdin")).rstrip("\n") or None
    if beside and text and text.strip():
        output.say(
            tr("{size} from stdin were added to the prompt; </dev/null keeps them out", size=human_bytes(len(data)))
        )
    return text


def _is_being_read() -> bool:
    """Is stdin a file of which a part was read already?"""
    try:
        descriptor = sys.stdin.fileno()
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and os.lseek(descriptor, 0, os.SEEK_CUR) > 0
    except (OSError, ValueError):  # what a test puts there has no descriptor
        return False


def _read_all() -> bytes:
    """Everything up to the end, or one byte more than the limit. Raises OSError."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError):
        return sys.stdin.buffer.read(_LIMIT + 1)
    data = bytearray()
    silent = False
    while len(data) <= _LIMIT:
        if not silent and not select.select([descriptor], [], [], SILENCE_SECONDS)[0]:
            silent = True
            output.say(tr("waiting for stdin to end; Ctrl+C stops, </dev/null says that nothing comes from there"))
        chunk = os.read(descriptor, _CHUNK)
        if not chunk:
            break
        data += chunk
    return bytes(data)


def _typed() -> bytes:
    """Lines typed at a terminal until Ctrl+D, through readline where Python has it.

    A terminal itself cuts every line at 4,095 bytes, in silence; readline takes each key, so that a long line that is
    pasted arrives whole.
    """
    lines: list[str] = []
    with _terminal_as_stdout(), suppress(EOFError):
        with suppress(ImportError):
            import_module("readline")  # input() uses it where it was imported while stdout was a terminal
        while True:
            lines.append(input())
    return "\n".join(lines).encode("utf-8", "surrogateescape")


@contextmanager
def _terminal_as_stdout() -> Iterator[None]:
    """readline wants a terminal on stdout too: the one on stdin is lent to it where stdout is a pipe or a file."""
    if output.is_terminal(sys.stdout):
        yield
        return
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        terminal = os.open(os.ttyname(sys.stdin.fileno()), os.O_WRONLY)
        os.dup2(terminal, 1)
        os.close(terminal)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


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
            text = decoded(read_given(path, _LIMIT), one_line(str(path)))
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
