"""The log of a run: written a whole line at a time, read while it grows, and folded into what is known of the run.

    {"kind": "start", …}       what begins; with "step" where an earlier part is gone on with
    {"kind": "stage", …}       what is done before the plan: "say"
    {"kind": "page", …}        the plan: "words" are the lines that people read, the last "sums" of them what it
                               takes
    {"kind": "step", …}        step, steps, epoch, loss, lr, grad_norm, tokens, tokens_per_second, memory, seconds_left,
                               worst; token_accuracy, the share of the learned tokens that had the highest logit; or of
                               pairs accuracy, margin, reward_chosen, reward_rejected
    {"kind": "evaluation", …}  step, loss, perplexity, token_accuracy; of pairs the measures of a step instead
    {"kind": "sample", …}      step, question, answer, stopped
    {"kind": "checkpoint", …}  step, path
    {"kind": "end", …}         state: done, stopped or failed; code, message, hint

A run that is gone on with repeats the steps behind its last checkpoint: the later record of a step counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmchat.core.files import open_file

_CHUNK = 1 << 20  # bytes read at once
Points = list[tuple[int, float]]  # (step, loss)


class LogWriter:
    """Appends records. A half line that a killed program left is taken away first."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(path, flags, 0o600)
        os.ftruncate(self._descriptor, _whole(path))

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Raises OSError where the disk takes no more; what it took of the line is taken back."""
        line = (json.dumps(_plain(record), ensure_ascii=False) + "\n").encode("utf-8", "replace")
        before = os.fstat(self._descriptor).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(self._descriptor, line[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise

    def close(self) -> None:
        os.close(self._descriptor)


def _plain(value: Any) -> Any:
    """NaN and infinity are no JSON: they are written as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value


def _whole(path: Path) -> int:
    """Bytes of the whole lines of a file."""
    with open_file(path) as file:
        at = os.fstat(file.fileno()).st_size
        while at:
            begin = max(0, at - _CHUNK)
            file.seek(begin)
            if (newline := file.read(at - begin).rfind(b"\n")) >= 0:
                return begin + newline + 1
            at = begin
    return 0


class LogReader:
    """Reads what is new, a whole line at a time. A log that is not there yet is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> list[dict[str, Any]]:
        """The records since the last call. Lines that are none are passed over."""
        records = []
        try:
            with open_file(self._path) as file:
                if os.fstat(file.fileno()).st_size < self._at:  # it was made anew
                    self._at = 0
                file.seek(self._at)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._at += len(line)
                    with suppress(ValueError, RecursionError):
                        if isinstance(record := json.loads(line), dict):
                            records.append(record)
        except OSError:
            return records
        return records


@dataclass(slots=True)
class Progress:
    """What a run's log tells, folded. now: the last record of a step; end: how it ended."""

    page: Mapping[str, Any] = field(default_factory=dict)
    now: Mapping[str, Any] = field(default_factory=dict)
    losses: Points = field(default_factory=list)
    evaluations: Points = field(default_factory=list)
    better: Points = field(default_factory=list)  # rewards, of pairs of answers
    worse: Points = field(default_factory=list)
    samples: list[Mapping[str, Any]] = field(default_factory=list)
    checkpoint: int | None = None
    end: Mapping[str, Any] | None = None
    stage: str = ""  # what is done before there is a plan, or behind the last step

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            self._add(record)

    def _add(self, record: Mapping[str, Any]) -> None:
        kind, step = record.get("kind"), record.get("step")
        if kind == "start":
            self.end = None
        elif kind == "page":
            self.page = record
        elif kind == "stage":
            self.stage = str(record.get("say", ""))
        elif kind == "end":
            self.end = record
        elif not isinstance(step, int):
            return
        elif kind == "step":
            self.now, self.stage = record, ""
            _put(self.losses, step, record.get("loss"))
            _put(self.better, step, record.get("reward_chosen"))
            _put(self.worse, step, record.get("reward_rejected"))
            self.evaluations = [point for point in self.evaluations if point[0] <= step]
        elif kind == "evaluation":
            _put(self.evaluations, step, record.get("loss"))
        elif kind == "sample":
            self.samples = [sample for sample in self.samples if sample["step"] <= step]
            self.samples.append(record)
        elif kind == "checkpoint":
            self.checkpoint = step


def _put(points: Points, step: int, loss: Any) -> None:
    """The later word on a step counts, and takes away what came behind it."""
    while points and points[-1][0] >= step:
        points.pop()
    if isinstance(loss, int | float) and math.isfinite(loss):
        points.append((step, float(loss)))


