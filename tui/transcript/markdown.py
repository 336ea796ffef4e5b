"""One block of Markdown to lines of styled cells. Nothing from the text is obeyed: no Rich markup, no HTML, no control.

markdown-it reads the block's inside; the drawing is ours, because wrapping Chinese, copying without decoration and
clicking need to know what each cell stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style

from glmchat.core.language import tr
from glmchat.tui.theme import Palette
from glmchat.tui.transcript.blocks import Block, BlockSplitter
from glmchat.tui.transcript.highlight import code_language, highlight
from glmchat.tui.transcript.tables import table_lines
from glmchat.tui.transcript.wrapping import Line, Span, blanks, rows, slices, spread_tabs

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

_BULLETS = ("•", "◦", "▪")
_URL = re.compile(r"https?://[^\s<>\"'`|，。！？；：、）】》]*[^\s<>\"'`|，。！？；：、）】》.,;:!?)\]}]")
_FORMULAS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$"}
_FORMULA_LIMIT = 4_000  # characters; without a limit many opening signs would cost a search of the whole block each
_CLICKABLE = ("http://", "https://", "mailto:")


@lru_cache(maxsize=1)
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.inline.ruler.before("escape", "formula", _formula)
    return parser


def _formula(state: StateInline, silent: bool) -> bool:
    """An inline rule: a formula between its signs is one token of the text as it stands, so Markdown takes nothing."""
    start, text = state.pos, state.src
    closing = _FORMULAS.get(text[start : start + 2])
    if closing is not None:
        at = text.find(closing, start + 2, min(state.posMax, start + _FORMULA_LIMIT))
        end = at + 2 if at >= 0 else -1
    else:
        end = _dollar_end(text, start, min(state.posMax, start + _FORMULA_LIMIT))
    if end < 0:
        return False
    if not silent:
        state.push("formula", "", 0).content = text[start:end]
    state.pos = end
    return True


def _dollar_end(text: str, start: int, limit: int) -> int:
    """Behind `$x$`, or -1. By Pandoc's rule no blanks inside the signs and no digit behind them: prices are prose."""
    if text[start] != "$" or text[start + 1 : start + 2].isspace() or text[start - 1 : start].isdigit():
        return -1
    at = text.find("$", start + 1, limit)
    while at > 0 and text[at - 1] == "\\":
        at = text.find("$", at + 1, limit)
    if at <= start + 1 or text[at - 1].isspace() or text[at + 1 : at + 2].isdigit() or "\n" in text[start:at]:
        return -1
    return at + 1


def codes(block: Block) -> list[list[str]]:
    """The lines of each piece of code in a block, in order: what drawing it frames, without indentation and fences."""
    if block.kind == "code":
        return [block.lines]
    if block.kind not in ("text", "item", "quote"):
        return []
    tokens = _parser().parse(block.text)
    return [_lines(token) for token in tokens if token.type in ("fence", "code_block")]


def code_blocks(text: str) -> list[str]:
    """The code of every block of code in a text, each whole."""
    splitter = BlockSplitter()
    splitter.feed(text)
    splitter.close()
    blocks: list[list[str]] = []
    for block in splitter.blocks:
        if block.kind == "code" and block.part:
            blocks[-1] = blocks[-1] + block.lines
        else:
            blocks += codes(block)
    return ["\n".join(lines) for lines in blocks]


def _lines(token: Token) -> list[str]:
    return token.content.removesuffix("\n").split("\n")


def draw(block: Block, width: int, palette: Palette) -> list[Line]:
    """The lines of one block, `width` cells wide at most."""
    match block.kind:
        case "code":
            return list(_code_block(block, width, palette))
        case "math":
            ink = palette.style(palette.ink("number"))
            return [line.after(Segment("  ", ink), "") for line in text_lines(block.text, width - 2, ink)]
        case "table":
            return table_lines(block, width, palette, inline_spans)
        case "rule":
            return [Line([Segment("─" * width, palette.style(palette.border or palette.faint))], width, "")]
        case "plain":
            return text_lines(block.text, width, palette.body)
        case _:
            return _Drawing(width, palette, block.number).draw(_parser().parse(block.text))


def text_lines(text: str, width: int, style: Style, *, words: bool = True) -> list[Line]:
    """Text as it is, wrapped."""
    return _wrapped([(text, style)], width, words=words)


def _wrapped(spans: Sequence[Span], width: int, *, words: bool = True) -> list[Line]:
    text = spread_tabs("".join(span[0] for span in spans))
    if len(text) > sum(len(span[0]) for span in spans):
        spans = _spread(spans)
    wrapped = rows(text, width, words=words)
    return [
        Line(segments, 0, text[row.start : row.end], row.joint)
        for row, segments in zip(wrapped, slices(spans, wrapped), strict=True)
    ]


