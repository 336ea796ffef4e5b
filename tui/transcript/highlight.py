"""Colours for code: Pygments' tokens in the palette's few colours. A language it does not know stays plain."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from rich.style import Style

from glmchat.tui.theme import Palette
from glmchat.tui.transcript.wrapping import Span

# The first prefix that matches a token's dotted name wins.
_KINDS: tuple[tuple[str, str], ...] = (
    ("Token.Comment.Preproc", "keyword"),
    ("Token.Comment", "comment"),
    ("Token.Keyword.Constant", "number"),
    ("Token.Keyword.Type", "class"),
    ("Token.Keyword", "keyword"),
    ("Token.Operator.Word", "keyword"),
    ("Token.Operator", "operator"),
    ("Token.Punctuation", "operator"),
    ("Token.Literal.String", "string"),
    ("Token.Literal.Number", "number"),
    ("Token.Name.Function", "function"),
    ("Token.Name.Class", "class"),
    ("Token.Name.Exception", "class"),
    ("Token.Name.Decorator", "function"),
    ("Token.Name.Builtin", "builtin"),
    ("Token.Name.Tag", "keyword"),
    ("Token.Name.Attribute", "function"),
    ("Token.Generic.Inserted", "inserted"),
    ("Token.Generic.Deleted", "deleted"),
    ("Token.Generic.Heading", "heading"),
    ("Token.Generic.Subheading", "heading"),
    ("Token.Generic.Prompt", "comment"),
)
_MAX_LINE = 2_000  # a longer line is data, and some lexers are not linear in it
_OVERLAP = 8  # lines that are read twice where code grows


class _Read(NamedTuple):
    """What was highlighted lately. Code that streams in begins with it, line for line."""

    language: str
    palette: Palette
    lines: list[str]
    spans: list[list[Span]]


_lately: deque[_Read] = deque(maxlen=4)  # as many answers stream side by side in a comparison


@lru_cache(maxsize=64)
def _lexer(language: str) -> Any | None:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False, stripall=False)
    except ClassNotFound:
        return None


@lru_cache(maxsize=512)
def _kind(token: Any) -> str:
    name = str(token)
    return next((kind for prefix, kind in _KINDS if name.startswith(prefix)), "name")


def code_language(info: str) -> str:
    """The language named by a fence's info string: "python title=x" -> "python"; "{.c++}" -> "c++"."""
    word = info.split()[0] if info.split() else ""
    return word.strip("{}.,").split(":")[0][:20]


def highlight(
    lines: Sequence[str], before: Sequence[str], language: str, palette: Palette, *, growing: bool = False
) -> list[list[Span]]:
    """Spans of each line. `before` are the lines above, read so that an open string or comment is still one.

    growing: more lines will follow, and these will be highlighted again: what was read lately is taken as it is.
    """
    language = language.lower()
    lexer = _lexer(language) if language else None
    if lexer is None or any(len(line) > _MAX_LINE for line in lines):
        return [[(line, palette.code)] for line in lines]
    whole = [*before, *lines]
    spans = _grown(whole, len(before), lexer, language, palette) if growing else None
    spans = spans or _read(lexer, whole, palette)
    _lately.append(_Read(language, palette, whole, spans))
    return spans[len(before) :]


def _grown(whole: list[str], before: int, lexer: Any, language: str, palette: Palette) -> list[list[Span]] | None:
    """The spans of code that was highlighted a moment ago and has grown at its end; None if it must be read anew.

    Only its end is read: if the last known lines, read by themselves, look as they did with all that stands above
    them, what follows does too. They do not inside a long string or comment, or in one language within another.
    """
    for code in reversed(_lately):
        if code.language != language or code.palette is not palette:
            continue
        for start in {0, max(0, len(code.lines) - before)}:  # the same part of a block, or the one after it
            same = code.lines[start:-1]  # the last line may have been half a line
            if len(same) <= _OVERLAP or whole[: len(same)] != same:
                continue
            overlap = len(same) - _OVERLAP
            earlier = code.spans[start : start + len(same)]
            end = _read(lexer, whole[overlap:], palette)
            if any(earlier[overlap:]) and end[:_OVERLAP] == earlier[overlap:]:
                return earlier + end[_OVERLAP:]
    return None


def _read(lexer: Any, lines: Sequence[str], palette: Palette) -> list[list[Span]]:
    styles: dict[str, Style] = {}
    spans: list[list[Span]] = [[]]
    for token, value in lexer.get_tokens("\n".join(lines)):
        kind = _kind(token)
        style = styles.get(kind)
        if style is None:
            style = styles[kind] = palette.style(
                palette.ink(kind),
                palette.code_background,
                italic=kind == "comment",
                bold=kind == "keyword" and not palette.background,
            )
        first, *rest = value.split("\n")
        if first:
            spans[-1].append((first, style))
        for part in rest:
            spans.append([(part, style)] if part else [])
    del spans[len(lines) :]
    return spans + [[(line, palette.code)] for line in lines[len(spans) :]]
