"""What stands on the window's screen as an SVG: one picture, or a film of several.

Drawn cell by cell, so that Chinese stands in two cells whatever font the viewer has; lines and blocks are shapes, so
that they meet whatever its line height. A film is one column of frames that CSS moves past the window in steps: it
plays as an image on a page, without a script. Rows that stand in several frames are stored once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from rich.cells import cell_len, split_graphemes
from rich.color import Color, blend_rgb
from rich.segment import Segment
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from textual.strip import Strip

from glmchat.tui.app import GlmchatApp
from glmchat.tui.theme import Palette

CELL, ROW, FONT = 8.4, 18, 14  # pixels
EDGE, BAR = 12, 34  # around the screen, and the title bar above it
FAMILY = "'DejaVu Sans Mono','Cascadia Mono',Menlo,Consolas,'Noto Sans Mono CJK SC',monospace"
_INK = (217, 221, 229)
_THEME = TerminalTheme((20, 22, 27), _INK, [(0, 0, 0)] * 8)  # for colours that a terminal would choose
_SHAPES = {  # shares of a cell: left, top, width, height
    "█": (0, 0, 1, 1), "▀": (0, 0, 1, 0.5), "▄": (0, 0.5, 1, 0.5), "▌": (0, 0, 0.5, 1), "▐": (0.5, 0, 0.5, 1),
    "▔": (0, 0, 1, 0.125), "▁": (0, 0.875, 1, 0.125), "▕": (0.875, 0, 0.125, 1),
    "─": (0, 0.47, 1, 0.06), "│": (0.44, 0, 0.12, 1), "┃": (0.38, 0, 0.24, 1), "━": (0, 0.44, 1, 0.12),
    **{c: (0, 0, n / 8, 1) for n, c in enumerate("▏▎▍▌▋▊▉", 1)},
    **{c: (0, 1 - n / 8, 1, n / 8) for n, c in enumerate("▁▂▃▄▅▆▇", 1)},
}  # fmt: skip
_CORNERS = {  # from the middle of one side to that of another: (x, y) of both, the middle of the cell bends it
    "╭": ((1, 0.5), (0.5, 1)), "╮": ((0, 0.5), (0.5, 1)), "╰": ((1, 0.5), (0.5, 0)), "╯": ((0, 0.5), (0.5, 0)),
}  # fmt: skip


def rows_of(app: GlmchatApp) -> list[Strip]:
    """The screen with what shines through from below it."""
    update = app.screen._compositor.render_update(full=True, screen_stack=app._background_screens)
    return [Strip.join(row) for row in update.strips]  # type: ignore[union-attr]


@dataclass
class Film:
    """Add frames, then write `svg()`. seconds: how long each is shown; caption: what its title bar says."""

    width: int
    height: int
    palette: Palette
    frames: list[tuple[list[int], str, float]] = field(default_factory=list)
    _rows: dict[str, int] = field(default_factory=dict)

    def add(self, app: GlmchatApp, caption: str, seconds: float = 1.0) -> None:
        paper = _rgb(self.palette.background)
        rows = [self._rows.setdefault(_row(strip, paper), len(self._rows)) for strip in rows_of(app)]
        if self.frames and self.frames[-1][:2] == (rows, caption):
            seconds += self.frames.pop()[2]
        self.frames.append((rows, caption, seconds))

    def svg(self) -> str:
        p = self.palette
        wide, high = self.width * CELL + 2 * EDGE, self.height * ROW + BAR + EDGE
        drawn = []
        for number, (rows, caption, _) in enumerate(self.frames):
            top = number * high
            title = f'<text class="t" x="{wide / 2:g}" y="{top + 22:g}">{escape(caption)}</text>'
            lines = "".join(
                f'<use href="#r{row}" x="{EDGE}" y="{top + BAR + y * ROW:g}"/>'
                for y, row in enumerate(rows)
                if row != self._rows.get("")
            )
            drawn.append(title + lines)
        kept = "".join(f'<g id="r{number}">{text}</g>' for text, number in self._rows.items())
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {high:g}" width="{wide:g}">'
            f"<style>text{{font:{FONT}px {FAMILY};white-space:pre}}"
            ".b{font-weight:700}.i{font-style:italic}.u{text-decoration:underline}"
            f"rect{{shape-rendering:crispEdges}}.t{{fill:{p.muted};text-anchor:middle}}{self._motion(high)}</style>"
            f"<defs>{kept}</defs>"
            f'<rect width="{wide:g}" height="{high:g}" rx="9" fill="{p.background}" stroke="{p.border}"/>'
            + "".join(
                f'<circle cx="{20 + 20 * i}" cy="17" r="5.5" fill="{c}"/>'
                for i, c in enumerate((p.error, p.warning, p.success))
            )
            + f'<svg width="{wide:g}" height="{high:g}"><g class="film">{"".join(drawn)}</g></svg></svg>'
        )

    def _motion(self, high: float) -> str:
        """Each frame at its time. Who asked his system for less motion sees the last one."""
        if len(self.frames) < 2:
            return ""
        whole = sum(seconds for *_, seconds in self.frames)
        at = 0.0
        steps = []
        for number, (*_, seconds) in enumerate(self.frames):
            steps.append(f"{100 * at / whole:.2f}%{{transform:translateY({-number * high:g}px)}}")
            at += seconds
        last = -(len(self.frames) - 1) * high
        return (
            f"@keyframes film{{{''.join(steps)}}}.film{{animation:film {whole:g}s step-end infinite}}"
            f"@media (prefers-reduced-motion:reduce){{.film{{animation:none;transform:translateY({last:g}px)}}}}"
        )


def picture(app: GlmchatApp, caption: str = "glmchat") -> str:
    film = Film(*app.size, app.palette)
    film.add(app, caption)
    return film.svg()


def _row(strip: Strip, ground: tuple[int, int, int]) -> str:
    """Backgrounds first, then what stands on them."""
    papers, inks = [], []
    x = 0
    for segment in Strip(_joined(strip)):
        cells = segment.cell_length
        ink, paper = _colors(segment.style or Style(), ground)
        if paper != ground:
            papers.append(_rect(x, (0, 0, cells, 1), paper))
        inks.append(_signs(segment.text, x, ink, segment.style or Style()))
        x += cells
    return "".join(papers + inks)


def _joined(strip: Strip) -> list[Segment]:
    return list(Segment.simplify(Segment(s.text, s.style) for s in strip))


def _signs(text: str, x: int, ink: tuple[int, int, int], style: Style) -> str:
    """Runs of one width as text, shapes as shapes."""
    found, run, run_x, run_width = [], "", x, 1

    def end() -> None:
        nonlocal run
        if run.strip():
            lead = len(run) - len(run.lstrip(" "))
            said = run.strip(" ")
            looks = {"b": style.bold, "i": style.italic, "u": style.underline or style.link}
            names = " ".join(name for name, on in looks.items() if on)
            look = f' class="{names}"' if names else ""
            length = cell_len(said) * CELL
            found.append(
                f'<text x="{(run_x + lead) * CELL:g}" y="{FONT - 0.5:g}" textLength="{length:g}" '
                f'lengthAdjust="spacingAndGlyphs" fill="{_hex(ink)}"{look}>{escape(said)}</text>'
            )
        run = ""

    for start, stop, cells in split_graphemes(text)[0]:
        sign = text[start:stop]
        if sign in _SHAPES or sign in _CORNERS or sign in "┼├┤┬┴":
            end()
            found.append(_shape(sign, x, ink))
        else:
            if not run or cells != run_width or (sign == run[-1] == " "):  # not every viewer keeps two spaces
                end()
                run_x, run_width = x, cells
            run += sign
        x += cells
    end()
    return "".join(found)


def _shape(sign: str, x: int, ink: tuple[int, int, int]) -> str:
    if sign in _CORNERS:
        (ax, ay), (bx, by) = _CORNERS[sign]
        return (
            f'<path d="M{(x + ax) * CELL:g} {ay * ROW:g}Q{(x + 0.5) * CELL:g} {0.5 * ROW:g} '
            f'{(x + bx) * CELL:g} {by * ROW:g}" fill="none" stroke="{_hex(ink)}"/>'
        )
    if sign in "┼├┤┬┴":
        across = (0.5 if sign == "├" else 0, 0.47, 0.5 if sign in "├┤" else 1, 0.06)
        down = (0.44, 0.5 if sign == "┬" else 0, 0.12, 0.5 if sign in "┬┴" else 1)
        return _rect(x, across, ink) + _rect(x, down, ink)
    return _rect(x, _SHAPES[sign], ink)


def _rect(x: float, shape: tuple[float, float, float, float], color: tuple[int, int, int]) -> str:
    left, top, width, height = shape
    return (
        f'<rect x="{(x + left) * CELL:.2f}" y="{top * ROW:.2f}" width="{width * CELL:.2f}" '
        f'height="{height * ROW:.2f}" fill="{_hex(color)}"/>'
    )


def _rgb(color: str) -> tuple[int, int, int]:
    """ "#rrggbb", or the dark ground for a theme that leaves it to the terminal."""
    return (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)) if color else (20, 22, 27)


def _hex(color: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


def _colors(style: Style, ground: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(ink, paper)."""

    def real(color: Color | None, other: tuple[int, int, int], foreground: bool) -> tuple[int, int, int]:
        return tuple(color.get_truecolor(_THEME, foreground)) if color is not None and not color.is_default else other

    ink, paper = real(style.color, _INK, True), real(style.bgcolor, ground, False)
    if style.reverse:
        ink, paper = paper, ink
    return (tuple(blend_rgb(ink, paper, 0.5)) if style.dim else ink), paper