def _spread(spans: Sequence[Span]) -> list[Span]:
    """The same with tabs as the cells that they take."""
    result: list[Span] = []
    before = ""  # on the same line
    for text, style in spans:
        result.append((spread_tabs(text, cell_len(before)), style))
        before = (before + result[-1][0]).rpartition("\n")[2]
    return result


def _code_block(block: Block, width: int, palette: Palette, number: int = 0) -> Iterator[Line]:
    """Background, a label with the language, a bar at the left where backgrounds say nothing.

    number: which of the `codes` of its block this is, for a click on "copy".
    """
    language = code_language(block.info)
    base, label_style = palette.code, palette.code_label
    bar = "│ " if palette.rules else "  "
    bar_style = palette.style(palette.border, palette.code_background)
    inner = max(1, width - 3)
    if not block.part:
        label = language or "text"
        copy = tr("copy")
        room = width - 2 - cell_len(label) - cell_len(copy) - 1
        if room >= 2:
            segments = [Segment(bar, bar_style), Segment(label + " " * room + copy + " ", label_style)]
            yield Line(segments, width, "", "", "", (width - cell_len(copy) - 2, width, "copy-code", str(number)))
        else:
            yield Line(
                [Segment(bar, bar_style), Segment(label[: width - 2].ljust(width - 2), label_style)], width, "", ""
            )
    lines = [spread_tabs(line) for line in block.lines]
    before = [blanks(spread_tabs(line)) for line in block.before]
    drawn = highlight([blanks(line) for line in lines], before, language, palette, growing=block.growing)
    for text, spans in zip(lines, drawn, strict=True):
        wrapped = rows(text, inner, words=False)
        for row, segments in zip(wrapped, slices(spans, wrapped), strict=True):
            fill = " " * (width - 2 - sum(segment.cell_length for segment in segments))
            yield Line(
                [Segment(bar, bar_style), *segments, Segment(fill, base)], 2, text[row.start : row.end], row.joint
            )
    if block.last and not palette.rules:
        edge = Style(color=palette.code_background or None, bgcolor=palette.background or None)
        yield Line([Segment("▀" * width, edge)], width, "", "")


def inline_spans(text: str, palette: Palette, base: Style) -> list[Span]:
    """Emphasis, code and links of one line of Markdown (a table's cell)."""
    tokens = _parser().parseInline(text.replace("\t", " "))
    return [span for token in tokens for span in _inline(token.children or [], palette, base)]


def _inline(tokens: Sequence[Token], palette: Palette, base: Style) -> list[Span]:
    spans: list[Span] = []
    styles = [base]
    target = shown = ""
    for token in tokens:
        style = styles[-1]
        match token.type:
            case "text":
                spans.extend([(token.content, style)] if target else _bare_links(token.content, palette, style))
                shown += token.content
            case "code_inline":
                ink = palette.style(
                    palette.ink("builtin"),
                    palette.code_background,
                    bold=not palette.text and not palette.background,
                )
                spans.append((token.content, style + ink))
                shown += token.content
            case "softbreak" | "hardbreak":
                spans.append(("\n", style))  # models break lines where they mean it: a soft break stays one too
            case "strong_open":
                styles.append(style + Style(bold=True))
            case "em_open":
                styles.append(style + Style(italic=True))
            case "s_open":
                styles.append(style + Style(strike=True))
            case "link_open":
                target, shown = str(token.attrs.get("href", "")), ""
                link = target if target.lower().startswith(_CLICKABLE) else None
                styles.append(style + Style(color=palette.accent or None, underline=True, link=link))
            case "link_close":
                styles.pop()
                if target and target not in (shown, f"mailto:{shown}", f"{shown}/"):
                    spans.append(
                        (f" ({target})", styles[-1] + Style(color=palette.muted or None, dim=not palette.muted))
                    )
                target = ""
            case "strong_close" | "em_close" | "s_close":
                styles.pop()
            case "image":
                ink = style + Style(color=palette.muted or None)
                spans.append((f"[{token.content or 'image'}] ({token.attrs.get('src', '')})", ink))
            case _:
                spans.append((token.content, style))
    return spans


def _bare_links(text: str, palette: Palette, style: Style) -> Iterator[Span]:
    position = 0
    for match in _URL.finditer(text):
        if match.start() > position:
            yield text[position : match.start()], style
        yield match.group(), style + Style(color=palette.accent or None, underline=True, link=match.group())
        position = match.end()
    if position < len(text):
        yield text[position:], style


