"""Answers in plain lines, and what is said around them."""

from __future__ import annotations

from contextlib import closing

from glmchat.chat.answer_words import cut_note, system_note
from glmchat.chat.answering import Answer, Trimmed
from glmchat.chat.connect import Connection, connect
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.session import ChatSession
from glmchat.cli import output
from glmchat.cli.one_shot import stopping_on_interrupt
from glmchat.core.errors import EngineDied
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece
from glmchat.core.text import one_line


class LineTalk:
    """What is asked and answered; the commands are in `line_commands.py`."""

    def __init__(self, session: ChatSession, connection: Connection, launch: LaunchOptions) -> None:
        self.going = True
        self._session = session
        self._connection = connection
        self._launch = launch

    def close(self) -> None:
        self._connection.close()

    def greet(self, *, resumed: bool) -> None:
        session = self._session
        output.say(tr("{model} is ready. /help lists the commands.", model=one_line(session.identity.model or "")))
        if resumed:
            self.show_history()
        elif (left := session.history.interrupted()) is not None:
            output.say(tr("An answer was interrupted: `glmchat run --resume {id}`, then /continue.", id=left.id))

    def _answer(self, answer: Answer) -> None:
        session = self._session
        if self._connection.process is not None and not self._connection.process.alive:
            self._restart()
        last = "\n"
        try:
            with stopping_on_interrupt(session), closing(answer) as events:
                for event in events:
                    if isinstance(event, Trimmed) and event.unseen:
                        output.say(
                            tr("The context is full: the model no longer sees {n} messages.", n=len(event.unseen))
                        )
                    if isinstance(event, Piece) and event.text:
                        output.data(event.text, end="")
                        last = event.text[-1]
                    if isinstance(event, Finished):
                        if last != "\n":
                            output.data("")
                        self._end(event)
        except EngineDied as error:
            if last != "\n":
                output.data("")
            raise self._connection.cause(error) from None
        if session.history.path is not None and session.history.problem:
            output.say(tr("what is said now is not saved: {why}", why=session.history.problem))

    def _end(self, event: Finished) -> None:
        if event.finish_reason == "cancelled":
            output.say(tr("Stopped. /continue goes on."))
        elif event.finish_reason == "length":
            output.say(f"{cut_note(event.facts)} · {tr('/continue goes on')}")
        if note := system_note(event.facts):
            output.say(note)

    def _restart(self) -> None:
        output.say(tr("Starting the model again…"))
        self._connection.close()
        fresh = connect(self._launch)
        self._connection.endpoint, self._connection.process = fresh.endpoint, fresh.process
        self._session.reconnect(fresh.endpoint, fresh.identity)

    def show_history(self) -> None:
        from glmchat.chat.history.transcript import export

        output.data(export(self._session.tree, "text"))
