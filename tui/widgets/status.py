"""The status line: what answers, how fast, how full. Facts leave it one by one as the width shrinks."""

from __future__ import annotations

from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text
from textual.widget import Widget

from glmchat.core.language import tr
from glmchat.core.messages import Finished
from glmchat.core.text import human_bytes, one_line, short_name
from glmchat.tui.theme import PALETTES, Palette

_BAR = 8
_EIGHTHS = " ▏▎▍▌▋▊▉█"


STAGES = {  # of an engine's loading and of an answer, in words
    "greet": "asking the server",
    "ask": "asking the engine",
    "start": "starting the engine",
    "import": "starting the engine",
    "quantize": "quantising (only once)",
    "tokenizer": "reading the vocabulary",
    "weights": "loading the weights",
    "warmup": "warming up",
    "waiting": "waiting in the server's queue",
    "prefill": "reading the prompt",
}


def stage_words(stage: str) -> str:
    return tr(STAGES.get(stage, "starting the engine"))


@dataclass(slots=True)
class Facts:
    """None is not known and is not shown."""

    model: str | None = None
    revision: str | None = None
    quant: str | None = None
    adapters: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()  # of what the next answer is made with and is not the default
    unsent: int = 0  # turns that do not fit into the context
    speed: float | None = None  # tokens per second
    first_token: float | None = None  # seconds
    used: int | None = None  # tokens the next request would hold
    limit: int | None = None
    memory: int | None = None
    gpu: tuple[int, int] | None = None
    device: str | None = None  # where it computes, and why there
    device_reason: str | None = None
    activity: str = ""  # "loading weights", "reading the prompt", "answering": replaces the facts at the left
    progress: float | None = None  # of the activity
    lost: bool = False
    server: bool = False  # what is lost is a server, and no engine of ours
    away: bool = False  # what is lost is a server, which is asked again
    unsaved: bool = False
    queued: int = 0
    behind: tuple[str, ...] = ()  # titles of conversations that are answered while another one is in view