class _Drawing:
    """Walks markdown-it's tokens of one block; lists and quotes nest by indenting what is drawn inside."""

    def __init__(self, width: int, palette: Palette, number: int) -> None:
        self.width = width
        self.palette = palette
        self.number = number  # what the outermost ordered item is called
        self._codes = 0  # drawn so far

    def draw(self, tokens: Sequence[Token]) -> list[Line]:
        return self._blocks(tokens, self.width, 0)

    def _blocks(self, tokens: Sequence[Token], width: int, depth: int) -> list[Line]:
        lines: list[Line] = []
        index = 0
        tight = False
        while index < len(tokens):
            token = tokens[index]
            end = _closing(tokens, index)
            inside = tokens[index + 1 : end]
            drawn: list[Line] = []
            match token.type:
                case "paragraph_open":
                    drawn = self._paragraph(inside[0], width, self.palette.body)
                    tight = token.hidden
                case "heading_open":
                    drawn = self._heading(inside[0], token.tag, width)
                case "bullet_list_open" | "ordered_list_open":
                    drawn = self._list(token, inside, width, depth)
                    if lines and tight:
                        lines.extend(drawn)
                        drawn = []
                case "blockquote_open":
                    bar = Segment("▎ ", self.palette.style(self.palette.accent))
                    inner = self._blocks(inside, max(1, width - 2), depth)
                    drawn = [line.after(bar, "> ") for line in inner]
                case "fence" | "code_block":
                    block = Block("code", _lines(token), info=token.info.strip(), last=True)
                    drawn = list(_code_block(block, width, self.palette, self._codes))
                    self._codes += 1
                case "table_open":
                    drawn = self._table(inside, width)
                case "hr":
                    drawn = draw(Block("rule"), width, self.palette)
                case _:
                    if token.content:
                        drawn = text_lines(token.content, width, self.palette.body)
            if drawn:
                if lines:
                    lines.append(Line([], 0, ""))
                lines.extend(drawn)
            index = end + 1
        return lines

    def _paragraph(self, token: Token, width: int, style: Style) -> list[Line]:
        return _wrapped(_inline(token.children or [], self.palette, style), width)

    def _heading(self, token: Token, tag: str, width: int) -> list[Line]:
        style = self.palette.accented if tag in ("h1", "h2") else self.palette.strong
        if tag == "h1":
            style = style + Style(underline=not self.palette.accent)
        return self._paragraph(token, width, style)

    def _list(self, opening: Token, tokens: Sequence[Token], width: int, depth: int) -> list[Line]:
        ordered = opening.type == "ordered_list_open"
        number = int(opening.attrs.get("start", 1) or 0) if ordered else 0
        if ordered and depth == 0 and self.number:
            number = self.number
        lines: list[Line] = []
        index = 0
        loose = any(t.type == "paragraph_open" and not t.hidden and t.level == opening.level + 2 for t in tokens)
        marker_width = (
            len(str(number + sum(t.type == "list_item_open" and t.level == opening.level + 1 for t in tokens) - 1)) + 1
        )
        while index < len(tokens):
            end = _closing(tokens, index)
            marker = f"{number}.".rjust(marker_width) if ordered else _BULLETS[min(depth, len(_BULLETS) - 1)]
            number += 1
            head = marker + " "
            indent = len(head)
            inner = self._blocks(tokens[index + 1 : end], max(4, width - indent), depth + 1) or [Line([], 0, "")]
            if lines and loose:
                lines.append(Line([], 0, ""))
            first, *rest = _checkbox(inner)
            ink = self.palette.style(self.palette.accent)
            lines.append(first.after(Segment(head, ink), f"{marker.strip()} " if ordered else "- "))
            lines.extend(line.after(Segment(" " * indent, self.palette.body), " " * indent) for line in rest)
            index = end + 1
        return lines

    def _table(self, tokens: Sequence[Token], width: int) -> list[Line]:
        """A table inside a list or a quote: its rows are read back from the tokens."""
        table: list[str] = []
        row: list[str] = []
        for token in tokens:
            if token.type == "inline":
                row.append(token.content.replace("|", "\\|"))
            elif token.type in ("th_close", "td_close") and len(row) == 0:
                row.append("")
            elif token.type == "tr_close":
                table.append("| " + " | ".join(row) + " |")
                if len(table) == 1:
                    table.append("|" + "---|" * len(row))
                row = []
        return table_lines(Block("table", table, last=True), width, self.palette, inline_spans)


def _checkbox(lines: list[Line]) -> list[Line]:
    """ "[x] done" of a task list becomes a drawn box; copied it is what was written."""
    first = lines[0]
    if (
        first.text[:4] in ("[ ] ", "[x] ", "[X] ")
        and first.segments
        and len(first.segments[0].text) >= 4
        and not first.lead
    ):
        head, *rest = first.segments
        box = Segment("☐ " if head.text[1] == " " else "☑ ", head.style)
        bare = Line([Segment(head.text[4:], head.style), *rest], 0, first.text[4:], first.joint, "", first.action)
        lines[0] = bare.after(box, first.text[:4])
    return lines


def _closing(tokens: Sequence[Token], index: int) -> int:
    """The index of the token that closes the one at `index` (itself, if nothing is opened)."""
    if tokens[index].nesting != 1:
        return index
    level = tokens[index].level
    for i in range(index + 1, len(tokens)):
        if tokens[i].level == level and tokens[i].nesting == -1:
            return i
    return len(tokens) - 1
