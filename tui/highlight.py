"""Colours for code: Pygments' tokens in the palette's few colours. A language it does not know stays plain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rich.style import Style

from glmchat.tui.theme import Palette
from glmchat.tui.wrapping import Span

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


@lru_cache(maxsize=64)
def _lexer(language: str) -> Any | None:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False, stripall=False)
    except ClassNotFound:
        return None


@lru_cache(maxsize=512)
def _kind(token: str) -> str:
    return next((kind for prefix, kind in _KINDS if token.startswith(prefix)), "name")


def code_language(info: str) -> str:
    """The language named by a fence's info string: "python title=x" -> "python"; "{.c++}" -> "c++"."""
    word = info.split()[0] if info.split() else ""
    return word.strip("{}.,").split(":")[0][:20]


def highlight(lines: Sequence[str], before: Sequence[str], language: str, palette: Palette) -> list[list[Span]]:
    """Spans of each line. `before` are the lines above, read so that an open string or comment is still one."""
    base = palette.code
    lexer = _lexer(language.lower()) if language else None
    if lexer is None or any(len(line) > _MAX_LINE for line in lines):
        return [[(line, base)] for line in lines]
    styles: dict[str, Style] = {}
    found: list[list[Span]] = [[]]
    for token, value in lexer.get_tokens("\n".join([*before, *lines])):
        kind = _kind(str(token))
        style = styles.get(kind)
        if style is None:
            style = styles[kind] = palette.style(
                palette.syntax[kind],
                palette.code_background,
                italic=kind == "comment",
                bold=kind == "keyword" and not palette.background,
            )
        first, *rest = value.split("\n")
        if first:
            found[-1].append((first, style))
        for part in rest:
            found.append([(part, style)] if part else [])
    found = found[len(before) : len(before) + len(lines)]
    return found + [[(line, base)] for line in lines[len(found) :]]
