"""The window when its terminal goes away: what `GlmchatApp` needs of chat/hangup.py, and a screen that may vanish."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from textual.driver import Driver


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


def outlive_terminal(driver: type[Driver], is_gone: Callable[[], bool]) -> type[Driver]:
    """The same driver, writing through `Vanishing`."""

    class Lasting(driver):  # type: ignore[valid-type, misc]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            if (stream := getattr(self, "_file", None)) is not None:
                self._file = Vanishing(stream, is_gone)

    return Lasting
