"""Colours: one restrained palette per theme, and Textual's themes made from it.

The transcript draws strips itself, so its styles are Rich styles; everything else is styled by `glmchat.tcss`
through the theme's variables. Both come from the same `Palette`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rich.style import Style
from textual.theme import Theme


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
        if not self.selection:
            return Style(reverse=True)
        return Style(bgcolor=self.selection)

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

PALETTES: Mapping[str, Palette] = {p.name: p for p in (_DARK, _LIGHT, _CONTRAST, _ANSI, _PLAIN)}
THEME_NAMES = ("dark", "light", "contrast", "ansi")


def choose_theme(setting: str | None, environ: Mapping[str, str] | None = None) -> str:
    """The theme to start with: NO_COLOR wins, then the setting, then what the terminal says of its background."""
    environ = os.environ if environ is None else environ
    if environ.get("NO_COLOR"):
        return "plain"
    if setting in THEME_NAMES:
        return str(setting)
    # rxvt, Konsole and others: "15;0" is white on black. 7 and 15 are the light backgrounds.
    background = environ.get("COLORFGBG", "").rpartition(";")[2]
    return "light" if background in ("7", "15") else "dark"


def textual_themes() -> list[Theme]:
    """One Textual theme for each palette, named "glmchat-<palette>"."""
    return [_textual_theme(palette) for palette in PALETTES.values()]


def _textual_theme(p: Palette) -> Theme:
    ansi = not p.background

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
            "chat-selection": css(p.selection, "bright_black"),
            "scrollbar": css(p.border, "bright_black"),
            "scrollbar-hover": css(p.muted, "default"),
            "scrollbar-active": css(p.accent, "default"),
            "scrollbar-background": css(p.background, "default"),
            "scrollbar-background-hover": css(p.background, "default"),
            "scrollbar-background-active": css(p.background, "default"),
            "scrollbar-corner-color": css(p.background, "default"),
            "input-selection-background": css(p.selection, "bright_black"),
        },
    )
