"""A download's progress as events: what jobs tell as lines of JSON, and the command line prints.

{"event": "say", text} and {"event": "meter", label, done, total} are for people; {"event": "progress", …} for programs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from glmchat.core.language import tr
from glmchat.hub.file_request import Progress

Tell = Callable[[Mapping[str, Any]], None]
_EVENT_SECONDS = 0.5  # between two progress events
_METER_SECONDS = 0.1  # between two looks at the same bar
_SMALL = 5_000_000  # bytes; smaller files get no bar of their own


class Meter:
    """Tells how far a bar is, at most ten times a second each, and always its end."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, label: str, done: int, total: int | None) -> None:
        at, before = self._last.get(label, (0.0, -1))
        now = time.monotonic()
        if done == before or (now - at < _METER_SECONDS and done != total):
            return
        self._last[label] = (now, done)
        self._tell({"event": "meter", "label": label, "done": done, "total": total})


class ProgressEvents:
    """Hand it to whatever downloads. for_programs: False where other progress is told to them."""

    def __init__(self, tell: Tell, *, for_programs: bool = True) -> None:
        self._tell, self._for_programs = tell, for_programs
        self._meter = Meter(tell)
        self._at = 0.0
        self._notes = {""}

    def __call__(self, progress: Progress) -> None:
        if progress.note not in self._notes:
            self._notes.add(progress.note)
            self._tell({"event": "say", "text": progress.note})
        if self._for_programs and time.monotonic() - self._at >= _EVENT_SECONDS:
            self._at = time.monotonic()
            names = ("done", "total", "bytes_per_second", "seconds_left")
            self._tell({"event": "progress", **{name: getattr(progress, name) for name in names}})
        for file in progress.files:
            if file.state != "waiting" and (file.total is None or file.total >= _SMALL or len(progress.files) == 1):
                self._meter(file.path, file.done, file.total)
        if len(progress.files) > 1:
            self._meter(tr("in all"), progress.done, progress.total)
