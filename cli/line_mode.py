"""A conversation in plain lines: for screen readers, serial lines and TERM=dumb. No cursor movement, no colours."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress

from glmchat.chat.answering import Answer, Trimmed, WentOn, cut_note, system_note, trimmed_note
from glmchat.chat.client.request import Stop
from glmchat.chat.commands import actions, table
from glmchat.chat.commands.actions import Dialog
from glmchat.chat.commands.table import COMMANDS, Command
from glmchat.chat.connect import Connection, connect, open_session
from glmchat.chat.hangup import EXIT, listening
from glmchat.chat.history.history import History
from glmchat.chat.history.rows import StoredMessage
from glmchat.chat.in_force import rows_in_force
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.sampling_choice import value_text
from glmchat.chat.session import ChatSession
from glmchat.chat.shared_engine import is_free
from glmchat.chat.text_file import TextFile
from glmchat.cli import output
from glmchat.cli.one_shot import loaded, stopping_on_interrupt
from glmchat.core import locations
from glmchat.core.errors import EngineDied, GlmchatError, Usage
from glmchat.core.files import open_file
from glmchat.core.language import tr
from glmchat.core.messages import Finished, Piece
from glmchat.core.settings import Settings
from glmchat.core.text import one_line

_HISTORY_LINES = 1000
_LISTED = 20  # conversations


def converse(history: History, launch: LaunchOptions, settings: Settings) -> int:
    """Ask line by line until Ctrl+D or /quit. Returns the exit code. Raises GlmchatError if the model cannot start."""
    session = open_session(history, launch, settings)
    with loaded(launch) as connection:
        session.reconnect(connection.endpoint, connection.identity)
        face = LineFace(session, connection, launch, settings.titles)
        face.greet()
        with _PromptHistory(), listening(session, finish_answer=launch.finish_on_hangup) as terminal:
            try:
                while face.going and not terminal.gone:
                    with face.writing_title():
                        text = _read()
                    face.take(text)
            except EOFError:
                output.say("")
            finally:
                connection.close()
    return EXIT if terminal.gone else 0


class LineFace:
    """What the slash commands act on here (`chat/commands/actions.Face`): answers to stdout, all else to stderr."""

    def __init__(self, chat: ChatSession, connection: Connection, launch: LaunchOptions, titles: str = "never") -> None:
        """titles: who writes them, as the settings say."""
        self.going = True
        self.chat = chat
        self.launch = launch
        self.deletions: list[tuple[int, int]] = []
        self._connection = connection
        self._titles = titles
        self._unnamed: int | None = None  # the conversation that was answered last, until a title was asked for

    @contextmanager
    def writing_title(self) -> Iterator[None]:
        """While a person reads and types the model is asked for a title, once after an answer; Enter ends that."""
        unnamed, self._unnamed = self._unnamed, None
        is_idle = sys.stdin.isatty() and unnamed == self.chat.tree.conversation.id
        if not is_idle or not self.chat.wants_title_by(self._titles):
            yield
            return
        stop, process = Stop(), self._connection.process

        def write() -> None:
            with suppress(GlmchatError):  # it keeps its first words
                self.chat.write_title(stop, lambda own: is_free(process, own))

        threading.Thread(target=write, name="title", daemon=True).start()
        try:
            yield
        finally:
            stop.now()

    def greet(self) -> None:
        output.say(tr("{model} is ready. /help lists the commands.", model=one_line(self.chat.identity.model or "")))
        if self.launch.resume is not None:
            self.open("history")
        elif (left := self.chat.history.interrupted()) is not None:
            output.say(tr("An answer was interrupted: `glmchat run --resume {id}`, then /continue.", id=left.id))

    def take(self, text: str) -> None:
        """A message, or a command. A failure is shown, and the conversation goes on."""
        if not text.strip():
            return
        kind, word, words = table.parse(text)
        try:
            if kind == "unknown":
                raise table.unknown(word, words)
            if kind == "command":
                self._run(table.BY_NAME[word], words)
                return
            if note := table.bare_word_note(word):
                output.say(note)
            self.answer(self.chat.ask(word))
        except GlmchatError as error:
            output.error(error)

    def _run(self, command: Command, words: str) -> None:
        if command.run is None:
            raise Usage(
                tr("/{word} only works in the window", word=command.name),
                hint=tr(command.instead),
                code="chat.window_only",
            )
        command.run(self, words)

    # Answers

    def answer(self, events: Answer) -> None:
        if self._connection.process is not None and not self._connection.process.alive:
            self._restart()
        last = "\n"
        try:
            with stopping_on_interrupt(self.chat), closing(events):
                for event in events:
                    if isinstance(event, WentOn):
                        self._show_elsewhere(event)
                    if isinstance(event, Trimmed) and event.unseen:
                        output.say(trimmed_note(event))
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
        self._unnamed = self.chat.tree.conversation.id
        if self.chat.history.path is not None and self.chat.history.problem:
            output.say(tr("this conversation is not being saved: {why}", why=self.chat.history.problem))

    def _show_elsewhere(self, event: WentOn) -> None:
        output.say(tr("another window went on here"))
        for message in event.messages:
            output.say(f"{message.role}: {message.text}")

    def _end(self, event: Finished) -> None:
        if event.finish_reason == "cancelled":
            output.say(tr("Stopped. /continue resumes."))
        elif event.finish_reason == "length":
            output.say(f"{cut_note(event.facts)} · {tr('/continue resumes')}")
        if note := system_note(event.facts):
            output.say(note)

    def _restart(self) -> None:
        output.say(tr("Starting the model again…"))
        self._connection.close()
        fresh = connect(self.launch)
        self._connection.endpoint, self._connection.process = fresh.endpoint, fresh.process
        self.chat.reconnect(fresh.endpoint, fresh.identity)

    def complete(self, text: str) -> None:
        stop, chosen = Stop(), self.chat.sampling()
        events = self._connection.endpoint.complete(
            text, chosen.sampling, self.chat.adapters or None, asked=chosen.asked, stop=stop
        )
        try:
            with closing(events):
                for event in events:
                    if isinstance(event, Piece):
                        output.data(event.text, end="")
        except KeyboardInterrupt:
            stop.now()
        output.data("")

    def require_model(self) -> None:
        """A dead engine is started again by the answer itself."""

    def choose_among(self, count: int, pairs: Sequence[str], seed: int | None) -> None:
        raise Usage(
            tr("several answers to choose from need the window"),
            hint=tr("`glmchat run -c` without --plain opens it; /regen asks for one"),
            code="regen.window",
        )

    def when_quiet(self, act: Callable[[], None]) -> None:
        act()  # a line is read only when nothing is written any more

    # What is shown

    def tell(self, text: str, hint: str = "") -> None:
        output.say(text)
        if hint:
            output.say(f"  {hint}")

    def open(self, dialog: Dialog, words: str = "") -> None:
        match dialog:
            case "help":
                for command in COMMANDS:
                    if command.run is not None:
                        usage = f": {table.usage(command)}" if command.argument else ""
                        output.say(f"/{command.name}  {tr(command.lines or command.summary)}{usage}")
            case "sampling":
                chosen = self.chat.sampling()
                for name, origin in chosen.origins.items():
                    by_server = origin == "default" and self._connection.process is None
                    value = tr("chosen by the server") if by_server else value_text(getattr(chosen.sampling, name))
                    output.say(f"{name}  {value}" + ("" if by_server else f"  ({tr(origin)})"))
            case "info":
                self.show_details(rows_in_force(self.chat))
                self.weigh_context()
            case "adapters":
                actions.tell_adapters(self)
            case "conversations":
                for row in self.chat.history.conversations(limit=_LISTED):
                    if row.message_count:
                        output.say(f"{row.id}  {one_line(row.title or tr('untitled'), 60)}")
                output.say(tr("/load NUMBER opens one; `glmchat history search WORDS` finds them."))
            case "history":
                from glmchat.chat.history.transcript import export

                output.data(export(self.chat.tree, "text"))

    def turn_to(self, conversation: int | None) -> None:
        if conversation is None:
            self.chat.new()
            output.say(tr("A new conversation."))
        else:
            self.chat.open(conversation)
            self.open("history")

    def show_conversation(self) -> None:
        """What stands above cannot be changed."""

    def show_restored(self) -> None:
        output.say(tr("restored"))

    def show_new_context(self, mark: StoredMessage) -> None:
        output.say(tr("The model does not see anything above this line."))

    def show_title(self) -> None:
        title = self.chat.tree.conversation.title
        output.say(tr("This conversation is called {title}.", title=one_line(title, 120)))

    def show_adapters(self) -> None:
        """Nothing here names them all the time."""

    def show_details(self, rows: list[tuple[str, str]]) -> None:
        for title, value in rows:
            output.say(f"{title}: {one_line(value, 400)}")

    def show_table(self, title: str, rows: list[tuple[str, str]], hint: str = "") -> None:
        output.say(title)
        self.show_details(rows)
        if hint:
            output.say(f"  {hint}")

    def weigh_context(self) -> None:
        actions.show_context(self, self.chat.weigh())

    # What is taken

    def current(self, role: str) -> int | None:
        return None

    def edit(self, question: StoredMessage) -> None:
        raise Usage(
            tr("there is nothing to edit"),
            hint=tr("/edit TEXT asks the last question again in other words"),
            code="chat.edit",
        )

    def take_file(self, file: TextFile) -> None:
        request = self.chat.measure(file.text)
        tokens = tr("unknown") if request.tokens is None else str(request.tokens)
        output.say(
            tr(
                "{path}: {size} bytes; the request would have {tokens} tokens",
                path=one_line(file.name),
                size=file.size,
                tokens=tokens,
            )
        )
        self.answer(self.chat.ask(file.text))

    def leave(self) -> None:
        self.going = False


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
            open_file(self._file).close()  # readline would wait for the other end of a pipe
            readline.write_history_file(self._file)