class StatusLine(Widget):
    """One row. Set `facts` attributes and call `show()`."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.facts = Facts()
        self.palette: Palette = PALETTES["dark"]

    def show(self, **changes: object) -> None:
        for name, value in changes.items():
            setattr(self.facts, name, value)
        self.refresh()

    def show_finished(self, answer: Finished) -> None:
        """The numbers of an answer that has ended, as far as the server sent them."""
        changes: dict[str, object] = {"activity": "", "progress": None}
        if answer.decode_tokens_per_second is not None:
            changes["speed"] = answer.decode_tokens_per_second
        if answer.ttft_seconds is not None:
            changes["first_token"] = answer.ttft_seconds
        if answer.prompt_tokens is not None and answer.completion_tokens is not None:
            changes["used"] = answer.prompt_tokens + answer.completion_tokens
        self.show(**changes)

    def render(self) -> Text:
        return status_text(self.facts, self.size.width, self.palette)


def status_text(facts: Facts, width: int, palette: Palette) -> Text:
    """The row for a width. Lower ranks stay longest."""
    f, p = facts, palette
    model = short_name(f.model or "")
    short = (f.revision or "")[:7]
    left: list[tuple[int, Text]] = []
    if f.lost:
        words = (
            tr("server not reachable · trying again")
            if f.away
            else tr("not connected · F5 connects again")
            if f.server
            else tr("engine stopped · F5 starts it again")
        )
        left.append((0, Text(words, p.style(p.error, bold=True))))
    elif f.activity:
        line = Text.assemble((f.activity, p.accented))
        if f.progress is not None:
            line.append(" ")
            line.append_text(bar(f.progress, palette))
            line.append(f" {f.progress:.0%}", p.quiet)
        left.append((0, line))
    if model:
        name = Text(model, p.style(p.text, bold=True) if not f.activity else p.quiet)
        left.append((1, name))
        if short:
            left.append((8, Text(f"@{one_line(short, 12)}", p.faded)))
        if f.quant and f.quant != "none":
            left.append((5, Text(one_line(f.quant, 16), p.quiet)))
        for adapter in f.adapters:
            called, _, said = adapter.partition(" (")  # what is said of one must not be cut off with its name
            drawn = Text("+" + one_line(called, 20), p.style(p.user))
            left.append((4, drawn.append(f" ({said}", p.style(p.error, bold=True)) if said else drawn))
        for mark in f.marks:
            left.append((4, Text(one_line(mark, 24), p.style(p.user))))
    right: list[tuple[int, Text]] = []
    if f.unsaved:
        right.append((2, Text(tr("not saved"), p.style(p.warning, bold=True))))
    for title in f.behind:
        right.append((5, Text("… " + one_line(title, 24), p.accented)))
    if f.queued:
        right.append((2, Text(tr("{n} queued", n=f.queued), p.style(p.user))))
    if f.unsent:
        words = tr("1 turn not sent") if f.unsent == 1 else tr("{n} turns not sent", n=f"{f.unsent:,}")
        right.append((3, Text(words, p.style(p.warning))))
    if f.speed is not None:
        right.append((11, Text(f"{f.speed:.1f} tok/s", p.quiet)))
    if f.first_token is not None:
        right.append((12, Text(tr("first token {s} s", s=f"{f.first_token:.2f}"), p.quiet)))
    if f.used is not None and f.limit:
        share = f.used / f.limit
        ink = p.style(p.error if share > 0.9 else p.warning if share > 0.75 else p.muted, dim=not p.muted)
        right.append((3, Text(f"{f.used:,}/{f.limit:,}", ink)))
        right.append((6, bar(share, palette)))
    elif f.used is not None:
        right.append((3, Text(tr("{n} tokens", n=f.used), p.quiet)))
    if f.device is not None:
        right.append((8, Text("CPU" if f.device == "cpu" else one_line(f.device, 24), p.quiet)))
        if f.device_reason:
            right.append((13, Text(one_line(f.device_reason, 48), p.quiet)))
    if f.memory is not None:
        right.append((8, Text(human_bytes(f.memory), p.quiet)))
    if f.gpu is not None:
        right.append((9, Text(f"GPU {human_bytes(f.gpu[0])}", p.quiet)))
    room = width - 2
    while left or right:
        text = _row(left, right, room, palette)
        if text is not None:
            return text
        worst = max(rank for rank, _ in [*left, *right])
        if worst == 0:
            break
        # The last of the least important facts goes first.
        side = right if any(rank == worst for rank, _ in right) else left
        side.remove(next(part for part in reversed(side) if part[0] == worst))
    text = left[0][1] if left else Text("")
    text.truncate(max(0, room), overflow="ellipsis")
    return Text(" ", p.body) + text


def bar(share: float, palette: Palette) -> Text:
    """A small bar in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * _BAR * 8)
    full, rest = divmod(eighths, 8)
    drawn = "█" * full + (_EIGHTHS[rest] if rest else "")
    text = Text(drawn, palette.style(palette.accent, palette.surface))
    text.append(" " * (_BAR - cell_len(drawn)), palette.style(palette.faint, palette.surface))
    return text if palette.surface else Text(f"[{'#' * full}{'.' * (_BAR - full)}]", palette.quiet)


def _row(left: list[tuple[int, Text]], right: list[tuple[int, Text]], room: int, palette: Palette) -> Text | None:
    dot = Text(" · ", palette.faded)
    start, end = Text(), Text()
    for index, (_, part) in enumerate(left):
        glued = part.plain.startswith("@")
        if index and not glued:
            start.append_text(dot)
        start.append_text(part)
    for index, (_, part) in enumerate(right):
        if index:
            end.append_text(dot)
        end.append_text(part)
    gap = room - start.cell_len - end.cell_len
    if gap < (2 if right and left else 0):
        return None
    return Text.assemble((" ", palette.body), start, (" " * gap, palette.body), end)
