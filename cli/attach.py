"""Reading along while another process of this user writes an answer: through the database, changing nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated

import typer

from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage, Tree
from glmchat.cli import output
from glmchat.cli.completion import complete_conversations
from glmchat.core.errors import Interrupted, Usage
from glmchat.core.language import tr
from glmchat.core.text import one_line

POLL_SECONDS = 0.25  # pieces are written twice a second
LEAVING_SECONDS = 5.0  # in which a process without a screen ends its engine and itself


def answer_elsewhere(history: History, tree: Tree) -> StoredMessage | None:
    """The answer that another living process writes in this conversation now."""
    if history.writer_elsewhere(tree) is None:
        return None
    return next((m for m in reversed(tree.messages.values()) if m.state == "streaming"), None)


def follow(history: History, tree: Tree, answer: StoredMessage) -> Generator[str, None, StoredMessage]:
    """The text of `answer` from its beginning, as it comes; returns the message as it stands in the end.

    Its state is then "streaming" only if its writer died. `tree` is kept up to date.
    """
    read = 0
    while True:
        alive = history.writer_elsewhere(tree) is not None  # asked first: its last words are read after it is gone
        history.refresh(tree)
        now = tree.messages.get(answer.id, answer)
        if len(now.text) > read:
            yield now.text[read:]
            read = len(now.text)
        if now.state != "streaming" or not alive:
            return now
        time.sleep(POLL_SECONDS)


def wait_until_gone(is_there: Callable[[], bool], seconds: float = LEAVING_SECONDS) -> None:
    """Give the process that wrote the answer time to end its engine, so that ours finds the memory free."""
    deadline = time.monotonic() + seconds
    while is_there() and time.monotonic() < deadline:
        time.sleep(0.05)


def register(app: typer.Typer) -> None:
    app.command("attach")(attach)


def attach(
    conversation: Annotated[
        int | None,
        typer.Argument(
            metavar="[ID]",
            help="Default: the one being answered now, else the last one.",
            autocompletion=complete_conversations,
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue in plain lines instead of the window.")] = False,
    server: Annotated[
        str | None,
        typer.Option("--server", "--base-url", metavar="URL|NAME", help="Continue with this server's model."),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", metavar="FILE", help="Its key; default: $OPENAI_API_KEY.")
    ] = None,
) -> None:
    """Open the conversation that another terminal left behind (see `glmchat run --finish-on-hangup`).

    Its answer is shown while it is written, and when it is finished the conversation goes on here. Ctrl-C only stops
    looking. Off a terminal the answer is printed to its end.
    """
    number = _read_along(conversation)
    if not (output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout)):
        return
    from glmchat.cli.engine_flags import EngineFlags
    from glmchat.cli.run import run

    run(
        resume=number,
        plain=plain,
        server=server,
        api_key_file=api_key_file,
        finish_on_hangup=True,
        engine=EngineFlags(),
    )


def _to_stop(owner: str | None) -> str:
    """How to come back, and how to end the answer instead."""
    from glmchat.core.processes import pid_of

    pid = pid_of(owner)
    if pid is None:
        return "glmchat attach"
    return tr("`glmchat attach` follows it; `kill {pid}` stops the answer and keeps what was written", pid=pid)


def _read_along(conversation: int | None) -> int:
    """Print the answer that is being written to its end. Returns the conversation. Raises Usage if there is none."""
    from glmchat.chat.history.history import History
    from glmchat.core.processes import is_alive

    with History.default() as history:
        answered = history.answered_elsewhere()
        last = history.last()
        number = conversation or (answered[0] if answered else last.id if last is not None else None)
        if number is None:
            raise Usage(
                tr("there is no conversation to continue"), hint=tr("glmchat run NAME starts one"), code="history.empty"
            )
        if conversation is None and len(answered) > 1:
            others = ", ".join(str(c) for c in answered[1:])
            output.say(tr("also being answered: {ids}; `glmchat attach ID` opens them", ids=others))
        tree = history.load(number)
        title = one_line(tree.conversation.title or tr("untitled"), 60)
        answer = answer_elsewhere(history, tree)
        if answer is None:
            output.say(tr("conversation {id}, “{title}”: no answer is being written", id=number, title=title))
            return number
        output.say(
            tr(
                "conversation {id}, “{title}”: following the answer; press Ctrl-C to stop following",
                id=number,
                title=title,
            )
        )
        question = tree.messages.get(answer.parent) if answer.parent is not None else None
        if question is not None:
            output.say("> " + one_line(question.text, 400))
        last_character = "\n"
        following = follow(history, tree, answer)
        try:
            while True:
                text = next(following)
                output.data(text, end="")
                last_character = text[-1]
        except StopIteration as end:
            finished = end.value
        except KeyboardInterrupt:
            output.say("")
            raise Interrupted(
                tr("no longer following; the answer is still being written"),
                hint=_to_stop(answer.owner),
                code="attach.left",
            ) from None
        if last_character != "\n":
            output.data("")
        if finished.state in ("streaming", "failed"):
            output.say(tr("the process that was writing it has ended; /continue resumes"))
        owner = answer.owner
        wait_until_gone(lambda: is_alive(owner) is True)
    return number
