"""The window as a program: its screens, its themes, the one place for errors, and what happens without a terminal."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any, ClassVar

from textual import events
from textual.app import App
from textual.binding import Binding, BindingType
from textual.css.query import NoMatches
from textual.driver import Driver
from textual.geometry import Offset
from textual.notifications import SeverityLevel
from textual.screen import Screen
from textual.worker import WorkerFailed

from glmchat.chat import hangup
from glmchat.chat.launch import LaunchOptions
from glmchat.core.errors import GlmchatError
from glmchat.core.job_control import rest_around
from glmchat.core.language import choose, chosen
from glmchat.core.machine import return_big_blocks
from glmchat.core.settings import Settings, load_settings
from glmchat.tui.connection import EngineLink, Start
from glmchat.tui.screens.chat import ChatScreen
from glmchat.tui.screens.palette import PaletteScreen
from glmchat.tui.steady import Steady, SteadyScreen, toast
from glmchat.tui.theme import Palette, choose_theme, colors_of, palette_in, textual_theme

if TYPE_CHECKING:
    from glmchat.chat.session import ChatSession
    from glmchat.core.run_folder import Run


class Vanishing:
    """A stream whose terminal may be gone: what cannot be written is dropped, and what no screen is there for.

    Textual's writing thread would end with the first failure, and the window then wait for it forever. Nothing is
    buffered: with the hangup the kernel sends SIGCONT, at which Textual sets the terminal up anew, and a buffer would
    keep what could not be written and put it into the log.
    """

    def __init__(self, stream: IO[str], is_gone: Callable[[], bool]) -> None:
        self._stream = stream
        self._is_gone = is_gone

    def write(self, text: str) -> int:
        rest = text.encode("utf-8", "replace")
        with suppress(OSError):
            while rest and not self._is_gone():
                rest = rest[os.write(self._stream.fileno(), rest) :]
        return len(text)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_terminal(
    driver: type[Driver], is_gone: Callable[[], bool], attributes: list[Any] | None = None
) -> type[Driver]:
    """The same driver, writing through `Vanishing`. attributes: of the terminal, which is left with them."""

    class Lasting(driver):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if (stream := getattr(self, "_file", None)) is not None:
                self._file = Vanishing(stream, is_gone)

        def start_application_mode(self) -> None:
            super().start_application_mode()
            if attributes is not None:
                self.attrs_before = attributes

    return Lasting


class GlmchatApp(Steady, App[int]):
    """start: what starts the engine process (tests put a fake there). attributes: see `run_window`."""

    CSS_PATH = "glmchat.tcss"
    TITLE = "glmchat"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+z", "suspend_process", show=False, priority=True),  # what a terminal does with every program
    ]
    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"
    # Classes of a screen, for glmchat.tcss: where cells are few a dialog gives up its padding, not its words.
    HORIZONTAL_BREAKPOINTS: list[tuple[int, str]] | None = [(0, "slim"), (56, "broad")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS: list[tuple[int, str]] | None = [(0, "low"), (24, "high")]  # noqa: RUF012

    def __init__(
        self,
        launch: LaunchOptions,
        settings: Settings | None = None,
        start: Start | None = None,
        attributes: list[Any] | None = None,
    ) -> None:
        self._attributes = attributes
        theme = choose_theme(
            launch.theme or (settings.theme if settings else None)
        )  # before Textual takes NO_COLOR away
        # Under NO_COLOR Textual chooses its filter here, before our theme is known: without this word it would turn the
        # terminal's own colours into black on black.
        super().__init__(ansi_color=True if theme == "plain" else None)
        self._typed_ahead: list[events.Event] | None = []
        self._on_their_way: deque[tuple[events.Key, Screen[Any]]] = deque(maxlen=64)  # to a widget, and perhaps back
        self.launch = launch
        self.settings = settings or Settings()
        self.color_depth = colors_of()
        self.palette: Palette = palette_in(theme, self.color_depth)
        self.link = EngineLink(launch, start)
        self.terminal = hangup.Terminal()
        self.killed = False  # by SIGTERM
        self.left_answering: list[ChatSession] = []  # whose answers are finished without a screen
        self.register_theme(textual_theme(self.palette))
        self.theme = f"glmchat-{theme}"
        self.set_keymap(dict(self.settings.keys))

    def get_default_screen(self) -> Screen[Any]:
        return ChatScreen(self.launch, self.settings, self.link)

    def get_driver_class(self) -> type[Driver]:
        return outlive_terminal(super().get_driver_class(), lambda: self.terminal.gone, self._attributes)

    async def on_event(self, event: events.Event) -> None:
        """Textual drops keys that come before there is a widget to take them. And it lets a key that no widget wanted
        act on the screen that is there when it comes back: Esc, and Ctrl+P right behind it, closed the palette again.
        """
        if self._typed_ahead is not None and isinstance(event, events.Key | events.Paste):
            self._typed_ahead.append(event)
        elif isinstance(event, events.Key) and (screen := self._pressed_on(event)) is not None:
            for namespace, bindings in screen._modal_binding_chain:
                for binding in bindings.key_to_bindings.get(event.key, ()):
                    if not binding.priority and await self.run_action(binding.action, namespace):
                        return
        else:
            await super().on_event(event)

    def _pressed_on(self, event: events.Key) -> Screen[Any] | None:
        """The screen for which a key was meant that comes back, if another one lies above it now."""
        if not event.is_forwarded:
            self._on_their_way.append((event, self.screen))
            return None
        screen = next((screen for key, screen in self._on_their_way if key is event), self.screen)
        return screen if screen is not self.screen and screen in self.screen_stack else None

    async def hear_typed_ahead(self) -> None:
        """There is a prompt now. As a callback, after what gives it the focus.

        Before the terminal was set up for us it turned Enter into a line feed, which would be Ctrl+J.
        """
        typed, self._typed_ahead = self._typed_ahead or [], None
        for event in typed:
            is_line_feed = isinstance(event, events.Key) and event.key == "ctrl+j"
            await super().on_event(events.Key("enter", "\r") if is_line_feed else event)

    def notify(
        self, message: str, *, title: str = "", severity: SeverityLevel = "information",
        timeout: float | None = None, markup: bool = False,
    ) -> None:  # fmt: skip
        """Never as markup: titles and file names stand in what is said."""
        super().notify(message, title=title, severity=severity, timeout=timeout, markup=False)

    def _handle_exception(self, error: Exception) -> None:
        """Where everything comes that nobody caught; Textual ends the window here. What a person can mend is shown."""
        cause = error.error if isinstance(error, WorkerFailed) else error
        if not isinstance(cause, GlmchatError):
            super()._handle_exception(error)
        elif isinstance(screen := self.screen_stack[-1] if self.screen_stack else None, SteadyScreen):
            try:
                screen.show_error(cause)
            except NoMatches:  # it has been opened and is not put together yet
                toast(self, cause)
        else:
            toast(self, cause)

    @property
    def cursor_position(self) -> Offset:
        """Where the terminal's own cursor goes with each frame: an input method opens its window there.

        Asked anew each time. Textual remembers where an input was when it got the focus, and a dialog's is laid out
        only after that.
        """
        focused = self.focused if self.is_running else None
        where = getattr(focused, "cursor_screen_offset", None)
        return where if isinstance(where, Offset) else self._cursor_position

    @cursor_position.setter
    def cursor_position(self, position: Offset) -> None:
        self._cursor_position = position

    @property
    def chat(self) -> ChatScreen:
        return next(screen for screen in self.screen_stack if isinstance(screen, ChatScreen))

    def change_theme(self, name: str) -> None:
        self.palette = palette_in(name, self.color_depth)
        self.register_theme(textual_theme(self.palette))
        self.theme = f"glmchat-{name}"
        self.chat.apply_palette()

    def action_command_palette(self) -> None:
        """The key that opened it closes it."""
        if isinstance(self.screen, PaletteScreen):
            self.screen.dismiss()
        else:
            self.push_screen(PaletteScreen())

    def on_mount(self) -> None:
        if not self.is_headless:
            hangup.watch(asyncio.get_running_loop(), self.terminal, self.hang_up, self.terminate)
            before = signal.getsignal(signal.SIGTSTP)  # Textual's: it leaves the screen, stops, and comes back
            if callable(before):
                signal.signal(signal.SIGTSTP, rest_around(before))
        self.call_after_refresh(return_big_blocks)

    async def action_quit(self) -> None:
        """Textual's own Ctrl+Q, which it looks at before any screen's."""
        self.chat.face.leave()

    def hang_up(self) -> None:
        """The terminal went away: save and leave; where it was asked for, the answer goes on without a screen."""
        self.terminal.let_go()
        chat = self.chat
        for session in (answering.session for answering in chat.talk.being_written):
            if hangup.goes_on(session, self.launch.finish_on_hangup):
                self.left_answering.append(session)
                conversation = session.tree.conversation.id
                self.terminal.to_log(f"conversation {conversation} is answered to its end without a screen")
        chat.leave_for_good(self.left_answering)
        self.exit(hangup.EXIT)

    def terminate(self) -> None:
        """SIGTERM: save and leave, also where only the answer is left; a second one ends at once."""
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
        self.killed = True
        for session in self.left_answering:
            session.stop()
        if not self.terminal.gone:
            self.chat.leave_for_good()
            self.exit()

    def on_unmount(self) -> None:
        if not self.left_answering:
            from glmchat.chat.client import endpoint

            endpoint.hang_up()  # Python would wait for the threads that wait for a slow server
            self.link.close()


class RunApp(GlmchatApp):
    """One run of tuning and nothing else, for `glmchat tune`: no conversation, no engine."""

    def __init__(self, run: Run, settings: Settings, attributes: list[Any] | None = None) -> None:
        super().__init__(LaunchOptions(), settings, attributes=attributes)
        self._run_shown = run

    def get_default_screen(self) -> Screen[Any]:
        from glmchat.tui.screens.tune import RunScreen

        return RunScreen(self._run_shown)

    def action_command_palette(self) -> None:
        """There is none: a run has its keys."""

    async def action_quit(self) -> None:
        self.exit(0)

    def hang_up(self) -> None:
        """The run goes on; only what is looked at it with ends."""
        self.terminal.let_go()
        self.exit(hangup.EXIT)

    def terminate(self) -> None:
        self.killed = True
        self.exit()


def show_run(run: Run, attributes: list[Any] | None = None) -> int:
    """The live view of a run; returns when it is left. Raises GlmchatError for a broken config."""
    settings = load_settings()
    speak(LaunchOptions(), settings)
    app = RunApp(run, settings, attributes)
    app.run()
    if app.killed:
        return hangup.KILLED
    return app.return_code or 0


def speak(launch: LaunchOptions, settings: Settings) -> None:
    """The window's language: `--lang`, which the command line has fixed already, wins over the config."""
    choose(launch.language or chosen() or settings.language)


def run_window(launch: LaunchOptions, attributes: list[Any] | None = None) -> int:
    """Open the window and return its exit code. Raises GlmchatError for a broken config.

    attributes: of the terminal, as the window leaves it.
    """
    settings = load_settings()
    speak(launch, settings)
    app = GlmchatApp(launch, settings, attributes=attributes)
    try:
        code = app.run()
        hangup.finish(app.left_answering)
    finally:
        app.link.close()
    if app.return_code:
        return app.return_code
    if app.killed:
        return hangup.KILLED
    return code if isinstance(code, int) else 0
