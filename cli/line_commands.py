"""The slash commands of a conversation in plain lines."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from glmchat.chat.client.request import Stop
from glmchat.chat.connect import Connection
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.session import ChatSession
from glmchat.cli import output
from glmchat.cli.line_talk import LineTalk
from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.messages import Piece, parse_sampling_value, sampling_name
from glmchat.core.text import one_line

_LISTED = 20  # conversations
_BARE = ("clear", "stop", "exit", "quit", "help")  # words that other programs take as commands
_WINDOW_ONLY = frozenset(
    {"model", "copy", "quote", "compare", "theme", "find", "search", "editor", "delete", "preset", "restart", "stop"}
)


def _instead(word: str) -> str:
    """How the same is had without a window."""
    match word:
        case "model":
            return tr("`glmchat run NAME -c` goes on with another model")
        case "copy":
            return tr("select with the terminal, or /export")
        case "find" | "search":
            return "glmchat history search WORDS"
        case "delete":
            return "glmchat history rm NUMBER"
        case "stop":
            return tr("Ctrl+C stops an answer")
        case "restart":
            return tr("the next question starts the engine again")
        case "preset":
            return "/set temperature 0.2"
        case _:
            return tr("`glmchat run -c` without --plain opens it")


class LineCommands(LineTalk):
    """A table of them; each is a method that takes the words behind its name."""

    def __init__(self, session: ChatSession, connection: Connection, launch: LaunchOptions) -> None:
        super().__init__(session, connection, launch)
        self._deletion: int | None = None
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "help": (self._help, tr("this list")),
            "clear": (self._clear, tr("an empty context; nothing is deleted")),
            "new": (self._new, tr("another conversation")),
            "regen": (
                self._regen,
                tr("another answer to the last question; /regen temperature=0.2 with that"),
            ),
            "continue": (self._continue, tr("go on with an unfinished answer")),
            "undo": (self._undo, tr("take back the last question and its answer; /redo brings it back")),
            "redo": (self._redo, tr("bring back what /undo took")),
            "edit": (self._edit, tr("/edit TEXT: ask the last question in other words")),
            "reset": (self._reset, tr("forget what /set changed")),
            "set": (self._set, tr("/set temperature 0.7; without words: show all")),
            "system": (self._system, tr("/system TEXT; without words: show it")),
            "file": (self._file, tr("/file PATH: send the text of a file")),
            "context": (
                self._context,
                tr("tokens used and left; /context drop|refuse: when it is full"),
            ),
            "stats": (self._stats, tr("tokens, speed and settings of the last answer")),
            "adapter": (self._adapter, tr("/adapter NAME:WEIGHT or off; without words: show them")),
            "complete": (self._complete, tr("/complete TEXT: let the model go on with a text; it is not kept")),
            "save": (self._save, tr("/save TITLE: name this conversation")),
            "load": (self._load, tr("/load NUMBER: open an earlier conversation; without a number: list them")),
            "export": (self._export, tr("/export [md|json|txt] [PATH]: write this conversation to a file")),
            "history": (self._history, tr("show the conversation so far")),
            "quit": (self._quit, tr("end (Ctrl+D too)")),
        }
        self._aliases = {
            "?": "help", "bye": "quit", "exit": "quit", "retry": "regen", "regenerate": "regen", "rename": "save",
            "resume": "load",
        }  # fmt: skip

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
                if (bare := text.strip().lower()) in _BARE:
                    output.say(tr("“{word}” was sent as text; the command is /{word}", word=bare))
                self._answer(self._session.ask(text))
        except GlmchatError as problem:
            output.error(problem)

    def _command(self, word: str, rest: str) -> None:
        found = self._commands.get(self._aliases.get(word, word))
        if word in _WINDOW_ONLY:
            raise Usage(tr("/{word} needs the window", word=word), hint=_instead(word), code="chat.window_only")
        if found is None:
            raise Usage(
                tr("there is no command /{word}", word=one_line(word)),
                hint=tr("/help lists them; // at the beginning sends a slash"),
                code="chat.command",
            )
        found[0](rest)

    def _help(self, _: str) -> None:
        for name, (_run, about) in self._commands.items():
            output.say(f"/{name}  {about}")

    def _clear(self, _: str) -> None:
        if self._session.clear() is not None:
            output.say(tr("The model sees nothing of what stands above."))

    def _new(self, _: str) -> None:
        self._session.new()
        output.say(tr("A new conversation."))

    def _regen(self, words: str) -> None:
        changes = {}
        for pair in words.split():
            word, _, value = pair.partition("=")
            name = sampling_name(word)
            changes[name] = parse_sampling_value(name, value)
        self._answer(self._session.regenerate(changes or None))

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

    def _reset(self, name: str) -> None:
        self._session.reset(name or None)
        self._set("")

    def _system(self, text: str) -> None:
        if text:
            self._session.system(text)
        output.say(tr("System prompt: {text}", text=self._session.system_prompt or tr("none")))

    def _file(self, name: str) -> None:
        from glmchat.chat.text_file import read_text_file

        file = read_text_file(name)
        text = file.text.strip()
        request = self._session.measure(text)
        tokens = tr("unknown") if request.tokens is None else str(request.tokens)
        output.say(
            tr(
                "{path}: {size} bytes; the request then has {tokens} tokens",
                path=one_line(name),
                size=file.size,
                tokens=tokens,
            )
        )
        self._answer(self._session.ask(text))

    def _context(self, policy: str) -> None:
        if policy:
            self._session.set_context_policy(policy.lower())
        request = self._session.measure()
        if request.tokens is None:
            output.say(tr("The server does not count tokens."))
        else:
            limit = "?" if request.limit is None else request.limit
            output.say(tr("{tokens} of {limit} tokens", tokens=request.tokens, limit=limit))
        if request.unseen:
            output.say(tr("The context is full: the model no longer sees {n} messages.", n=len(request.unseen)))

    def _stats(self, _: str) -> None:
        from glmchat.chat.answer_words import details_of

        answer = next((m for m in reversed(self._session.tree.path()) if m.role == "assistant"), None)
        if answer is None:
            raise Usage(tr("there is no answer yet"), hint=tr("ask something first"), code="chat.no_answer")
        for title, value in details_of(answer):
            output.say(f"{title}: {one_line(value, 400)}")

    def _adapter(self, words: str) -> None:
        from glmchat.chat import adapters_choice
        from glmchat.hub.adapters import is_forced

        session = self._session
        if words:
            adapters_choice.change(session, words.split(), self._launch)
        shown = adapters_choice.shown
        names = ", ".join(shown(name, scale, forced=is_forced(name)) for name, scale in session.adapters)
        output.say(tr("adapters from the next answer on: {names}", names=names or tr("none")))

    def _complete(self, text: str) -> None:
        if not text:
            raise Usage(tr("/complete needs a text"), hint=tr("/complete Once upon a time"), code="complete.empty")
        session, stop = self._session, Stop()
        chosen = session.sampling()
        events = self._connection.endpoint.complete(
            text, chosen.sampling, session.adapters or None, asked=chosen.asked, stop=stop
        )
        try:
            with closing(events):
                for event in events:
                    if isinstance(event, Piece):
                        output.data(event.text, end="")
        except KeyboardInterrupt:
            stop.now()
        output.data("")

    def _save(self, title: str) -> None:
        if not title:
            raise Usage(tr("/save needs a title"), hint="/save TITLE", code="chat.save")
        self._session.history.rename(self._session.tree, title)
        output.say(tr("This conversation is called {title}.", title=one_line(title, 120)))

    def _load(self, number: str) -> None:
        history = self._session.history
        if number.isdigit():
            self._session.open(int(number))
            self.show_history()
            return
        for found in history.conversations(limit=_LISTED):
            if found.message_count:
                output.say(f"{found.id}  {one_line(found.title or tr('untitled'), 60)}")
        output.say(tr("/load NUMBER opens one; `glmchat history search WORDS` finds them."))

    def _export(self, words: str) -> None:
        from glmchat.chat.history.transcript import write_export

        output.say(tr("written to {path}", path=one_line(str(write_export(self._session.tree, words)), 400)))

    def _history(self, _: str) -> None:
        self.show_history()

    def _quit(self, _: str) -> None:
        self.going = False
