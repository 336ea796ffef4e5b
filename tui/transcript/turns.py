"""One turn of the transcript: what it says, and the lines around an answer's text or of anything else that is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style

from glmchat.core.language import tr
from glmchat.core.text import show_controls
from glmchat.tui.theme import Palette
from glmchat.tui.transcript.markdown import text_lines
from glmchat.tui.transcript.wrapping import Line

FOLD_AFTER = 24  # lines of a question; a longer one is folded
FOLD_TO = 12
COMPACT_ROWS = 12  # of the view; below, nothing is spent on air
INDENT = 2  # cells of an answer's text

Role = Literal["user", "assistant", "notice", "warning", "error", "rule", "welcome"]
State = Literal["done", "waiting", "streaming"]


@dataclass(slots=True)
class Turn:
    """One entry. `note` is a quiet line below it ("stopped"); `label` names the speaker; `hint` follows a notice."""

    key: str
    role: Role
    text: str = ""
    label: str = ""
    note: str = ""
    hint: str = ""
    state: State = "done"
    unseen: bool = False  # the model no longer gets it
    past: bool = False  # of a notice: something was asked since


class Look(NamedTuple):
    """How a turn is drawn. room: rows of the view, where the drawing depends on them, else 0."""

    width: int
    palette: Palette
    compact: bool = False
    room: int = 0


def header(turn: Turn, look: Look, phase: int) -> list[Line]:
    p = look.palette
    ink = p.quiet if turn.unseen else p.accented
    label = [
        Segment("● ", ink),
        Segment(set_cell_size(turn.label, min(cell_len(turn.label), look.width - 2)), p.quiet),
    ]
    lines = [Line(label, look.width, "", "")]
    if turn.state == "waiting":
        dots = "".join("•" if i == phase % 3 else "·" for i in range(3))
        lines.append(Line([Segment(f"  {dots}", p.quiet)], look.width, "", ""))
    return lines


def footer(turn: Turn, look: Look) -> list[Line]:
    if not turn.note:
        return [Line([], 0, "")]
    drawn = text_lines(show_controls(turn.note), max(1, look.width - INDENT), look.palette.quiet)
    margin = Segment(" " * INDENT, look.palette.body)
    return [
        *([] if look.compact else [Line([], 0, "")]),
        *(Line([margin, *line.segments], look.width, "", "") for line in drawn),
        Line([], 0, ""),
    ]


def question(turn: Turn, look: Look, folded: bool) -> list[Line]:
    p = look.palette
    ink = p.question if not turn.unseen else p.style(p.muted, p.surface)
    text = show_controls(turn.text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n")
    inner = max(1, look.width - INDENT - 1)
    drawn = text_lines(text, inner, ink)
    bar = Segment("▌ ", p.question_bar)
    lines: list[Line] = []
    hidden = len(drawn) - FOLD_TO if len(drawn) > FOLD_AFTER and folded else 0
    for line in drawn[: len(drawn) - hidden]:
        fill = Segment(" " * (look.width - INDENT - sum(s.cell_length for s in line.segments)), ink)
        lines.append(Line([bar, *line.segments, fill], 2, line.text, line.joint))
    if len(drawn) > FOLD_AFTER:
        words = tr("… {n} more lines (click or Enter to unfold)", n=hidden) if hidden else tr("show less")
        words = set_cell_size(words, look.width - INDENT)
        quiet = p.style(p.muted, p.surface, dim=not p.muted)
        lines.append(Line([bar, Segment(words, quiet)], look.width, "", "", "", (0, look.width, "fold", "")))
    if p.surface and p.rules and not look.compact:
        edge = Style(color=p.surface, bgcolor=p.background or None)
        corner = Style(color=p.surface, bgcolor=p.background or None)
        rest = max(0, look.width - 1)
        # Half rows above and below make the panel breathe without costing a line of text each.
        lines.insert(0, Line([Segment("▄", corner), Segment("▄" * rest, edge)], look.width, "", ""))
        lines.append(Line([Segment("▀", corner), Segment("▀" * rest, edge)], look.width, "", ""))
    else:
        lines.append(Line([], 0, ""))
    if turn.note:
        lines.append(
            Line(
                [Segment("  " + set_cell_size(turn.note, max(0, look.width - 2)), p.quiet)],
                look.width,
                "",
                "",
            )
        )
    return lines


def rule(turn: Turn, look: Look) -> list[Line]:
    p = look.palette
    label = f" {turn.text} " if turn.text else ""
    if cell_len(label) > look.width - 4:
        label = set_cell_size(label, max(0, look.width - 4))
    side = (look.width - cell_len(label)) // 2
    line = p.style(p.border or p.faint, dim=not p.border)
    rest = look.width - side - cell_len(label)
    segments = [Segment("─" * side, line), Segment(label, p.quiet), Segment("─" * rest, line)]
    return [Line([], 0, ""), Line(segments, look.width, "", ""), Line([], 0, "")]


def notice(turn: Turn, look: Look, folded: bool) -> list[Line]:
    """One from before the last question is a single faint row until it is clicked."""
    p = look.palette
    if turn.past and folded:
        words = turn.text.strip().partition("\n")
        more = bool(words[2] or turn.hint) or cell_len(words[0]) > look.width - INDENT
        row = set_cell_size(show_controls(words[0]), min(cell_len(words[0]), look.width - INDENT - 2 * more))
        shown = f"· {row}{' …' if more else ''}"
        return [Line([Segment(shown, p.faded)], 2, row, "", "", (0, look.width, "fold", "") if more else None)]
    sign, color = {"warning": ("▲", p.warning), "error": ("■", p.error)}.get(turn.role, ("·", p.muted))
    ink = p.style(color, bold=turn.role == "error") if turn.role != "notice" else p.quiet
    width = max(1, look.width - INDENT)
    mark, blank = Segment(f"{sign} ", ink), Segment("  ", p.body)
    drawn = text_lines(show_controls(turn.text), width, p.body if turn.role != "notice" else p.quiet)
    lines = [line.after(blank if index else mark, "") for index, line in enumerate(drawn)]
    if turn.hint:
        lines += [line.after(blank, "") for line in text_lines(show_controls(turn.hint), width, p.quiet)]
    return [*lines, Line([], 0, "")]


def _sized(text: str, cells: int) -> str:
    """Padded, or cut with an ellipsis."""
    return set_cell_size(text, cells) if cell_len(text) <= cells else set_cell_size(text, cells - 1) + "…"


def welcome(turn: Turn, look: Look) -> list[Line]:
    """The empty conversation: a name, the model, the last conversations, the keys worth knowing.

    `text` holds "key<tab>what" lines, those of a conversation with "<tab>when<tab>id"; an empty line is air, given up
    first where rows are few, then conversations, then keys.
    """
    p = look.palette
    entries = [[*line.split("\t"), "", "", ""][:4] for line in turn.text.split("\n")]
    entries = _within(entries, look.room - 2 - (not look.compact)) if look.room else entries
    keys = max((cell_len(entry[0]) for entry in entries), default=0)
    room = max(8, look.width - keys - 3 - max((cell_len(entry[2]) + 2 for entry in entries if entry[2]), default=0))
    titles = min(room, max((cell_len(entry[1]) for entry in entries if entry[3]), default=0))
    body = []
    for key, what, when, number in entries:
        row = [Segment(key + " " * (keys - cell_len(key) + 3), p.accented)] if key else []
        if number:
            row += [Segment(_sized(what, titles), p.body), Segment(f"  {when}", p.quiet)]
        elif key:
            row.append(Segment(_sized(what, min(cell_len(what), look.width - keys - 3)), p.quiet))
        body.append((row, number))
    title = [Segment("● ", p.accented), Segment("glmchat", p.strong)]
    if turn.label:
        title.append(Segment(f"  {turn.label}", p.quiet))
    rows = [(title, ""), *([] if look.compact else [([], "")]), *body]
    widest = max(sum(s.cell_length for s in row) for row, _ in rows)
    side = max(0, (look.width - widest) // 2)
    lines = [
        Line(
            [Segment(" " * side, p.body), *row], look.width, "", "", "",
            (side, side + widest, "open-conversation", number) if number else None,
        )
        for row, number in rows
    ]  # fmt: skip
    if turn.hint:
        lines.append(Line([], 0, ""))
        lines += [
            line.after(Segment(" " * side, p.body), "") for line in text_lines(turn.hint, max(8, widest), p.quiet)
        ]
    above = max(0, (look.room - len(lines)) * 2 // 5)  # a little above the middle looks like the middle
    return [*[Line([], 0, "")] * above, *lines, Line([], 0, "")]


def _within(entries: list[list[str]], rows: int) -> list[list[str]]:
    """As many entries as there is room for."""
    if len(entries) > rows:
        entries = [entry for entry in entries if entry[0]]
    listed = sum(bool(entry[3]) for entry in entries)
    while len(entries) > rows and listed > 2 and listed > rows // 2:
        listed -= 1
        del entries[listed]
    return entries[: max(1, rows)]
