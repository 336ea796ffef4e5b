"""Colours: one restrained palette per theme, and Textual's themes made from it.

The transcript draws strips itself, so its styles are Rich styles; everything else is styled by `glmchat.tcss`
through the theme's variables. Both come from the same `Palette`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property

from rich.console import Console
from rich.style import Style
from textual.color import BLACK, WHITE, Color
from textual.theme import BUILTIN_THEMES, Theme

from glmchat.core import locations
from glmchat.core.errors import GlmchatError
from glmchat.core.files import read_text
from glmchat.core.settings import THEMES

# Of one colour: a letter in another would become a block of it, and a ground in another its letters.
TURNED = Style(color="default", bgcolor="default", reverse=True)


@dataclass(frozen=True, eq=False)
class Palette:
    """Colours as Rich and CSS both read them: "#rrggbb". An empty string leaves the terminal's own colour.

    `rules` draws code blocks with a line at their left, for terminals in which backgrounds say nothing.
    """

    name: str
    dark: bool
    background: str = ""
    surface: str = ""  # behind a question
    code_background: str = ""
    border: str = ""
    text: str = ""
    muted: str = ""
    faint: str = ""
    accent: str = ""  # the answer, focus, links
    user: str = ""  # the question
    warning: str = ""
    error: str = ""
    success: str = ""
    selection: str = ""
    hit: str = ""
    hit_text: str = ""
    syntax: Mapping[str, str] = field(default_factory=dict)  # kind of token -> colour
    rules: bool = False

    def style(
        self, color: str = "", background: str = "", *, bold: bool = False, dim: bool = False, italic: bool = False
    ) -> Style:
        return Style(
            color=color or None,
            bgcolor=(background or self.background) or None,
            bold=bold or None,
            dim=dim or None,
            italic=italic or None,
        )

    def ink(self, kind: str) -> str:
        """The colour of a kind of token in code."""
        return self.syntax.get(kind, "")

    @cached_property
    def body(self) -> Style:
        return self.style(self.text)

    @cached_property
    def quiet(self) -> Style:
        return self.style(self.muted, dim=not self.muted)

    @cached_property
    def faded(self) -> Style:
        return self.style(self.faint, dim=not self.faint)

    @cached_property
    def strong(self) -> Style:
        return self.style(self.text, bold=True)

    @cached_property
    def accented(self) -> Style:
        return self.style(self.accent, bold=True)

    @cached_property
    def question(self) -> Style:
        return self.style(self.text, self.surface)

    @cached_property
    def question_bar(self) -> Style:
        return self.style(self.user, self.surface, bold=not self.user)

    @cached_property
    def code(self) -> Style:
        return self.style(self.text, self.code_background)

    @cached_property
    def code_label(self) -> Style:
        return self.style(self.muted, self.code_background, dim=not self.muted)

    @cached_property
    def selected(self) -> Style:
        return Style(bgcolor=self.selection) if self.selection else TURNED

    @cached_property
    def hit_style(self) -> Style:
        if not self.hit:
            return Style(reverse=True, bold=True)
        return Style(color=self.hit_text, bgcolor=self.hit, bold=True)


_DARK = Palette(
    name="dark",
    dark=True,
    background="#14161b",
    surface="#1e222a",
    code_background="#1a1d24",
    border="#313743",
    text="#d9dde5",
    muted="#8d95a5",
    faint="#565e6e",
    accent="#7cc4b0",
    user="#e2b07a",
    warning="#e5c07b",
    error="#e58a86",
    success="#93c98a",
    selection="#34465c",
    hit="#e2b07a",
    hit_text="#14161b",
    syntax={
        "keyword": "#c49be0",
        "string": "#a3c98f",
        "number": "#e2b07a",
        "comment": "#6d7686",
        "function": "#82b1e8",
        "class": "#e5cf8f",
        "operator": "#a9b1c1",
        "name": "#d9dde5",
        "builtin": "#7cc4b0",
        "inserted": "#93c98a",
        "deleted": "#e58a86",
        "heading": "#82b1e8",
    },
)

_LIGHT = Palette(
    name="light",
    dark=False,
    background="#fcfbf8",
    surface="#f1eee6",
    code_background="#f4f2ec",
    border="#d8d3c7",
    text="#24272d",
    muted="#666b75",
    faint="#a7a59d",
    accent="#0b7566",
    user="#98520f",
    warning="#8a6100",
    error="#b3312b",
    success="#2f7a34",
    selection="#cfe0ee",
    hit="#f4d58a",
    hit_text="#24272d",
    syntax={
        "keyword": "#7d3fa8",
        "string": "#3c7a2a",
        "number": "#98520f",
        "comment": "#6f736a",
        "function": "#1f5fb0",
        "class": "#8a6100",
        "operator": "#555b66",
        "name": "#24272d",
        "builtin": "#0b7566",
        "inserted": "#2f7a34",
        "deleted": "#b3312b",
        "heading": "#1f5fb0",
    },
)

_CONTRAST = Palette(
    name="contrast",
    dark=True,
    background="#000000",
    surface="#1c1c1c",
    code_background="#121212",
    border="#ffffff",
    text="#ffffff",
    muted="#e4e4e4",
    faint="#b2b2b2",
    accent="#5fffd7",
    user="#ffd75f",
    warning="#ffff5f",
    error="#ff8787",
    success="#87ff87",
    selection="#005faf",
    hit="#ffff00",
    hit_text="#000000",
    syntax={
        "keyword": "#ffafff",
        "string": "#afff87",
        "number": "#ffd75f",
        "comment": "#c6c6c6",
        "function": "#87d7ff",
        "class": "#ffff87",
        "operator": "#ffffff",
        "name": "#ffffff",
        "builtin": "#5fffd7",
        "inserted": "#87ff87",
        "deleted": "#ff8787",
        "heading": "#87d7ff",
    },
    rules=True,
)

# The terminal's own sixteen colours: whatever scheme the user has chosen stays theirs.
_ANSI = Palette(
    name="ansi",
    dark=True,
    border="bright_black",
    faint="bright_black",
    accent="cyan",
    user="yellow",
    warning="yellow",
    error="red",
    success="green",
    syntax={
        "keyword": "magenta",
        "string": "green",
        "number": "yellow",
        "comment": "bright_black",
        "function": "blue",
        "class": "yellow",
        "builtin": "cyan",
        "inserted": "green",
        "deleted": "red",
        "heading": "blue",
    },
    rules=True,
)

_PLAIN = Palette("plain", dark=True, rules=True)


def _luminance(color: Color) -> float:
    parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in color.normalized]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def _readable(color: Color, grounds: Iterable[Color], ratio: float) -> str:
    """The colour, moved towards white or black until its contrast (WCAG 2) is `ratio` on all grounds."""
    lights = [_luminance(ground) for ground in grounds]
    end = WHITE if max(lights) < 0.2 else BLACK
    for step in range(20):
        ink = color.blend(end, step / 20)
        light = _luminance(ink)
        if all((max(light, one) + 0.05) / (min(light, one) + 0.05) >= ratio for one in lights):
            return ink.hex6.lower()
    return end.hex6.lower()


def _scheme(name: str) -> Palette:
    """A scheme that people know, as Textual ships it, in inks that can be read."""
    theme = BUILTIN_THEMES[name]
    background, surface, text = (Color.parse(c or "") for c in (theme.background, theme.surface, theme.foreground))
    code = background.blend(surface, 0.5)
    grounds = (background, surface, code)
    primary, second, third, yellow, red, green = (
        _readable(Color.parse(c or theme.primary), grounds, 4.5)
        for c in (theme.primary, theme.secondary, theme.accent, theme.warning, theme.error, theme.success)
    )
    body, muted = _readable(text, grounds, 7), _readable(text.blend(background, 0.35), grounds, 4.5)
    return Palette(
        name, theme.dark, background.hex6.lower(), surface.hex6.lower(), code.hex6.lower(),
        border=background.blend(text, 0.25).hex6.lower(), text=body, muted=muted,
        faint=background.blend(text, 0.45).hex6.lower(), accent=primary, user=third, warning=yellow, error=red,
        success=green, selection=background.blend(Color.parse(theme.primary), 0.3).hex6.lower(), hit=yellow,
        hit_text=background.hex6.lower(),
        syntax={
            "keyword": third, "string": green, "number": yellow, "comment": muted, "function": primary,
            "class": yellow, "operator": body, "name": body, "builtin": second, "inserted": green, "deleted": red,
            "heading": primary,
        },
    )  # fmt: skip


_SCHEMES = (_scheme(name) for name in THEMES if name in BUILTIN_THEMES)
PALETTES: Mapping[str, Palette] = {p.name: p for p in (_DARK, _LIGHT, _CONTRAST, _ANSI, *_SCHEMES, _PLAIN)}
COLORS = ("truecolor", "256", "standard")  # how many a terminal shows, in Rich's words


def palette_in(name: str, colors: str | None) -> Palette:
    """The theme for a terminal of so many colours.

    Of 256 surfaces are greys: the nearest colours to a dark tint are pure black and a loud teal. Of sixteen none is
    left for what is chosen, which is reversed.
    """
    palette = PALETTES[name]
    if not palette.background or colors == "truecolor":
        return palette
    if colors != "256":
        return replace(palette, selection="", hit="", rules=True)
    light = round(Color.parse(palette.background).brightness * 255)
    surface, code, chosen = (light + (step if palette.dark else -step) for step in (18, 9, 48))
    return replace(
        palette, background=_grey(light), surface=_grey(surface), code_background=_grey(code), selection=_grey(chosen)
    )


def _grey(light: int) -> str:
    """The nearest grey of the 256 colours: black, white, or one of a ramp of 24, ten apart, from 8 to 238."""
    level = 8 + 10 * round((light - 8) / 10)
    level = 0 if light < 4 else 255 if light > 246 else min(level, 238)
    return f"#{level:02x}{level:02x}{level:02x}"


def colors_of(environ: Mapping[str, str] | None = None) -> str | None:
    """One of COLORS; None where a terminal shows none at all."""
    return Console(force_terminal=True, _environ=os.environ if environ is None else environ).color_system


def choose_theme(setting: str | None, environ: Mapping[str, str] | None = None) -> str:
    """The theme to start with: NO_COLOR wins, then the setting, then what the terminal says of itself.

    Where colours are few it is the terminal's own sixteen; then the last one that was chosen; then its background
    decides.
    """
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return "plain"
    if setting in THEMES:
        return str(setting)
    if colors_of(environ) not in ("truecolor", "256"):
        return "ansi"
    if (last := remembered_theme()) is not None:
        return last
    # rxvt, Konsole and others: "15;0" is white on black. 7 and 15 are the light backgrounds.
    background = environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", "15") else "dark"


def remember_theme(name: str) -> None:
    """For the next starts. A disk that takes nothing costs only that."""
    from glmchat.hub.store import write_whole

    with suppress(OSError, GlmchatError):
        write_whole(locations.private_dir(locations.state_dir()) / "theme", name.encode())


def remembered_theme() -> str | None:
    with suppress(OSError, UnicodeDecodeError, GlmchatError):
        name = read_text(locations.state_dir() / "theme").strip()
        return name if name in THEMES else None
    return None


def textual_theme(p: Palette) -> Theme:
    """Textual's theme of a palette, named "glmchat-<palette>"."""
    ansi = not p.background
    selection = p.selection or p.text  # reversed, where no colour is left for it

    def css(color: str, fallback: str) -> str:
        return color if color.startswith("#") else f"ansi_{color or fallback}"

    return Theme(
        name=f"glmchat-{p.name}",
        dark=p.dark,
        ansi=ansi,
        primary=css(p.accent, "default"),
        secondary=css(p.user, "default"),
        accent=css(p.accent, "default"),
        warning=css(p.warning, "default"),
        error=css(p.error, "default"),
        success=css(p.success, "default"),
        foreground=css(p.text, "default"),
        background=css(p.background, "default"),
        surface=css(p.background, "default"),
        panel=css(p.surface, "default"),
        boost=css(p.surface, "default"),
        variables={
            "ansi-background": "ansi_default" if ansi else "transparent",  # Textual's own style sheet reads it
            "chat-border": css(p.border, "default"),
            "chat-muted": css(p.muted, "default"),
            "chat-faint": css(p.faint, "default"),
            "chat-surface": css(p.surface, "default"),
            "chat-user": css(p.user, "default"),
            "chat-accent": css(p.accent, "default"),
            "chat-selection": css(selection, "bright_black"),
            "chat-selected": css(p.background if selection == p.text else p.text, "default"),
            "scrollbar": css(p.border, "bright_black"),
            "scrollbar-hover": css(p.muted, "default"),
            "scrollbar-active": css(p.accent, "default"),
            "scrollbar-background": css(p.background, "default"),
            "scrollbar-background-hover": css(p.background, "default"),
            "scrollbar-background-active": css(p.background, "default"),
            "scrollbar-corner-color": css(p.background, "default"),
            "input-selection-background": css(selection, "bright_black"),
            "input-selection-foreground": css(p.background if selection == p.text else p.text, "default"),
        },
    )
