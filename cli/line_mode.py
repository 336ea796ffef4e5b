"""A conversation in plain lines: for screen readers, serial lines and TERM=dumb. No cursor movement, no colours."""

from __future__ import annotations

import sys
from contextlib import suppress

from glmchat.chat.connect import open_session
from glmchat.chat.hangup import EXIT, listening
from glmchat.chat.history.history import History
from glmchat.chat.launch import LaunchOptions
from glmchat.cli import output
from glmchat.cli.line_commands import LineCommands
from glmchat.cli.one_shot import loaded
from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.core.language import tr
from glmchat.core.settings import Settings

_HISTORY_LINES = 1000


def converse(history: History, launch: LaunchOptions, settings: Settings) -> int:
    """Ask line by line until Ctrl+D or /quit. Returns the exit code. Raises GlmchatError if the model cannot start."""
    session = open_session(history, launch, settings)
    with loaded(launch) as connection:
        session.reconnect(connection.endpoint, connection.identity)
        talk = LineCommands(session, connection, launch)
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
