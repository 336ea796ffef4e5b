"""What the slash commands do that need no window: each takes the face it was typed in, and the words behind its name.

They raise GlmchatError for what a person can mend; the face shows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from glmchat.chat.sampling_choice import WORDS, value_text
from glmchat.checkpoints.fit import refuse_unheard
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import THINKING_VARIABLES, parse_sampling_value, sampling_name, template_value
from glmchat.core.text import one_line

if TYPE_CHECKING:
    from glmchat.chat.answering import Answer
    from glmchat.chat.context import ContextParts
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.launch import LaunchOptions
    from glmchat.chat.session import ChatSession
    from glmchat.chat.text_file import TextFile

Dialog = Literal["help", "sampling", "adapters", "conversations", "history", "info"]


class Face(Protocol):
    """What a command acts on: a conversation, and a place that shows lines, runs answers and opens dialogs.

    deletions: (number for `restore`, conversation) of what was taken back, for /redo.
    """

    deletions: list[tuple[int, int]]

    @property
    def launch(self) -> LaunchOptions: ...

    @property
    def chat(self) -> ChatSession:
        """The open conversation. Raises Usage while the history is still being opened."""
        ...

    def tell(self, text: str, hint: str = "") -> None:
        """A line that is not part of the conversation."""

    def open(self, dialog: Dialog, words: str = "") -> None: ...

    def require_model(self) -> None:
        """Raise Usage unless it can be asked."""

    def when_quiet(self, act: Callable[[], None]) -> None:
        """Do it now; where an answer is being written, once that has stopped."""

    def answer(self, events: Answer) -> None:
        """Show an answer while it is written. Raises Usage while another one is."""

    def choose_among(self, count: int, pairs: Sequence[str], seed: int | None) -> None:
        """Have a question answered `count` times more, with settings NAME=VALUE, and let one be chosen."""

    def complete(self, text: str) -> None:
        """Let the model go on with a text; nothing is stored."""

    def turn_to(self, conversation: int | None) -> None:
        """Another conversation comes into view; None: a new one. Raises Usage if it is unknown."""

    def show_conversation(self) -> None:
        """Messages are gone; the command says which."""

    def show_restored(self) -> None:
        """Messages are there again."""

    def show_new_context(self, mark: StoredMessage) -> None: ...

    def show_title(self) -> None: ...

    def show_adapters(self) -> None: ...

    def show_details(self, rows: list[tuple[str, str]]) -> None:
        """Facts of an answer: titles and values."""

    def show_table(self, title: str, rows: list[tuple[str, str]], hint: str = "") -> None: ...

    def current(self, role: str) -> int | None:
        """The message that the keyboard stands on, if it is of that role."""

    def edit(self, question: StoredMessage) -> None:
        """Let a question be put in other words."""

    def take_file(self, file: TextFile) -> None: ...

    def weigh_context(self) -> None:
        """Count what the next request holds, beside the way where that takes time; then `show_context`."""

    def leave(self) -> None: ...


Action = Callable[[Face, str], None]


# What was said


def new(face: Face, words: str) -> None:
    before = face.chat.adapters
    face.turn_to(None)
    if before and not face.chat.adapters:
        names = " ".join(name if weight == 1 else f"{name}:{weight:g}" for name, weight in before)
        face.tell(tr("a new conversation begins without adapters"), tr("/adapter {names} uses them again", names=names))


def clear(face: Face, words: str) -> None:
    face.when_quiet(lambda: _clear(face))


def _clear(face: Face) -> None:
    mark = face.chat.clear()
    if mark is None:
        face.tell(tr("the context is empty already"))
    else:
        face.show_new_context(mark)


_MOST_ANSWERS = 9  # as many keys choose among them


def regen(face: Face, words: str) -> None:
    first, *pairs = words.split() or [""]
    count = int(first) if first.isascii() and first.isdigit() and len(first) < 3 else None
    if count is None and first:
        pairs.insert(0, first)
    changes = {}
    for pair in pairs:
        word, _, value = pair.partition("=")
        name = sampling_name(word)
        changes[name] = parse_sampling_value(name, value)
    chosen = face.chat.sampling(changes).sampling  # complains of a value out of range before anything is stopped
    face.require_model()
    if count is None:
        face.when_quiet(lambda: _regenerate(face, changes))
        return
    if not 2 <= count <= _MOST_ANSWERS:
        raise Usage(
            tr("from 2 to {most} answers can be chosen from", most=_MOST_ANSWERS),
            hint=tr("/regen asks for one"),
            code="regen.count",
        )
    if chosen.temperature == 0:
        raise Usage(
            tr("at temperature 0 all answers are the same"),
            hint=f"/regen {count} temp=0.8",
            code="regen.same",
        )
    face.choose_among(count, pairs, chosen.seed)


def _regenerate(face: Face, changes: Mapping[str, Any]) -> None:
    face.answer(face.chat.regenerate(changes or None, face.current("assistant")))


def continue_answer(face: Face, words: str) -> None:
    face.require_model()
    face.answer(face.chat.continue_answer())


def undo(face: Face, words: str) -> None:
    face.when_quiet(lambda: show_deletion(face, face.chat.undo(), tr("undone")))


def show_deletion(face: Face, deletion: int, words: str) -> None:
    """Messages of the open conversation were deleted, and can be brought back."""
    face.deletions.append((deletion, face.chat.tree.conversation.id))
    face.show_conversation()
    face.tell(words, tr("/redo restores it"))


def redo(face: Face, words: str) -> None:
    if not face.deletions:
        raise Usage(tr("nothing to redo"), hint=tr("/undo removes the last question"), code="chat.nothing_to_redo")
    face.when_quiet(lambda: _redo(face))


def _redo(face: Face) -> None:
    """Bring back what was deleted last, in whichever conversation that was."""
    chat = face.chat
    deletion, conversation = face.deletions.pop()
    if conversation == chat.tree.conversation.id:
        chat.restore(deletion)
        face.show_restored()
    else:
        chat.history.restore(deletion)
        face.turn_to(conversation)


def edit(face: Face, words: str) -> None:
    """With words the question is asked in those; without, the face lets it be edited."""
    chosen = face.current("user")
    path = face.chat.tree.path()
    question = next((m for m in reversed(path) if m.role == "user" and (chosen is None or m.id == chosen)), None)
    if question is None:
        raise Usage(tr("there is no question to edit"), hint=tr("ask something first"), code="chat.nothing_to_edit")
    if words:
        number = question.id
        face.require_model()
        face.when_quiet(lambda: face.answer(face.chat.edit(number, words)))
    else:
        face.edit(question)


def answer_meant(face: Face) -> StoredMessage:
    """The answer that a command speaks of: the one the keyboard stands on, or the last. Raises Usage without one."""
    chosen = face.current("assistant")
    path = face.chat.tree.path()
    answer = next((m for m in reversed(path) if m.role == "assistant" and (chosen is None or m.id == chosen)), None)
    if answer is None:
        raise Usage(tr("there is no answer yet"), hint=tr("ask something first"), code="chat.no_answer")
    return answer


def stats(face: Face, words: str) -> None:
    from glmchat.chat.answering import details_of

    face.show_details(details_of(answer_meant(face)))


def complete(face: Face, words: str) -> None:
    if not words:
        raise Usage(tr("/complete needs some text"), hint=tr("/complete Once upon a time"), code="complete.empty")
    face.require_model()
    face.when_quiet(lambda: face.complete(words))


# How it is answered


def set_sampling(face: Face, words: str) -> None:
    parts = re.sub(r"^(\s*[\w-]+)=", r"\1 ", words).split(None, 1)
    if parts and parts[0] in ("parameter", "param"):  # Ollama's way
        parts = parts[1].split(None, 1) if len(parts) > 1 else []
    if not parts:
        face.open("sampling")
        return
    variable = parts[0].lower().replace("-", "_")
    if variable in THINKING_VARIABLES:
        _set_variable(face, variable, parts[1:])
        return
    name = sampling_name(parts[0])
    if len(parts) == 1:
        chosen = face.chat.sampling()
        value = value_text(getattr(chosen.sampling, name))
        face.tell(f"{name} {value}", tr("from: {origin}", origin=tr(WORDS[chosen.origins[name]])))
        return
    if name == "template_variables":
        _refuse_unheard(face, parse_sampling_value(name, parts[1]))
    chosen = face.chat.set(name, parts[1])
    face.tell(
        tr(
            "{name} is {value}, starting with the next answer",
            name=name,
            value=value_text(getattr(chosen.sampling, name)),
        ),
        tr("/reset {name} undoes it", name=name),
    )


def _refuse_unheard(face: Face, names: Iterable[str]) -> None:
    """Raise Usage for a variable that the chat format in use never looks at; a server knows its own."""
    from glmchat.chat.adapters_choice import folder_of_template

    folder = face.launch.engine.folder
    if face.launch.server is None and folder is not None:
        refuse_unheard(folder_of_template(face.chat.adapters, folder), names)


def _set_variable(face: Face, variable: str, value: Sequence[str]) -> None:
    """What the chat template is told; the conversation keeps the variables that were set before."""
    chosen = face.chat.sampling()
    variables = chosen.sampling.template_variables
    if not value:
        shown = value_text(variables[variable]) if variable in variables else tr("not set")
        face.tell(f"{variable} {shown}", tr("from: {origin}", origin=tr(WORDS[chosen.origins["template_variables"]])))
        return
    _refuse_unheard(face, (variable,))
    face.chat.set("template_variables", {**variables, variable: template_value(value[0])})
    face.tell(
        tr("{name} is {value}, starting with the next answer", name=variable, value=value[0]),
        tr("/reset {name} undoes it", name="template_variables"),
    )


def reset(face: Face, words: str) -> None:
    name = sampling_name(words) if words else None
    face.chat.reset(name)
    face.tell(
        tr("{name} is back to its value before /set", name=name)
        if name
        else tr("sampling is back to what it was before /set")
    )


def system(face: Face, words: str) -> None:
    if not words:
        text = face.chat.system_prompt
        face.tell(
            tr("system prompt: {text}", text=text) if text else tr("no system prompt"),
            tr("/system TEXT sets it, /system none removes it"),
        )
        return
    none = words.lower() in ("none", "off")
    face.chat.system("" if none else words)
    face.tell(tr("no system prompt, starting with the next answer") if none else tr("the system prompt is set"))
    if face.launch.server is None:
        from glmchat.chat.trained import trained_words

        for sentence in trained_words(face.chat.adapters, None, face.chat.system_prompt):
            face.tell(sentence)


def adapter(face: Face, words: str) -> None:
    from glmchat.chat import adapters_choice

    if not words:
        face.open("adapters")
        return
    adapters_choice.change(face.chat, words.split(), face.launch)
    face.show_adapters()
    tell_adapters(face)


def tell_adapters(face: Face) -> None:
    from glmchat.chat.adapters_choice import own_texts
    from glmchat.chat.in_force import adapters_in_force
    from glmchat.chat.trained import trained_words

    names = ", ".join(adapters_in_force(face.chat))
    face.tell(tr("adapters, starting with the next answer: {names}", names=names or tr("none")))
    if face.launch.server is None:
        chosen, folder = face.chat.adapters, face.launch.engine.folder
        for sentence in [*own_texts(chosen, folder), *trained_words(chosen, folder, face.chat.system_prompt)]:
            face.tell(sentence)


def context(face: Face, words: str) -> None:
    if words:
        policy(face, words)
    else:
        face.weigh_context()


def show_context(face: Face, parts: ContextParts) -> None:
    """What was counted, as a table."""
    from glmchat.chat.in_force import context_rows

    drops = face.chat.context_policy == "drop"
    face.show_table(
        tr("the next request, in tokens")
        if parts.tokens is not None
        else tr("the server does not report how many tokens the next request takes"),
        context_rows(parts),
        tr("when it is full, the oldest turns are dropped and marked; /policy refuses new questions instead")
        if drops
        else tr("when it is full, new questions are refused; /policy drops the oldest turns instead"),
    )


def info(face: Face, words: str) -> None:
    face.open("info")


def policy(face: Face, words: str) -> None:
    """The other policy for a full context; with a word, that one."""
    chat = face.chat
    chat.set_context_policy(words.lower() or ("refuse" if chat.context_policy == "drop" else "drop"))
    face.tell(
        tr("when the context is full, the oldest turns are dropped and marked")
        if chat.context_policy == "drop"
        else tr("when the context is full, new questions are refused"),
        tr("/policy changes it, and F8 in the window"),
    )


# Conversations and files


def file(face: Face, words: str) -> None:
    from glmchat.chat.text_file import read_text_file

    face.take_file(read_text_file(words))


def save(face: Face, words: str) -> None:
    if not words:
        face.tell(tr("every conversation is saved automatically"), tr("/save TITLE gives this one a name"))
        return
    face.chat.history.rename(face.chat.tree, words)
    face.show_title()


def load(face: Face, words: str) -> None:
    if words.isdigit():
        face.turn_to(int(words))
    else:
        face.open("conversations", words)


def export(face: Face, words: str) -> None:
    from glmchat.chat.history.transcript import write_export

    face.tell(tr("written to {path}", path=one_line(str(write_export(face.chat.tree, words)), 400)))


def history(face: Face, words: str) -> None:
    face.open("history")


def show_help(face: Face, words: str) -> None:
    face.open("help")


def leave(face: Face, words: str) -> None:
    face.leave()
