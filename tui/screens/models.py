"""The models: what is here, what can be pulled, what fits this machine; pull, verify, load, unload, delete."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from glmchat.chat.launch import problem_of
from glmchat.core.errors import GlmchatError, Interrupted, NetworkFailed
from glmchat.core.http_bounds import result_of
from glmchat.core.language import tr
from glmchat.core.servers import Server
from glmchat.core.text import human_bytes, one_line
from glmchat.hub import plan as planning
from glmchat.hub import pull, references, removal, store, verify
from glmchat.hub.file_request import FileProgress, Progress
from glmchat.hub.installed import Installed
from glmchat.hub.plan import PullPlan
from glmchat.hub.removal import RemovalPlan
from glmchat.tui import model_rows
from glmchat.tui.list_screen import ListScreen
from glmchat.tui.model_rows import Row, all_rows
from glmchat.tui.steady import error_text
from glmchat.tui.widgets.actions import KeyLine
from glmchat.tui.widgets.rows import MARK, Rows

if TYPE_CHECKING:
    from glmchat.chat.client.words import ModelRow


class ModelScreen(ListScreen[Installed | Server | None]):
    """Returns what to load, a server to talk to, or None. unload: stops the engine, so that its memory is free.

    is_first: there is no model yet, so one that was pulled is loaded at once.
    Everything that takes time runs in worker threads; only `Read`, `_Step` and `_Finished` come back from them. A plan
    is shown before it is carried out, and Enter is the answer.
    """

    LEAVING = ListScreen.LEAVING | {"f4"}

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,f4,ctrl+q", "leave", show=False),
        Binding("v", "verify", show=False),
        Binding("d,delete", "remove", show=False),
        Binding("u", "unload", show=False),
        Binding("4", "quantise(4)", show=False),
        Binding("8", "quantise(8)", show=False),
    ]

    class _Step(Message):
        def __init__(self, line: str, share: float | None = None) -> None:
            super().__init__()
            self.line, self.share = line, share

    class _Finished(Message):
        """The thread is over. pulled: a model that is here now; plan: to be shown and asked for."""

        def __init__(
            self,
            line: str = "",
            *,
            pulled: str = "",
            plan: PullPlan | model_rows.QuantisedPull | RemovalPlan | None = None,
            error: GlmchatError | None = None,
        ) -> None:
            super().__init__()
            self.line, self.pulled, self.plan, self.error = line, pulled, plan, error

    def __init__(
        self,
        current: str | None,
        unload: Callable[[], None] | None = None,
        *,
        servers: Sequence[Server] = (),
        is_first: bool = False,
    ) -> None:
        """servers: those of the config."""
        super().__init__()
        self._servers = [Row(server.name, 0, "", (), "unknown", server=server) for server in servers]
        self._is_first = is_first
        self._current = current
        self._unload = unload
        self._rows: list[Row] = []
        self._asked: PullPlan | model_rows.QuantisedPull | RemovalPlan | None = None
        self._at = ""  # the row that the lines below speak of
        self._working = False
        self._cancelled = False
        self._pulled = ""  # what is loaded as soon as it stands in the list

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="wide"):
            yield Rows(id="models")
            yield Static("", id="work")
            yield KeyLine()

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = tr("Models on this machine")
        self.query_one(OptionList).focus()
        self._read(tr("reading which models are here"))

    def on_unmount(self) -> None:
        self._cancelled = True  # the window ends from outside: nothing goes on behind it

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)
        self.call_after_refresh(self._draw)

    def _read(self, line: str, then: str = "") -> None:
        """line: said meanwhile; then: said when the list stands."""
        self._say(line)
        self.read_list(all_rows, lambda rows: self._show_rows(rows, then))
        self._keys()

    def _show_rows(self, rows: list[Row], line: str) -> None:
        pulled, self._pulled = self._pulled, ""
        if self._is_first and (new := next((r for r in rows if r.installed and r.name == pulled), None)) is not None:
            self.dismiss(new.installed)
            return
        self._draw(rows)
        here = any(row.installed is not None for row in rows)
        self.query_one("#panel").border_title = tr("Models on this machine") if here else tr("No models here yet")
        now = self._chosen()
        self._at = now.name if now else ""
        self._say(line)
        self._keys()

    def _draw(self, rows: list[Row] | None = None) -> None:
        """rows: None for those that stand there, in another width."""
        options = self.query_one(OptionList)
        chosen = self._chosen()
        self._rows = self._rows if rows is None else [*rows, *self._servers]
        here = [row for row in self._rows if row.installed is not None]
        before = chosen.name if chosen else next((r.name for r in here if r.name == self._current), None)
        width = options.scrollable_content_region.width - len(MARK)
        options.clear_options()
        for number, row in enumerate(self._rows):
            if row.installed is None and number in (len(here), len(self._rows) - len(self._servers)):
                heading = tr("servers") if row.server is not None else tr("can be pulled")
                options.add_option(Option(Text(heading, self.palette.quiet), disabled=True))
            current = row.installed is not None and row.name == self._current
            options.add_option(Option(row.drawn(self.palette, width, current=current), id=str(number)))
        same = (n for n, row in enumerate(self._rows) if row.name == before)
        if (number_before := next(same, None)) is not None:
            options.highlighted = options.get_option_index(str(number_before))
        else:
            options.action_first()

    def _keys(self) -> None:
        """What the keys do at this moment."""
        if self._working:
            words = tr("Esc stops it; what was downloaded is kept")
        elif self.reading:
            words = tr("Esc closes")
        elif self._asked is not None:
            words = tr("Enter confirms · Esc cancels")
        elif (row := self._chosen()) is not None and row.installed is not None:
            words = tr("Enter loads · v verifies · d deletes · u unloads · Esc closes")
        elif row is not None and row.server is not None:
            words = tr("Enter chooses · Esc closes")
        else:
            words = tr("Enter pulls · 4 / 8 pull and quantise · Esc closes")
        self.query_one(KeyLine).say(words)

    def _chosen(self) -> Row | None:
        options = self.query_one(OptionList)
        if options.highlighted is None:
            return None
        key = options.get_option_at_index(options.highlighted).id
        return self._rows[int(key)] if key and key.isdigit() else None

    def show_error(self, error: GlmchatError) -> None:
        self._say(error_text(error, self.palette))

    def _say(self, text: str | Text) -> None:
        self.query_one("#work", Static).update(text if isinstance(text, Text) else Text(text, self.palette.body))

    # Keys

    def on_option_list_option_highlighted(self) -> None:
        row = self._chosen()
        if not self._working and row is not None and row.name != self._at:  # and not when the list is only drawn anew
            self._at, self._asked = row.name, None
            self._say("")
        self._keys()

    def on_option_list_option_selected(self) -> None:
        row = self._chosen()
        if self._working or self.reading or row is None:
            return
        if self._asked is not None:
            plan, self._asked = self._asked, None
            self._begin(lambda: self._carry_out(plan))
        elif (chosen := row.installed or row.server) is not None:
            self.dismiss(chosen)
        else:
            self._say(tr("planning"))
            name = row.name
            self._begin(lambda: self._plan(name))

    def _plan(self, name: str) -> ModelScreen._Finished:
        """A hub may be asked; planning changes nothing, so that it can be left where it stands."""
        reference = references.parse(name)
        return self._Finished(
            plan=result_of(lambda: planning.plan_pull(reference, wait=self._wait), lambda: self._cancelled)
        )

    def action_quantise(self, bits: int) -> None:
        row = self._chosen()
        if row is not None and row.installed is None and row.server is None and not self._working:
            name = row.name
            self._say(tr("planning"))
            self._begin(lambda: self._Finished(plan=model_rows.plan_quantised(name, bits, lambda: self._cancelled)))

    def action_leave(self) -> None:
        """Stop what runs; else take the question back; else close."""
        if self._working:
            self._cancelled = True
            self._say(tr("stopping"))
        elif self._asked is not None:
            self._asked = None
            self._say("")
            self._keys()
        else:
            self.dismiss(None)

    def action_verify(self) -> None:
        row = self._chosen()
        if row is not None and row.installed is not None and not self._working:
            installed = row.installed
            self._begin(lambda: self._verify(installed))

    def action_remove(self) -> None:
        row = self._chosen()
        if row is None or row.installed is None or self._working:
            return
        if row.name == self._current:
            self._say(tr("{name} is in use; load another one or unload it first", name=row.name))
            return
        installed = row.installed
        self._begin(lambda: self._Finished(plan=removal.plan_removal([installed])))

    def action_unload(self) -> None:
        if self._unload is not None and self._current is not None and not self._working:
            self._unload()
            line = tr("{name} is unloaded; its memory was freed", name=self._current)
            self._current = None
            self._read(line, line)

    # Work

    def _begin(self, work: Callable[[], ModelScreen._Finished]) -> None:
        self._working, self._cancelled = True, False
        self._keys()

        def run() -> None:
            try:
                done = work()
            except GlmchatError as error:
                done = self._Finished(error=error)
            self.post_message(done)

        self.run_worker(run, thread=True, group="models")

    def _carry_out(self, plan: PullPlan | model_rows.QuantisedPull | RemovalPlan) -> ModelScreen._Finished:
        if isinstance(plan, RemovalPlan):
            return self._delete(plan)
        return self._pull(plan) if isinstance(plan, PullPlan) else self._pull_quantised(plan)

    def _pull_quantised(self, plan: model_rows.QuantisedPull) -> ModelScreen._Finished:
        self._tell(tr("starting"))

        def tell(what: str, done: int, total: int | None) -> None:
            words = f"{one_line(what, 60)}: {human_bytes(done)}" + (f" / {human_bytes(total)}" if total else "")
            self._tell(words, done / total if total else None)

        name = model_rows.pull_quantised(plan, tell, lambda: self._cancelled)
        return self._Finished(tr("{name} is ready; Enter loads it", name=name), pulled=name)

    def _pull(self, plan: PullPlan) -> ModelScreen._Finished:
        planning.require_fit(plan)
        row = pull.execute(
            plan,
            self._progress,
            lambda: self._cancelled,
            waiting=lambda: self._tell(tr("another process is pulling the same files; waiting for it")),
        )
        if (problem := problem_of(row)) is not None:
            return self._Finished(error=problem)
        return self._Finished(tr("{name} is ready; Enter loads it", name=row.name), pulled=row.name)

    def _wait(self, why: str, seconds: float) -> None:
        """Sit out the time that a hub asks to be left alone for; Esc ends it."""
        self._tell(tr("{why}: waiting for {n} seconds", why=why, n=round(seconds)) if seconds else why)
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            if self._cancelled:
                raise store.stopped()
            time.sleep(min(left, 0.2))

    def _verify(self, row: Installed) -> ModelScreen._Finished:
        def count(path: str, done: int, total: int | None) -> None:
            self._tell(tr("verifying {path}", path=one_line(path, 60)), done / total if total else None)

        report = verify.verify(row, count, lambda: self._cancelled)
        report.require_good()
        return self._Finished(tr("{count} files of {name} are intact", count=len(report.files), name=row.name))

    def _delete(self, plan: RemovalPlan) -> ModelScreen._Finished:
        removal.execute(plan)
        return self._Finished(tr("deleted, {size} freed", size=human_bytes(plan.bytes_freed)))

    def _progress(self, now: Progress) -> None:
        moving = [file for file in now.files if file.state not in ("waiting", "done")]
        facts = [_doing(moving[0])] if moving else []
        facts.append(human_bytes(now.done) + (f" / {human_bytes(now.total)}" if now.total else ""))
        if now.bytes_per_second:
            facts.append(f"{human_bytes(int(now.bytes_per_second))}/s")
        if now.seconds_left is not None:
            short = now.seconds_left < 90
            facts.append(
                tr("{seconds} s left", seconds=f"{now.seconds_left:.0f}")
                if short
                else tr("{minutes} min left", minutes=f"{now.seconds_left / 60:.0f}")
            )
        if now.note:
            facts.append(now.note)
        self._tell(" · ".join(facts), now.done / now.total if now.total else None)

    def _tell(self, line: str, share: float | None = None) -> None:
        self.post_message(self._Step(line, share))

    def on_model_screen__step(self, step: _Step) -> None:
        if not self._working or self._cancelled:
            return
        text = Text()
        if step.share is not None:
            full = round(40 * min(1.0, step.share))
            text.append("━" * full, self.palette.accented)
            text.append("━" * (40 - full), self.palette.faded)
            text.append(f" {step.share:4.0%}\n", self.palette.strong)
        self._say(text.append(step.line, self.palette.quiet))

    def on_model_screen__finished(self, done: _Finished) -> None:
        self._working = False
        if done.error is not None:
            self._keys()
            if isinstance(done.error, Interrupted):
                raise Interrupted(done.error.message, hint=tr("Enter resumes"), code=done.error.code)
            if done.error.code == "pull.network":  # its own hint is of the command line
                hint = tr("Enter tries again and keeps what was downloaded; HF_ENDPOINT names another source")
                raise NetworkFailed(done.error.message, hint=hint, code=done.error.code)
            raise done.error
        if done.plan is not None:
            self._asked = done.plan
            self._say(model_rows.draw_plan(done.plan, self.palette))
            self._keys()
        else:
            self._pulled = done.pulled
            self._read(done.line, done.line)


def _doing(file: FileProgress) -> str:
    name = one_line(file.path, 40)
    match file.state:
        case "unpacking":
            return tr("unpacking {name}", name=name)
        case "checking":
            return tr("checking {name}", name=name)
        case _:
            return tr("downloading {name}", name=name)


class ServerScreen(ListScreen[str | Server | None]):
    """The models of the server that is talked to. Returns the chosen one, another server, or "" for those on this
    machine."""

    LEAVING = ListScreen.LEAVING | {"f4"}
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f4,ctrl+q", "leave", show=False)]

    def __init__(
        self, models: Callable[[], list[ModelRow]], current: str | None, servers: Sequence[Server] = ()
    ) -> None:
        """servers: the others of the config."""
        super().__init__()
        self._models = models
        self._current = current
        self._servers = servers
        self._choices: list[str | Server] = []

    def compose(self) -> ComposeResult:
        with Vertical(id="panel", classes="wide"):
            yield Rows(id="models")
            yield Static("", id="work")
            yield KeyLine()

    def on_mount(self) -> None:
        self.query_one("#panel").border_title = tr("Models of the server")
        self.query_one(KeyLine).say(tr("Enter chooses · Esc closes"))
        self.query_one(OptionList).focus()
        self.query_one("#work", Static).update(tr("asking the server"))
        self._list([])
        self.read_list(self._models, self._read)

    def on_resize(self) -> None:
        self.call_after_refresh(self.query_one(KeyLine).place)

    def show_error(self, error: GlmchatError) -> None:
        self.query_one("#work", Static).update(error_text(error, self.palette))

    def _read(self, rows: list[ModelRow]) -> None:
        self._list([row.name for row in rows if row.parent is None])
        adapters = ", ".join(one_line(row.name, 60) for row in rows if row.parent)
        words = tr("adapters of the server, for F7: {names}", names=adapters) if adapters else ""
        self.query_one("#work", Static).update(Text(words, self.palette.quiet))

    def _list(self, names: list[str]) -> None:
        options, p = self.query_one(OptionList), self.palette
        self._choices = [*names, *self._servers, ""]
        options.clear_options()
        for choice in self._choices:
            if isinstance(choice, Server):
                options.add_option(Option(model_rows.server_row(choice, p)))
                continue
            mark = Text("● " if choice and choice == self._current else "  ", p.accented)
            shown = one_line(choice, 80) if choice else tr("the models on this machine …")
            options.add_option(Option(mark.append(shown, p.body if choice else p.quiet)))
        options.highlighted = names.index(self._current) if self._current in names else 0

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        if not self.reading:
            self.dismiss(self._choices[event.option_index])

    def action_leave(self) -> None:
        self.dismiss(None)
