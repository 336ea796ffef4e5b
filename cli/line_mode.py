"""A conversation in plain lines: for screen readers, serial lines and TERM=dumb. No cursor movement, no colours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from glmchat.chat.answering import Answer, Trimmed
from glmchat.chat.connect import Connection, connect, open_session
from glmchat.chat.endings import cut_note, system_note
from glmchat.chat.hangup import EXIT, listening
from glmchat.chat.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.session import ChatSession
from glmchat.cli import output
from glmchat.cli.asking import decoded
from glmchat.cli.one_shot import loaded, stopping_on_interrupt
from glmchat.core import locations
from glmchat.core.errors import EngineDied, GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece
from glmchat.core.settings import Settings
from glmchat.core.text import one_line

_HISTORY_LINES = 1000
_FILE_LIMIT = 4 * 1024 * 1024  # bytes


def converse(history: History, launch: LaunchOptions, settings: Settings) -> int:
    """Ask line by line until Ctrl+D or /quit. Returns the exit code. Raises GlmchatError if the model cannot start."""
    session = open_session(history, launch, settings)
    with loaded(launch) as connection:
        session.reconnect(connection.endpoint, connection.identity)
        talk = _Talk(session, connection, launch)
        talk.greet(resumed=launch.resume is not None)
        with _PromptHistory(), listening(session, finish_answer=launch.finish_on_hangup) as terminal:
            try:
                while talk.going and not terminal.gone:
                    talk.take(_read())
            except EOFError:
                output.say("")
            finally:
                talk.close()
    return EXIT if terminal.gone else 0


def _read() -> str:
    """One message. A line that ends in a backslash goes on; text between two lines of triple quotes is one message."""
    try:
        text = input("> ")
        if text.strip() == '"""':
            lines: list[str] = []
            while (line := input()).strip() != '"""':
                lines.append(line)
            return "\n".join(lines)
        while text.endswith("\\"):
            text = text[:-1] + "\n" + input()
    except KeyboardInterrupt:
        output.say("")
        output.say(tr("Ctrl+D or /quit ends the chat."))
        return ""
    return text


class _PromptHistory:
    """Arrow keys and earlier prompts through readline, where Python has it; kept in the state folder."""

    def __enter__(self) -> None:
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # a half-deleted character must not end the chat
        self._file = locations.state_dir() / "plain-prompts"
        with suppress(ImportError, OSError):
            import readline

            readline.set_history_length(_HISTORY_LINES)
            readline.read_history_file(self._file)

    def __exit__(self, *_: object) -> None:
        with suppress(ImportError, OSError, GlmchatError):
            import readline

            locations.private_dir(self._file.parent)
            self._file.touch(mode=0o600)
            readline.write_history_file(self._file)


