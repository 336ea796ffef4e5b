"""What the slash commands do in the window: the dialogs they open, the lines they show, and what only it can do.

`chat/commands` does what needs no window; it acts on `WindowFace`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from glmchat.chat.commands import actions, table
from glmchat.chat.commands.actions import Dialog
from glmchat.chat.sampling_choice import PRESETS
from glmchat.core.errors import DoesNotFit, GlmchatError, ServerFailed, Usage
from glmchat.core.language import tr
from glmchat.core.settings import THEMES, Settings
from glmchat.core.text import human_bytes, one_line
from glmchat.tui import terminal
from glmchat.tui.comparing import Comparing
from glmchat.tui.composer import Composer
from glmchat.tui.connection import ModelConnection
from glmchat.tui.conversation import columns
from glmchat.tui.messages import Reached, Served, Weighed
from glmchat.tui.screens.help import HelpScreen, InfoScreen
from glmchat.tui.screens.palette import ThemeScreen
from glmchat.tui.screens.sampling import SamplingScreen
from glmchat.tui.talk import Talk
from glmchat.tui.theme import remember_theme
from glmchat.tui.transcript.markdown import code_blocks
from glmchat.tui.transcript.turns import Turn
from glmchat.tui.view import View
from glmchat.tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:
    from glmchat.chat.answering import Answer
    from glmchat.chat.client.request import Stop
    from glmchat.chat.client.words import ModelRow
    from glmchat.chat.evaluating import Asked
    from glmchat.chat.history.rows import StoredMessage
    from glmchat.chat.launch import LaunchOptions
    from glmchat.chat.session import ChatSession
    from glmchat.chat.text_file import TextFile
    from glmchat.core.eval_folder import Evaluation
    from glmchat.core.run_folder import Run
    from glmchat.core.servers import Server
    from glmchat.hub.installed import Installed


# Commands that act on what is said last: of another window's turn that has not been seen they do nothing.
_ABOUT_THE_LAST = ("regen", "continue", "undo", "edit", "clear", "delete")


class WindowFace:
    def __init__(
        self,
        view: View,
        talk: Talk,
        connection: ModelConnection,
        composer: Composer,
        sidebar: Sidebar,
        settings: Settings,
    ) -> None:
        self.deletions: list[tuple[int, int]] = []
        self.leaving = False  # as soon as what was typed can be kept
        self._view = view
        self._talk = talk
        self._connection = connection
        self._composer = composer
        self._sidebar = sidebar
        self._servers = settings.servers
        self._comparing = Comparing(view, talk, connection, settings, self._switch_to)
        self._asked: Asked | None = None  # the evaluation that was asked for here last
        self._own: Mapping[str, Callable[[str], None]] = {
            "stop": self._stop, "copy": self._copy, "quote": self._quote, "preset": self._preset, "model": self._model,
            "compare": self._compare, "restart": self._restart, "find": sidebar.find, "delete": self._delete,
            "theme": self._theme, "tune": self._tune, "eval": self._evaluate,
            "editor": lambda words: composer.edit_in_editor(),
        }  # fmt: skip

    def run(self, name: str, words: str = "") -> None:
        """Run a command by its name, from a slash line, a key, the palette or the mouse."""
        command = table.BY_NAME[name]
        if command.name in _ABOUT_THE_LAST and self._talk.look_around():
            raise Usage(tr("another window went on here"), hint=tr("look at it, then try again"), code="chat.went_on")
        try:
            if command.name == "adapter" and self._names_adapters_of_server(words):
                self._ask_server(words, adapters=True)
            elif command.run is not None:
                command.run(self, words)
            else:
                self._own[command.name](words)
        finally:
            self._talk.show_in_force()
        if command.name in ("system", "policy", "context"):  # the next request holds something else
            self._talk.measure()

    def take(self, text: str) -> None:
        """What was sent from the prompt: a command, or a question."""
        kind, word, words = table.parse(text)
        if kind == "unknown":
            if not self._view.prompt.text:
                self._view.prompt.set_text(text)  # to be mended
            raise table.unknown(word, words)
        if kind == "command":
            self.run(word, words)
        elif self._talk.editing is not None:
            self._ask_edited(word, text)
        else:
            self._view.transcript.make_current(None)
            self._talk.ask(word)
            if note := table.bare_word_note(word):
                self.tell(note)

    def _ask_edited(self, question: str, typed: str) -> None:
        """Without an engine it stays in the prompt, as it was typed: the queue is for new questions only."""
        if not self._connection.ready and not self._view.prompt.text:
            self._view.prompt.set_text(typed)
        self.require_model()
        self._talk.ask_edited(question)

    # What chat/commands acts on

    @property
    def launch(self) -> LaunchOptions:
        return self._connection.launch

    @property
    def chat(self) -> ChatSession:
        return self._talk.chat

    def tell(self, text: str, hint: str = "") -> None:
        self._view.tell(text, hint)

    def open(self, dialog: Dialog, words: str = "") -> None:
        match dialog:
            case "help":
                self._view.app.push_screen(HelpScreen())
            case "sampling":
                self._view.app.push_screen(SamplingScreen(self.chat))
            case "info":
                self._view.app.push_screen(InfoScreen(self.chat, self._view.prompt.text), self._run_chosen)
            case "adapters":
                self._open_adapters()
            case "conversations":
                self._open_conversations(words)
            case "history":
                self._sidebar.toggle()

    def _run_chosen(self, name: str | None) -> None:
        if name is not None:
            self.run(name)

    def _open_adapters(self) -> None:
        from glmchat.tui.screens.adapters import AdapterScreen

        chat, answers = self.chat, self._connection.answers
        before = chat.adapters

        def tell(_: None) -> None:
            if chat.adapters != before:
                self.show_adapters()
                actions.tell_adapters(self)

        served = answers.endpoint.models if self.launch.server and answers else None
        self._view.app.push_screen(AdapterScreen(chat, self.launch, served), tell)

    def _open_conversations(self, words: str) -> None:
        """Those that words are found in; without words the one that was interrupted, or the last."""
        if words:
            self._sidebar.find(words)
            return
        history = self.chat.history
        earlier = history.interrupted() or history.last_draft() or history.last()
        if earlier is None or earlier.id == self.chat.tree.conversation.id:
            self._sidebar.toggle()
        else:
            self.turn_to(earlier.id)

    def require_model(self) -> None:
        self._connection.require_ready()

    def when_quiet(self, act: Callable[[], None]) -> None:
        self._talk.when_quiet(act)

    def answer(self, events: Answer) -> None:
        self._talk.answer(events)

    def complete(self, text: str) -> None:
        self._talk.complete(text)

    def turn_to(self, conversation: int | None) -> None:
        self._talk.turn_to(conversation)
        if conversation is not None:
            self._composer.restore_draft()
        self._talk.measure()

    def show_conversation(self) -> None:
        self._talk.show_conversation()
        self._talk.measure()

    def show_restored(self) -> None:
        self.show_conversation()

    def show_new_context(self, mark: StoredMessage) -> None:
        self._view.transcript.drop("unseen")
        self._view.transcript.add(Turn(str(mark.id), "rule", tr("new context")))
        self._talk.measure()

    def show_title(self) -> None:
        self._view.show_title()

    def show_adapters(self) -> None:
        self._talk.show_in_force()

    def show_details(self, rows: list[tuple[str, str]]) -> None:
        if memory := self._view.status.facts.memory:
            rows = [*rows, (tr("memory now"), human_bytes(memory))]
        self.show_table(tr("about this answer"), rows)

    def show_table(self, title: str, rows: list[tuple[str, str]], hint: str = "") -> None:
        table = columns(rows, self._view.transcript.measure - 2)
        self.tell(title, f"{table}\n{hint}" if hint else table)

    def current(self, role: str) -> int | None:
        turn = self._view.transcript.current
        return int(turn.key) if turn is not None and turn.role == role and turn.key.isdigit() else None

    def edit(self, question: StoredMessage) -> None:
        self._talk.edit(question)

    def take_file(self, file: TextFile) -> None:
        """Into the prompt, fenced. How many tokens it is, a thread asks the model."""
        before = self._view.prompt.text.rstrip()
        fence = "````" if "```" in file.text else "```"
        block = f"{file.name}:\n{fence}\n{file.text.rstrip()}\n{fence}\n"
        self._view.prompt.set_text(f"{before}\n\n{block}" if before else block)
        self._talk.measure()
        self._view.start_thread(lambda: self._weigh(file, block), "file")

    def _weigh(self, file: TextFile, block: str) -> None:
        tokens = None
        if self._connection.answers is not None:
            with suppress(GlmchatError):
                tokens = len(self._connection.answers.endpoint.tokenize(block))
        self._view.post_message(Weighed(file.name, file.size, tokens))

    def show_weight(self, news: Weighed) -> None:
        size = human_bytes(news.size)
        if news.tokens is not None:
            size = tr("{size}, {n} tokens", size=size, n=f"{news.tokens:,}")
        self.tell(tr("{name}: {size}, in the prompt; nothing is sent yet", name=news.name, size=size))

    def weigh_context(self) -> None:
        self._talk.weigh()

    def leave(self) -> None:
        if self._talk.session is None and self._view.prompt.text and not self.leaving:
            self.leaving = True  # once the history is open, which then keeps what was typed
            return
        try:
            self._composer.keep_unsent()
            self._talk.stop_all()
        finally:
            self._view.app.exit(0)

    # What only the window can do

    def _stop(self, words: str) -> None:
        if not self._talk.stop() and not self._talk.stop_behind():
            self.tell(tr("no answer is being written"))

    def _copy(self, words: str) -> None:
        word = words.lower()
        if word == "all":
            path = self.chat.tree.path()
            text = "\n\n".join(f"{m.role}: {m.text}" for m in path if not m.is_clear)
        else:
            text = actions.answer_meant(self).text
            if word == "code":
                blocks = code_blocks(text)
                if not blocks:
                    raise Usage(
                        tr("there is no code in that answer"), hint=tr("/copy copies all of it"), code="copy.no_code"
                    )
                text = "\n\n".join(blocks)
        self.copy_text(text)

    def copy_text(self, text: str) -> None:
        """To the terminal's clipboard and to a file; says which."""
        copied = terminal.copy(text)
        driver = self._view.app._driver  # Textual offers no public way to write a sequence past its screen
        if copied.sequence is not None and driver is not None and not self._view.app.is_headless:
            driver.write(copied.sequence)
            driver.flush()
        self._view.notify(copied.words(), timeout=6)

    def _quote(self, words: str) -> None:
        quoted = "\n".join(f"> {line}" for line in actions.answer_meant(self).text.splitlines())
        self._composer.fill(f"{quoted}\n\n{self._view.prompt.text}")

    def _preset(self, words: str) -> None:
        name = words.lower()
        if name not in PRESETS:
            raise Usage(
                tr("there is no preset {name}", name=repr(words)), hint=", ".join(PRESETS), code="sampling.preset"
            )
        self.chat.reset()
        for field, value in PRESETS[name].items():
            self.chat.set(field, value)
        self.tell(tr("preset {name}, starting with the next answer", name=name))

    def _names_adapters_of_server(self, words: str) -> bool:
        """Before adapters are taken by name a server is asked for its list."""
        named = words.partition(" ")[0].lower() not in ("", "off", "none", "weight")
        return named and self.launch.server is not None and self._connection.answers is not None

    def _ask_server(self, words: str, *, adapters: bool = False) -> None:
        """For its list, which `words` are looked for in."""
        assert self._connection.answers is not None
        endpoint = self._connection.answers.endpoint
        self._connection.ask(lambda stop: Served(words, endpoint.models(stop), adapters))

    def use_adapters_of_server(self, news: Served) -> None:
        """Raises Usage for a name that the server does not list."""
        from glmchat.chat.adapters_choice import parse_adapter

        listed = [row.name for row in news.rows]
        for word in news.wanted.split():
            name = parse_adapter(word)[0]
            if name not in listed and word != "--force":
                names = ", ".join(one_line(row.name, 60) for row in news.rows[:20] if row.parent is not None)
                raise Usage(
                    tr("the server has no adapter {name}", name=one_line(name, 60)),
                    hint=tr("it has: {names}", names=names or tr("none")),
                    code="server.no_adapter",
                )
        actions.adapter(self, news.wanted)

    def _model(self, words: str) -> None:
        from glmchat.chat.launch import locate, server_named
        from glmchat.tui.screens.models import ModelScreen, ServerScreen

        answers = self._connection.answers if self.launch.server is not None else None
        if (named := server_named(words, self._servers)) is not None:
            self._switch_to_server(*named)
        elif answers is not None and words:
            self._ask_server(words)
        elif answers is not None:
            others = [server for server in self._servers.values() if server.url != self.launch.server]
            models = ServerScreen(answers.endpoint.models, answers.endpoint.model, others)
            self._view.app.push_screen(models, self._choose_served)
        elif words:
            self._switch_to(*locate(words))
        else:
            current = self.launch.engine.model if self._connection.ready else None
            servers, is_first = tuple(self._servers.values()), not self._connection.link.has_target
            screen = ModelScreen(current, self._unload, servers=servers, is_first=is_first)
            self._view.app.push_screen(screen, self._choose)

    def _choose(self, chosen: Installed | Server | None) -> None:
        from glmchat.core.servers import Server

        if isinstance(chosen, Server):
            self._switch_to_server(chosen, None)
        elif chosen is not None:
            self._switch_to(chosen, None)

    def _choose_served(self, chosen: str | Server | None) -> None:
        """A model of the server, another server, or "" for the models on this machine."""
        from glmchat.tui.screens.models import ModelScreen

        if chosen == "":
            self._view.app.push_screen(ModelScreen(None), self._choose)
        elif isinstance(chosen, str):
            self._switch_model_of_server(chosen)
        else:
            self._choose(chosen)

    def switch_on_server(self, news: Served) -> None:
        """To a model of the server; else to one on this machine. Raises Usage for what is neither."""
        from glmchat.chat.launch import locate

        if _lists_model(news.rows, news.wanted):
            self._switch_model_of_server(news.wanted)
            return
        try:
            found = locate(news.wanted)
        except GlmchatError:
            raise _not_listed(
                tr("neither the server nor this machine has {name}", name=one_line(news.wanted, 60)), news.rows
            ) from None
        self._switch_to(*found)

    def _switch_to_server(self, server: Server, model: str | None) -> None:
        """A server of the config, for this conversation, once it has answered: until then nothing changes.

        Raises Usage for its key's file.
        """
        from glmchat.chat.client.endpoint import Endpoint
        from glmchat.chat.launch import launch_server

        launch = launch_server(self.launch, server, model)
        endpoint = Endpoint(launch.server, key=launch.api_key, model=launch.engine.model)

        def reach(stop: Stop) -> Reached:
            rows: list[ModelRow] = []
            with suppress(ServerFailed):  # it has no list, or an own error that an answer will tell
                rows = endpoint.models(stop)
            if endpoint.model is None:
                endpoint.choose_model(stop=stop)
            return Reached(launch, server.name, rows)

        self._connection.ask(reach)

    def switch_server(self, news: Reached) -> None:
        """To a server that has answered. Raises Usage for a model that it does not list."""
        from glmchat.chat.sampling_choice import ranks_for_launch

        launch, model = news.launch, news.launch.engine.model
        if model is not None and news.rows and not _lists_model(news.rows, model):
            raise _not_listed(tr("{server} has no model {name}", server=news.name, name=one_line(model, 60)), news.rows)

        def switch() -> None:
            chat = self.chat
            if chat.adapters and self.launch.server != launch.server:
                names = ", ".join(one_line(name, 40) for name, _ in chat.adapters)
                chat.use_adapters(())
                self._view.tell(
                    tr("turned off, because they do not fit this model: {names}", names=names), "/adapter", "warning"
                )
            ranks = ranks_for_launch(launch.sampling)
            for origin in ("set", "conversation"):
                ranks.asked[origin] = chat.ranks.rank(origin)
            chat.ranks = ranks
            self._talk.disconnect()
            self.tell(tr("switching to {name}", name=one_line(model or news.name, 60)))
            self._connection.switch(launch)

        self._talk.stop_behind()
        self.when_quiet(switch)

    def _switch_model_of_server(self, name: str) -> None:
        launch = replace(self.launch, engine=replace(self.launch.engine, model=name))
        self._talk.stop_behind()
        self.when_quiet(lambda: self._go_on_with(launch))

    def _go_on_with(self, launch: LaunchOptions) -> None:
        self.tell(tr("switching to {name}", name=one_line(launch.engine.model or "", 60)))
        self._connection.switch(launch)

    def _unload(self) -> None:
        self._talk.stop_all()
        self._talk.disconnect()
        self._connection.unload()

    def _switch_to(self, row: Installed, bits: int | None) -> None:
        """Another model for this conversation."""
        from glmchat.chat.connect import engine_options, require_fit
        from glmchat.chat.launch import launch_installed

        launch = launch_installed(replace(self.launch, server=None), row, bits)
        with suppress(DoesNotFit):  # the engine that answers now may be what takes the room
            require_fit(engine_options(launch))  # what is refused changes nothing here
        self._talk.stop_behind()
        self.when_quiet(lambda: self._switch(launch))

    def _switch(self, launch: LaunchOptions) -> None:
        from glmchat.chat import adapters_choice
        from glmchat.chat.sampling_choice import ranks_for_launch

        chat, hint, name = self.chat, "", launch.engine.model or ""
        if chat.tree.context():
            hint = tr("the conversation is kept; {name} reads it again with its own template", name=name)
        self.tell(tr("switching to {name}", name=name), hint)
        if lost := adapters_choice.keep_fitting(chat, launch):
            self._view.tell(
                tr("turned off, because they do not fit this model: {names}", names=", ".join(lost)),
                "/adapter",
                "warning",
            )
            self.show_adapters()
        folder = launch.engine.files_folder
        ranks = ranks_for_launch(launch.sampling, catalogue=launch.engine.sampling, folder=folder)
        for origin in ("set", "conversation"):
            ranks.asked[origin] = chat.ranks.rank(origin)
        chat.ranks = ranks
        self._connection.switch(launch)

    def _tune(self, words: str) -> None:
        """The runs, or the one that is named, or the plan of a new one for files of rows and the flags of the command
        line; the adapter that one became can be used at once."""
        from glmchat.chat.tune_request import request_in_chat
        from glmchat.chat.tuning import Begun
        from glmchat.core.run_folder import find_run
        from glmchat.tui.screens.tune import RunScreen, RunsScreen

        def use(adapter: str | None) -> None:
            if adapter is not None:
                self.run("adapter", adapter)

        def open_run(run: Run | None) -> None:
            if run is not None:
                self._view.app.push_screen(RunScreen(run), use)

        if words and (request := request_in_chat(words, self.launch.engine.model or "")) is not None:
            begun = Begun(request["name"], request)
            self._view.app.push_screen(RunScreen(begun.run, begun), use)
        elif words:
            open_run(find_run(words))
        else:
            self._view.app.push_screen(RunsScreen(), open_run)

    def _evaluate(self, words: str) -> None:
        """words: none for the list of evaluations; the name of one; or data, alone or behind candidates. One that was
        begun goes on while one chats."""
        from glmchat.chat.evaluating import Asked, request_in_chat
        from glmchat.core.eval_folder import find_evaluation
        from glmchat.tui.screens.evaluations import EvaluationScreen, EvaluationsScreen

        at_work = self._asked if self._asked is not None and self._asked.is_at_work else None

        def begin(asked: Asked) -> None:
            self._asked = asked
            asked.start()

        def show(found: Evaluation | Asked | None) -> None:
            if found is not None:
                ours = at_work is not None and at_work.evaluation == found
                self._view.app.push_screen(EvaluationScreen(at_work if at_work and ours else found, begin))

        if not words:
            self._view.app.push_screen(EvaluationsScreen(), show)
        elif (request := request_in_chat(words, self.launch, self.chat.adapters)) is None:
            show(find_evaluation(words))
        elif at_work is not None:
            raise Usage(tr("an evaluation is at work"), hint=tr("/eval shows it"), code="eval.at_work")
        else:
            show(Asked(request))

    def _compare(self, words: str) -> None:
        self._talk.stop_behind()
        self.when_quiet(lambda: self._comparing.open(words))

    def choose_among(self, count: int, pairs: Sequence[str], seed: int | None) -> None:
        self._talk.stop_behind()
        self.when_quiet(lambda: self._comparing.open_versions(count, pairs, seed, self.current("assistant")))

    def _restart(self, words: str) -> None:
        if not self._connection.link.has_target:
            self._model("")
            return
        self._talk.stop_behind()
        self.when_quiet(self._connection.restart)

    def _delete(self, words: str) -> None:
        conversation = self.chat.tree.conversation.id
        self.deletions.append((self.chat.history.delete_conversation(conversation), conversation))
        self._talk.stop()
        self._talk.turn_to(None)
        self.tell(tr("the conversation was deleted"), tr("/redo restores it"))

    def _theme(self, words: str) -> None:
        app: Any = self._view.app
        if app.palette.name == "plain":
            self.tell(tr("NO_COLOR is set, so there are no themes to choose from"))
            return
        if not words:
            app.push_screen(ThemeScreen())
            return
        if words not in THEMES:
            raise Usage(tr("there is no theme {name}", name=repr(words)), hint=", ".join(THEMES), code="theme.unknown")
        app.change_theme(words)
        remember_theme(words)


def _lists_model(rows: Sequence[ModelRow], name: str) -> bool:
    """Raises Usage where a server lists the name as an adapter."""
    row = next((row for row in rows if row.name == name), None)
    if row is not None and row.parent:
        raise Usage(
            tr("{name} is an adapter, not a model", name=one_line(name, 60)),
            hint=f"/adapter {one_line(name, 60)}",
            code="server.no_model",
        )
    return row is not None


def _not_listed(message: str, rows: Sequence[ModelRow]) -> Usage:
    names = ", ".join(one_line(row.name, 60) for row in rows[:20] if row.parent is None)
    return Usage(message, hint=tr("it has: {names}", names=names or tr("none")), code="server.no_model")
