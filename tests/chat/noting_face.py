"""A face for slash commands that notes what it is asked to show: no window, no terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from glmchat.chat.commands import actions, table
from glmchat.chat.commands.actions import Dialog
from glmchat.chat.history.rows import StoredMessage
from glmchat.chat.launch import LaunchOptions
from glmchat.chat.session import ChatSession
from glmchat.chat.text_file import TextFile
from glmchat.core.engine_options import EngineOptions
from glmchat.core.errors import Usage


class NotingFace:
    """Answers run at once; what would be shown is noted as (what, words)."""

    def __init__(self, chat: ChatSession) -> None:
        self.chat = chat
        self.launch = LaunchOptions(EngineOptions(model="m"))
        self.deletions: list[tuple[int, int]] = []
        self.seen: list[tuple[str, object]] = []
        self.is_ready = True

    def run(self, line: str) -> None:
        kind, name, words = table.parse(line)
        assert kind == "command"
        action = table.BY_NAME[name].run
        assert action is not None
        action(self, words)

    def told(self, what: str) -> list[object]:
        return [words for kind, words in self.seen if kind == what]

    def tell(self, text: str, hint: str = "") -> None:
        self.seen.append(("line", text))

    def open(self, dialog: Dialog, words: str = "") -> None:
        self.seen.append(("dialog", f"{dialog} {words}".strip()))

    def require_model(self) -> None:
        if not self.is_ready:
            raise Usage("the model is not ready", hint="start it", code="chat.not_ready")

    def when_quiet(self, act: Callable[[], None]) -> None:
        act()

    def answer(self, events: Iterable[object]) -> None:
        self.seen += [("event", event) for event in events]

    def choose_among(self, count: int, pairs: Sequence[str], seed: int | None) -> None:
        self.seen.append(("versions", (count, tuple(pairs), seed)))

    def complete(self, text: str) -> None:
        self.seen.append(("completion", text))

    def turn_to(self, conversation: int | None) -> None:
        self.seen.append(("conversation", conversation))
        self.chat.new() if conversation is None else self.chat.open(conversation)

    def show_conversation(self) -> None:
        self.seen.append(("messages", [m.text for m in self.chat.tree.path()]))

    def show_restored(self) -> None:
        self.show_conversation()

    def show_new_context(self, mark: StoredMessage) -> None:
        self.seen.append(("mark", mark.is_clear))

    def show_title(self) -> None:
        self.seen.append(("title", self.chat.tree.conversation.title))

    def show_adapters(self) -> None:
        self.seen.append(("adapters", self.chat.adapters))

    def show_details(self, rows: list[tuple[str, str]]) -> None:
        self.seen.append(("details", dict(rows)))

    def current(self, role: str) -> int | None:
        return None

    def edit(self, question: StoredMessage) -> None:
        self.seen.append(("edit", question.text))

    def take_file(self, file: TextFile) -> None:
        self.seen.append(("file", file.name))

    def show_table(self, title: str, rows: list[tuple[str, str]], hint: str = "") -> None:
        self.seen.append(("table", (title, dict(rows), hint)))

    def weigh_context(self) -> None:
        actions.show_context(self, self.chat.weigh())

    def leave(self) -> None:
        self.seen.append(("left", True))
