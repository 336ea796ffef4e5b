"""What each command does. One method for each row of the table in `commands.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from glmchat.core.errors import GlmchatError, Usage
from glmchat.core.language import tr
from glmchat.core.messages import parse_sampling_value, sampling_name
from glmchat.core.text import human_bytes, one_line
from glmchat.tui import clipboard, commands
from glmchat.tui.conversation import details_of
from glmchat.tui.presets import PRESETS, shown
from glmchat.tui.screens.conversing import Conversing
from glmchat.tui.screens.help import HelpScreen
from glmchat.tui.screens.sampling import SamplingScreen
from glmchat.tui.theme import THEME_NAMES
from glmchat.tui.turns import Turn
from glmchat.tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:
    from glmchat.chat.records import StoredMessage
    from glmchat.chat.session import ChatSession
    from glmchat.chat.transcript import Format
    from glmchat.hub.installed import Installed

_FORMS: dict[str, Format] = {
    "md": "markdown",
    "markdown": "markdown",
    "json": "json",
    "txt": "text",
    "text": "text",
}
_FILE_LIMIT = 1_000_000  # bytes of a file that goes into the prompt


class Commanding(Conversing):
    """Commands raise GlmchatError for what a person can mend; `run_command` shows it."""

    _deletions: list[int]
    _editing: int | None = None  # id of the question that is being edited

    def run_command(self, name: str, argument: str = "") -> None:
        """Run a command by its name, from a slash line, a key, the palette or the mouse."""
        command = commands.BY_NAME[name]
        if command.quiet and self.busy:
            self.tell(tr("/{name} waits until the answer has ended", name=name), tr("Esc stops it"))
            return
        self.guarded(lambda: getattr(self, command.action)(argument))

    def guarded(self, act: Callable[[], None]) -> None:
        """Do something a person asked for, and show what they can mend."""
        try:
            act()
        except GlmchatError as error:
            self.complain(error)

    def _talk(self) -> ChatSession:
        if self.session is None:
            raise Usage(tr("the history is still being opened"), hint=tr("try again in a moment"), code="chat.opening")
        return self.session

    def _must_be_free(self) -> None:
        if self.busy:
            raise Usage(tr("an answer is being written"), hint=tr("stop it first (Esc)"), code="chat.busy")
        if not self.ready and self.status.facts.activity:
            raise Usage(tr("the model is still loading"), hint=tr("try again in a moment"), code="chat.loading")
        if not self.ready:
            raise Usage(
                tr("the model is not ready"),
                hint=tr("F5 starts it again, /model chooses another"),
                code="chat.not_ready",
            )

    # Conversation

    def command_help(self, argument: str) -> None:
        self.app.push_screen(HelpScreen())

    def command_new(self, argument: str) -> None:
        self._leave_answer()
        session = self._talk()
        session.new()
        self._editing = None
        self.show_conversation()
        self.status.show(speed=None, first_token=None, used=None, adapters=())
        self.measure()

    def _leave_answer(self) -> None:
        if self.busy:
            raise Usage(tr("an answer is being written"), hint=tr("stop it first (Esc)"), code="chat.busy")

    def command_clear(self, argument: str) -> None:
        self._leave_answer()
        mark = self._talk().clear()
        if mark is None:
            self.tell(tr("the context is empty already"))
            return
        self.transcript.drop("unseen")
        self.transcript.add(Turn(str(mark.id), "rule", tr("new context")))
        self.measure()

    def command_stop(self, argument: str) -> None:
        if not self.stop():
            self.tell(tr("no answer is being written"))

    def command_regen(self, argument: str) -> None:
        self._must_be_free()
        changes = {}
        for pair in argument.split():
            word, _, value = pair.partition("=")
            name = sampling_name(word)
            changes[name] = parse_sampling_value(name, value)
        session = self._talk()
        session.sampling(changes)
        self.answer(session.regenerate(changes or None, self._current_message("assistant")))

    def command_continue(self, argument: str) -> None:
        self._must_be_free()
        self.answer(self._talk().continue_answer())

    def command_undo(self, argument: str) -> None:
        deletion = self._talk().undo()
        self._deletions.append(deletion)
        self.show_conversation()
        self.tell(tr("taken back"), tr("/redo brings it back"))
        self.measure()

    def command_redo(self, argument: str) -> None:
        if not self._deletions:
            raise Usage(
                tr("nothing was taken back"), hint=tr("/undo takes back the last question"), code="chat.nothing_to_redo"
            )
        self._talk().restore(self._deletions.pop())
        self.show_conversation()
        self.measure()

    def command_edit(self, argument: str) -> None:
        session = self._talk()
        chosen = self._current_message("user")
        path = session.tree.path()
        question = next((m for m in reversed(path) if m.role == "user" and (chosen is None or m.id == chosen)), None)
        if question is None:
            raise Usage(tr("there is no question to edit"), hint=tr("ask something first"), code="chat.nothing_to_edit")
        self._editing = question.id
        self.prompt.set_text(question.text)
        self.prompt.focus()
        self.show_prompt_state()

    def command_delete_message(self, message: int) -> None:
        self._leave_answer()
        self._deletions.append(self._talk().delete(message))
        self.show_conversation()
        self.tell(tr("deleted"), tr("/redo brings it back"))
        self.measure()

    def command_copy(self, argument: str) -> None:
        session = self._talk()
        word = argument.lower()
        if word == "all":
            text = "\n\n".join(f"{m.role}: {session.shown_text(m)}" for m in session.tree.path() if not m.is_clear)
        else:
            answer = self._answer_meant()
            text = session.shown_text(answer)
            if word == "code":
                layout = self.transcript.layout_of(str(answer.id))
                blocks = layout.code_blocks() if layout else []
                if not blocks:
                    raise Usage(
                        tr("there is no code in that answer"), hint=tr("/copy copies all of it"), code="copy.no_code"
                    )
                text = "\n\n".join(blocks)
        self.copy_text(text)

    def copy_text(self, text: str) -> None:
        """To the terminal's clipboard and to a file; says which."""
        copied = clipboard.copy(text)
        if copied.sequence is not None:
            self.write_to_terminal(copied.sequence)
        self.notify(copied.words(), timeout=4)

    def write_to_terminal(self, sequence: str) -> None:
        driver = self.app._driver  # Textual offers no public way to write a sequence past its screen
        if driver is not None and not self.app.is_headless:
            driver.write(sequence)
            driver.flush()

    def command_quote(self, argument: str) -> None:
        answer = self._answer_meant()
        quoted = "\n".join(f"> {line}" for line in self._talk().shown_text(answer).splitlines())
        self.prompt.set_text(f"{quoted}\n\n{self.prompt.text}")
        self.prompt.focus()

    def _current_message(self, role: str) -> int | None:
        """The id of the turn that the keyboard stands on, if it is of that role."""
        current = self.transcript.current
        return int(current.key) if current is not None and current.role == role and current.key.isdigit() else None

    def _answer_meant(self) -> StoredMessage:
        session = self._talk()
        chosen = self._current_message("assistant")
        found = next(
            (m for m in reversed(session.tree.path()) if m.role == "assistant" and (chosen is None or m.id == chosen)),
            None,
        )
        if found is None:
            raise Usage(tr("there is no answer yet"), hint=tr("ask something first"), code="chat.no_answer")
        return found

    def walk_branch(self, message: int, step: int) -> None:
        """Open the next version of a message."""
        self._leave_answer()
        session = self._talk()
        versions, index = session.branches(message)
        if len(versions) > 1:
            chosen = versions[(index + step) % len(versions)]
            session.switch(chosen.id)
            self.show_conversation()
            self.transcript.make_current(str(chosen.id))
            self.measure()

    # Model

    def command_set(self, argument: str) -> None:
        session = self._talk()
        words = argument.replace("=", " ", 1).split(None, 2)
        if words and words[0] in ("parameter", "param"):
            words = argument.replace("=", " ", 1).split(None, 1)[1].split(None, 1)
        if not words:
            self.app.push_screen(SamplingScreen(session))
            return
        name = sampling_name(words[0])
        if len(words) == 1:
            chosen = session.sampling()
            self.tell(
                f"{name} {shown(getattr(chosen.sampling, name))}", tr("from: {origin}", origin=tr(chosen.origins[name]))
            )
            return
        chosen = session.set(name, " ".join(words[1:]))
        self.tell(
            tr("{name} is {value} from the next answer on", name=name, value=shown(getattr(chosen.sampling, name))),
            tr("/reset {name} undoes it", name=name),
        )

    def command_reset(self, argument: str) -> None:
        name = sampling_name(argument) if argument else None
        self._talk().reset(name)
        self.tell(tr("{name} is what it was before /set", name=name or tr("every setting")))

    def command_preset(self, argument: str) -> None:
        name = argument.lower()
        if name not in PRESETS:
            raise Usage(
                tr("there is no preset {name}", name=repr(argument)), hint=", ".join(PRESETS), code="sampling.preset"
            )
        session = self._talk()
        session.reset()
        for field, value in PRESETS[name].items():
            session.set(field, value)
        self.tell(tr("preset {name} from the next answer on", name=name))

    def command_system(self, argument: str) -> None:
        session = self._talk()
        if not argument:
            text = session.system_prompt
            self.tell(
                tr("system prompt: {text}", text=text) if text else tr("no system prompt"),
                tr("/system TEXT sets it, /system none removes it"),
            )
            return
        none = argument.lower() in ("none", "off")
        session.system("" if none else argument)
        self.tell(tr("no system prompt from the next answer on") if none else tr("the system prompt is set"))
        self.measure()

    def command_model(self, argument: str) -> None:
        from glmchat.chat import model_choice
        from glmchat.tui.screens.models import ModelScreen

        if argument:
            self._switch_to(*model_choice.locate(argument))
            return

        def chosen(row: Installed | None) -> None:
            if row is not None:
                self.guarded(lambda: self._switch_to(row, None))

        self.app.push_screen(ModelScreen(self.launch.model if self.ready else None, self.unload), chosen)

    def _switch_to(self, row: Installed, bits: int | None) -> None:
        from glmchat.chat import model_choice

        self._leave_answer()
        launch = model_choice.launch_installed(replace(self.launch, server=None), row, bits)
        self.tell(tr("switching to {name}", name=launch.model or ""))
        self.switch_model(launch)

    def command_adapter(self, argument: str) -> None:
        from glmchat.chat import adapters_choice
        from glmchat.tui.screens.adapters import AdapterScreen

        session = self._talk()
        before = session.adapters

        def tell(_: None = None) -> None:
            if not argument and session.adapters == before:
                return
            self.show_adapters()
            self.tell(tr("adapters from the next answer on: {names}", names=self._adapter_names() or tr("none")))

        if argument:
            adapters_choice.change(session, argument.split(), self.launch)
            tell()
        else:
            served = self._ready.endpoint.models if self.launch.server and self._ready else None
            self.app.push_screen(AdapterScreen(session, self.launch, served), tell)

    def _adapter_names(self) -> str:
        return ", ".join(self._adapters_shown())

    def _adapters_shown(self) -> tuple[str, ...]:
        from glmchat.chat.adapters_choice import is_forced, shown

        session = self._talk()
        return tuple(shown(name, scale, forced=is_forced(name)) for name, scale in session.adapters)

    def show_adapters(self) -> None:
        self.status.show(adapters=self._adapters_shown())

    def command_restart(self, argument: str) -> None:
        self._leave_answer()
        if not self.link.has_target:
            self.command_model("")
            return
        self.connect()

    def command_context(self, argument: str) -> None:
        session = self._talk()
        if argument:
            session.set_context_policy(argument.lower())
            self.tell(
                tr("a full context drops the oldest turns, visibly")
                if session.context_policy == "drop"
                else tr("a full context refuses the question")
            )
            return
        facts = self.status.facts
        if facts.used is None:
            self.tell(tr("the server does not say how many tokens the next request holds"))
            return
        self.tell(
            tr(
                "the next request holds {used} of {limit} tokens", used=f"{facts.used:,}", limit=f"{facts.limit or 0:,}"
            ),
            tr("when it is full: {policy} (/context drop or /context refuse)", policy=session.context_policy),
        )

    def command_stats(self, argument: str) -> None:
        rows = details_of(self._answer_meant())
        if memory := self.status.facts.memory:
            rows.append((tr("memory now"), human_bytes(memory)))
        self.tell(tr("about this answer"), "\n".join(f"{title}: {value}" for title, value in rows))

    def command_complete(self, argument: str) -> None:
        self._must_be_free()
        if not argument:
            raise Usage(tr("/complete needs a text"), hint=tr("/complete Once upon a time"), code="complete.empty")
        self.complete(argument)

    # Files and the history

    def command_file(self, argument: str) -> None:
        if not argument:
            raise Usage(tr("/file needs a path"), hint=tr("/file notes.txt"), code="file.empty")
        path = Path(argument.strip("'\"")).expanduser()
        try:
            size = path.stat().st_size
            data = path.read_bytes() if path.is_file() and size <= _FILE_LIMIT else None
        except OSError as error:
            raise Usage(
                tr("{path} cannot be read: {reason}", path=one_line(argument), reason=str(error.strerror)),
                hint=tr("give the path of a text file"), code="file.unreadable",
            ) from None  # fmt: skip
        if data is None:
            raise Usage(
                tr("{path} is no file or above {limit}", path=one_line(argument), limit=human_bytes(_FILE_LIMIT)),
                hint=tr("give the path of a text file"), code="file.size",
            )  # fmt: skip
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            raise Usage(
                tr("{path} is not UTF-8 text", path=one_line(argument)), hint=tr("convert it first"), code="file.binary"
            ) from None
        before = self.prompt.text.rstrip()
        fence = "````" if "```" in text else "```"
        block = f"{path.name}:\n{fence}\n{text.rstrip()}\n{fence}\n"
        self.prompt.set_text(f"{before}\n\n{block}" if before else block)
        self.tell(tr("{name}: {size}, in the prompt; nothing is sent yet", name=path.name, size=human_bytes(len(data))))
        self.measure(self.prompt.text)

    def command_save(self, argument: str) -> None:
        session = self._talk()
        if not argument:
            self.tell(tr("every conversation is saved as it is written"), tr("/save TITLE gives this one a name"))
            return
        session.history.rename(session.tree, argument)
        self.refresh_title()
        self.query_one(Sidebar).reload()

    def command_load(self, argument: str) -> None:
        self._leave_answer()
        session = self._talk()
        if argument.isdigit():
            self.open_conversation(int(argument))
            return
        if argument:
            self.command_find(argument)
            return
        found = session.history.interrupted() or session.history.last()
        if found is None or found.id == session.tree.conversation.id:
            self.command_history("")
            return
        self.open_conversation(found.id)

    def open_conversation(self, conversation: int, message: int | None = None) -> None:
        """Show an earlier conversation, at a message if one is named."""
        self._leave_answer()
        session = self._talk()
        session.open(conversation)
        self._editing = None
        hidden = message is not None and message not in {m.id for m in session.tree.path()}
        if message is not None and hidden and message in session.tree.messages:
            session.switch(message)
        self.show_conversation()
        self.show_adapters()
        self.status.show(speed=None, first_token=None)
        self.restore_draft()
        if message is not None:
            self.transcript.make_current(str(message))
        self.measure()

    def command_history(self, argument: str) -> None:
        self.query_one(Sidebar).toggle()

    def command_find(self, argument: str) -> None:
        self.query_one(Sidebar).find(argument)

    def command_delete(self, argument: str) -> None:
        session = self._talk()
        deletion = session.history.delete_conversation(session.tree.conversation.id)
        self._deletions.append(deletion)
        session.new()
        self.show_conversation()
        self.tell(tr("the conversation was deleted"), tr("/redo brings it back"))
        self.query_one(Sidebar).reload()

    def command_export(self, argument: str) -> None:
        from glmchat.chat import transcript

        session = self._talk()
        word, _, rest = argument.partition(" ")
        form: Format = "markdown"
        if word in _FORMS:
            form, argument = _FORMS[word], rest.strip()
        tree = session.tree
        path = Path(argument).expanduser() if argument else Path.cwd() / transcript.file_name(tree, form)
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(transcript.export(tree, form))
        except FileExistsError:
            raise Usage(
                tr("{path} is there already", path=str(path)), hint=tr("give another path"), code="export.exists"
            ) from None
        except OSError as error:
            raise Usage(
                tr("{path} cannot be written: {reason}", path=str(path), reason=str(error.strerror)),
                hint=tr("give another path"),
                code="export.unwritable",
            ) from None
        self.tell(tr("written to {path}", path=str(path)))

    # Window

    def command_theme(self, argument: str) -> None:
        if argument and argument not in THEME_NAMES:
            raise Usage(
                tr("there is no theme {name}", name=repr(argument)), hint=", ".join(THEME_NAMES), code="theme.unknown"
            )
        self.set_theme(argument)

    def set_theme(self, name: str) -> None:
        raise NotImplementedError

    def command_editor(self, argument: str) -> None:
        self.edit_in_editor()

    def edit_in_editor(self) -> None:
        raise NotImplementedError

    def command_quit(self, argument: str) -> None:
        self.leave()

    def leave(self) -> None:
        raise NotImplementedError

    def show_prompt_state(self) -> None:
        raise NotImplementedError
