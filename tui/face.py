"""What each command does to the model and the window; `run_command` is the way to all of them.

One method for each row of the table in `commands.py`: those on what was said stand in editing.py, those on
conversations and files in keeping.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from glmchat.chat.commands import table as commands
from glmchat.chat.sampling_choice import value_text
from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.core.messages import sampling_name
from glmchat.tui.presets import PRESETS
from glmchat.tui.screens.help import HelpScreen
from glmchat.tui.screens.keeping import Keeping
from glmchat.tui.screens.sampling import SamplingScreen
from glmchat.tui.theme import THEME_NAMES

if TYPE_CHECKING:
    from glmchat.chat.launch import LaunchOptions
    from glmchat.hub.installed import Installed


class Commanding(Keeping):
    """Commands raise GlmchatError for what a person can mend; `run_command` shows it."""

    def run_command(self, name: str, argument: str = "") -> None:
        """Run a command by its name, from a slash line, a key, the palette or the mouse."""
        action = f"command_{commands.BY_NAME[name].name}"
        self.guarded(lambda: getattr(self, action)(argument))

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
                f"{name} {value_text(getattr(chosen.sampling, name))}",
                tr("from: {origin}", origin=tr(chosen.origins[name])),
            )
            return
        chosen = session.set(name, " ".join(words[1:]))
        self.tell(
            tr(
                "{name} is {value} from the next answer on", name=name, value=value_text(getattr(chosen.sampling, name))
            ),
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

        launch = model_choice.launch_installed(replace(self.launch, server=None), row, bits)
        self.stop_behind()
        self.when_quiet(lambda: self._begin_switch(launch))

    def _begin_switch(self, launch: LaunchOptions) -> None:
        from glmchat.chat import adapters_choice

        session, kept = self._talk(), ""
        if session.tree.context():
            kept = tr("the conversation is kept; {name} reads it anew, in its own template", name=launch.model or "")
        self.tell(tr("switching to {name}", name=launch.model or ""), kept)
        if lost := adapters_choice.keep_fitting(session, launch):
            self.tell(tr("not for this model, and put away: {names}", names=", ".join(lost)), "/adapter", "warning")
            self.show_adapters()
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
        from glmchat.chat.adapters_choice import shown
        from glmchat.hub.adapters import is_forced

        session = self._talk()
        return tuple(shown(name, scale, forced=is_forced(name)) for name, scale in session.adapters)

    def show_adapters(self) -> None:
        self.status.show(adapters=self._adapters_shown())

    def command_restart(self, argument: str) -> None:
        if not self.link.has_target:
            self.command_model("")
            return
        self.stop_behind()
        self.when_quiet(self.connect)

    def command_context(self, argument: str) -> None:
        if argument:
            self.command_policy(argument)
            return
        facts = self.status.facts
        if facts.used is None:
            self.tell(tr("the server does not say how many tokens the next request holds"))
            return
        drops = self._talk().context_policy == "drop"
        self.tell(
            tr(
                "the next request holds {used} of {limit} tokens", used=f"{facts.used:,}", limit=f"{facts.limit or 0:,}"
            ),
            tr("when it is full the oldest turns are dropped, visibly; /policy refuses the question instead")
            if drops
            else tr("when it is full the question is refused; /policy drops the oldest turns instead"),
        )

    def command_policy(self, argument: str) -> None:
        """The other policy for a full context; with an argument, that one."""
        session = self._talk()
        session.set_context_policy(argument.lower() or ("refuse" if session.context_policy == "drop" else "drop"))
        self.tell(
            tr("a full context drops the oldest turns, visibly")
            if session.context_policy == "drop"
            else tr("a full context refuses the question"),
            tr("/policy changes it, and F8 in the window"),
        )

    def command_complete(self, argument: str) -> None:
        if not argument:
            raise Usage(tr("/complete needs a text"), hint=tr("/complete Once upon a time"), code="complete.empty")
        self._must_be_ready()
        self.when_quiet(lambda: self.complete(argument))

    # Window

    def command_help(self, argument: str) -> None:
        self.app.push_screen(HelpScreen())

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