class _Talk:
    def __init__(self, session: ChatSession, connection: Connection, launch: LaunchOptions) -> None:
        self.going = True
        self._session = session
        self._connection = connection
        self._launch = launch
        self._deletion: int | None = None
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "help": (self._help, tr("this list")),
            "clear": (self._clear, tr("an empty context; nothing is deleted")),
            "new": (self._new, tr("another conversation")),
            "regen": (self._regen, tr("another answer to the last question")),
            "continue": (self._continue, tr("go on with an unfinished answer")),
            "undo": (self._undo, tr("take back the last question and its answer; /redo brings it back")),
            "redo": (self._redo, tr("bring back what /undo took")),
            "edit": (self._edit, tr("/edit TEXT: ask the last question in other words")),
            "set": (self._set, tr("/set temperature 0.7; without words: show all")),
            "system": (self._system, tr("/system TEXT; without words: show it")),
            "file": (self._file, tr("/file PATH: send the text of a file")),
            "context": (self._context, tr("tokens used and left")),
            "history": (self._history, tr("show the conversation so far")),
            "quit": (self._quit, tr("end (Ctrl+D too)")),
        }
        self._aliases = {"?": "help", "bye": "quit", "exit": "quit", "retry": "regen", "regenerate": "regen"}

    def close(self) -> None:
        self._connection.close()

    def greet(self, *, resumed: bool) -> None:
        session = self._session
        output.say(tr("{model} is ready. /help lists the commands.", model=one_line(session.identity.model or "")))
        if resumed:
            self._history("")
        elif (left := session.history.interrupted()) is not None:
            output.say(tr("An answer was interrupted: `glmchat run --resume {id}`, then /continue.", id=left.id))

    def take(self, text: str) -> None:
        """A message, or a command. A failure is told, and the conversation goes on."""
        if not text.strip():
            return
        try:
            if text.startswith("//"):
                self._answer(self._session.ask(text[1:]))
            elif text.startswith("/"):
                word, _, rest = text[1:].strip().partition(" ")
                self._command(word.lower(), rest.strip())
            else:
                self._answer(self._session.ask(text))
        except GlmchatError as problem:
            output.error(problem)

    def _command(self, word: str, rest: str) -> None:
        found = self._commands.get(self._aliases.get(word, word))
        if found is None:
            raise Usage(
                tr("there is no command /{word}", word=one_line(word)),
                hint=tr("/help lists them; // at the beginning sends a slash"),
                code="chat.command",
            )
        found[0](rest)

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

    # The commands.

    def _help(self, _: str) -> None:
        for name, (_run, about) in self._commands.items():
            output.say(f"/{name}  {about}")

    def _clear(self, _: str) -> None:
        if self._session.clear() is not None:
            output.say(tr("The model sees nothing of what stands above."))

    def _new(self, _: str) -> None:
        self._session.new()
        output.say(tr("A new conversation."))

    def _regen(self, _: str) -> None:
        self._answer(self._session.regenerate())

    def _continue(self, _: str) -> None:
        self._answer(self._session.continue_answer())

    def _undo(self, _: str) -> None:
        self._deletion = self._session.undo()
        output.say(tr("Taken back."))

    def _redo(self, _: str) -> None:
        if self._deletion is None:
            raise Usage(tr("there is nothing to bring back"), hint=tr("/undo takes back"), code="chat.nothing_to_redo")
        self._session.restore(self._deletion)
        self._deletion = None
        output.say(tr("Brought back."))

    def _edit(self, text: str) -> None:
        question = next((m for m in reversed(self._session.tree.path()) if m.role == "user"), None)
        if question is None or not text:
            raise Usage(
                tr("there is nothing to edit"), hint=tr("/edit TEXT asks the last question anew"), code="chat.edit"
            )
        self._answer(self._session.edit(question.id, text))

    def _set(self, words: str) -> None:
        parts = words.replace("=", " ").split(None, 1)
        if parts and parts[0] == "parameter":  # Ollama's way
            parts = parts[1].split(None, 1) if len(parts) > 1 else []
        if len(parts) == 2:
            self._session.set(parts[0], parts[1])
        elif parts:
            raise Usage(tr("/set needs a name and a value"), hint="/set temperature 0.7", code="chat.set")
        chosen = self._session.sampling()
        for name, origin in chosen.origins.items():
            if not parts or origin in ("set", "flag"):
                if origin == "default" and self._connection.process is None:
                    output.say(f"{name}  {tr('as the server likes')}")
                else:
                    output.say(f"{name}  {getattr(chosen.sampling, name)}  ({origin})")

    def _system(self, text: str) -> None:
        if text:
            self._session.system(text)
        output.say(tr("System prompt: {text}", text=self._session.system_prompt or tr("none")))

    def _file(self, name: str) -> None:
        path = Path(name).expanduser()
        try:
            size = path.stat().st_size
            data = path.read_bytes() if path.is_file() and size <= _FILE_LIMIT else b""
        except OSError as error:
            raise Usage(
                tr("{path} cannot be read: {reason}", path=one_line(name), reason=error.strerror or str(error)),
                hint=tr("/file PATH"),
                code="chat.file",
            ) from None
        text = decoded(data, one_line(name)).strip()
        if not text:
            raise Usage(
                tr("{path} holds no text that can be sent", path=one_line(name)),
                hint=tr("a text file of at most 4 MB"),
                code="chat.file",
            )
        request = self._session.measure(text)
        tokens = tr("unknown") if request.tokens is None else str(request.tokens)
        output.say(
            tr(
                "{path}: {size} bytes; the request then has {tokens} tokens",
                path=one_line(name),
                size=size,
                tokens=tokens,
            )
        )
        self._answer(self._session.ask(text))

    def _context(self, _: str) -> None:
        request = self._session.measure()
        if request.tokens is None:
            output.say(tr("The server does not count tokens."))
        else:
            limit = "?" if request.limit is None else request.limit
            output.say(tr("{tokens} of {limit} tokens", tokens=request.tokens, limit=limit))
        if request.unseen:
            output.say(tr("The context is full: the model no longer sees {n} messages.", n=len(request.unseen)))

    def _history(self, _: str) -> None:
        from glmchat.chat.transcript import export

        output.data(export(self._session.tree, "text"))

    def _quit(self, _: str) -> None:
        self.going = False