_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of U+2800, by row and column
_WIDTH, _HEIGHT, _MARGIN = 720, 360, 44  # pixels of the drawing


def curve_svg(progress: Progress) -> str:
    """Losses of the steps as a line, of the evaluations as a line with dots; loads nothing from anywhere."""
    points = [*progress.losses, *progress.evaluations]
    low, high = min((y for _, y in points), default=0.0), max((y for _, y in points), default=1.0)
    last = max((x for x, _ in points), default=1)
    high = high if high > low else low + 1.0

    def place(point: tuple[int, float]) -> tuple[float, float]:
        x = _MARGIN + (_WIDTH - 2 * _MARGIN) * point[0] / max(last, 1)
        return round(x, 1), round(_MARGIN + (_HEIGHT - 2 * _MARGIN) * (high - point[1]) / (high - low), 1)

    def line(points: Points, colour: str) -> str:
        path = " ".join(f"{x},{y}" for x, y in map(place, points))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{path}"/>'

    dots = "".join(f'<circle cx="{x}" cy="{y}" r="3" fill="#c0562b"/>' for x, y in map(place, progress.evaluations))
    words = (
        f'<text x="4" y="{_MARGIN}">{high:.3f}</text><text x="4" y="{_HEIGHT - _MARGIN}">{low:.3f}</text>'
        f'<text x="{_WIDTH - _MARGIN}" y="{_HEIGHT - 12}">{last}</text>'
        f'<text x="{_MARGIN}" y="20" fill="#0b7566">loss</text>'
        f'<text x="{_MARGIN + 60}" y="20" fill="#c0562b">held-out loss</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="monospace" '
        f'font-size="12"><rect width="100%" height="100%" fill="#fff"/>{line(progress.losses, "#0b7566")}'
        f"{line(progress.evaluations, '#c0562b')}{dots}{words}</svg>\n"
    )


def draw(
    lines: Sequence[Points], evaluations: Points, width: int, height: int
) -> tuple[float, float, list[list[tuple[str, int]]]]:
    """Lowest and highest value, and of each cell its sign and the number of the line in it; len(lines): an evaluation.

    Several steps that share a column of dots are drawn as their mean.
    """
    points = [point for line in (*lines, evaluations) for point in line]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    across, down = 2 * width, 4 * height
    means = [_means(line, first, last, across) for line in lines]
    seen = [value for line in (*means, evaluations) for _, value in line]
    low, high = min(seen), max(seen)
    bits = [[0] * width for _ in range(height)]
    whose = [[0] * width for _ in range(height)]

    def dot(x: int, y: int, number: int) -> None:
        bits[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        whose[y // 4][x // 2] = number

    for number, line in enumerate(means):
        heights = [(x, down - 1 - _at(value, low, high, down)) for x, value in line]
        for (x0, y0), (x1, y1) in zip(heights, [*heights[1:], heights[-1]] if heights else [], strict=True):
            for x, y in _line(x0, y0, x1, y1):
                dot(x, y, number)
    mark = len(lines)
    for step, value in evaluations:
        dot(_at(step, first, last, across), down - 1 - _at(value, low, high, down), mark)
    cells = [
        [
            ("●" if own == mark else chr(0x2800 + sign) if sign else " ", own)
            for sign, own in zip(row, owns, strict=True)
        ]
        for row, owns in zip(bits, whose, strict=True)
    ]
    return low, high, cells


def _means(points: Points, first: int, last: int, across: int) -> list[tuple[int, float]]:
    """One value for each column of dots that has any."""
    columns: list[list[float]] = [[] for _ in range(across)]
    for step, value in points:
        columns[_at(step, first, last, across)].append(value)
    return [(x, sum(values) / len(values)) for x, values in enumerate(columns) if values]


def _at(value: float, low: float, high: float, places: int) -> int:
    """Which of so many places between low and high."""
    return 0 if high <= low else min(places - 1, int((value - low) / (high - low) * (places - 1) + 0.5))


def _line(x0: int, y0: int, x1: int, y1: int) -> Sequence[tuple[int, int]]:
    """The dots between two, both with them."""
    count = max(abs(x1 - x0), abs(y1 - y0), 1)
    return [(round(x0 + (x1 - x0) * n / count), round(y0 + (y1 - y0) * n / count)) for n in range(count + 1)]
