"""Drawing: exact widths, inert text, links whose target is seen, code that keeps its text.

Covers tui/transcript/tables.py, tui/transcript/highlight.py.
"""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin
from rich.cells import cell_len

from glmchat.tui.theme import PALETTES
from glmchat.tui.transcript.blocks import BlockSplitter
from glmchat.tui.transcript.highlight import highlight
from glmchat.tui.transcript.markdown import code_blocks, draw
from glmchat.tui.transcript.wrapping import Line

P = PALETTES["dark"]


def lines(text: str, width: int = 60, theme: str = "dark") -> list[Line]:
    splitter = BlockSplitter()
    splitter.feed(text)
    splitter.close()
    return [line for block in splitter.blocks for line in draw(block, width, PALETTES[theme])]


def shown(text: str, width: int = 60) -> str:
    return "\n".join("".join(s.text for s in line.segments).rstrip() for line in lines(text, width))


def links(text: str) -> set[str]:
    return {s.style.link for line in lines(text) for s in line.segments if s.style and s.style.link}


SAMPLE = """# Heading 标题
Text with `code`, **bold 粗体**, ~~gone~~ and <b>html</b>. 👨‍👩‍👧‍👦

- [x] done
- item
  1. nested 很长的中文列表项，需要换行才能显示完整
     ```python
     def f(): return "一个很长的字符串"  # comment
     ```
> quote [link](https://example.com/a)

| 名称 | value | long |
|:--|--:|:-:|
| 一 | 1 | a cell that has to be wrapped because it is long |

$$
x^2
$$
"""


@pytest.mark.parametrize("theme", list(PALETTES))
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 21, 40, 80, 200])
def test_no_line_is_wider_than_asked(width: int, theme: str) -> None:
    for line in lines(SAMPLE, width, theme):
        cells = sum(segment.cell_length for segment in line.segments)
        assert cells <= max(width, 12), (width, line)


@pytest.mark.parametrize("width", [24, 40, 80])
def test_text_begins_at_the_lead_of_its_line(width: int) -> None:
    for line in lines(SAMPLE, width):
        drawn = "".join(segment.text for segment in line.segments)
        if line.text and not line.action and "│" not in drawn and "─" not in drawn:
            head = ""
            while cell_len(head) < line.lead:
                head = drawn[: len(head) + 1]
            assert drawn[len(head) :].rstrip().startswith(line.text.rstrip()), line


def test_links_show_their_target_and_only_harmless_ones_can_be_clicked() -> None:
    text = (
        "[a](https://a.example/x) [b](javascript:alert) [c](file:///etc/passwd) [d](data:text/html,x)"
        " <mailto:me@b.example> [e](vscode://x)"
    )
    assert links(text) == {"https://a.example/x", "mailto:me@b.example"}
    assert "(https://a.example/x)" in shown(text, 200)
    assert "javascript:alert" in shown(text, 200)
    assert "(vscode://x)" in shown(text, 200)


def test_a_link_that_lies_about_its_target_is_seen_through() -> None:
    assert "(https://evil.example)" in shown("[https://good.example](https://evil.example)", 100)


def test_rich_markup_html_and_controls_are_inert() -> None:
    said = shown("[red]x[/red] [@click=app.quit]y[/] <script>z</script> \x1b]52;c;eA==\x07 \x1b[2J \u202edcba")
    assert "[red]x[/red]" in said and "[@click=app.quit]y[/]" in said and "<script>z</script>" in said
    assert "\x1b" not in said and "\x07" not in said and "\u202e" not in said
    assert "␛]52;c;eA==␇" in said


def test_code_keeps_every_character_and_names_its_language() -> None:
    code = "def f():\n    return '" + "x" * 100 + "'\n\n# 注释"
    drawn = lines(f"```python title=a\n{code}\n```", 40)
    assert "python" in drawn[0].segments[1].text and drawn[0].action is not None
    body = [line for line in drawn if line.lead == 2]
    joined = "".join(line.text + line.joint for line in body)
    assert joined == code + "\n"


def test_a_string_that_was_opened_in_an_earlier_part_is_still_a_string() -> None:
    splitter = BlockSplitter()
    splitter.feed("```python\nx = '''\n" + "if True:\n" * 100 + "'''\n```\n")
    splitter.close()
    second = splitter.blocks[1]
    colour = draw(second, 60, P)[0].segments[1].style
    assert colour is not None and colour.color is not None and colour.color.name == P.syntax["string"]


@pytest.mark.parametrize("language", ["python", "javascript", "c"])
def test_code_that_streams_in_gets_the_colours_of_code_that_is_there_at_once(language: str) -> None:
    """Whether only its end was read anew or, in a long comment or string, all of it."""
    palette = PALETTES["dark"]
    plain = [f"    total_{n} += value * 2  // plain" for n in range(40)]
    lines = [
        *plain,
        'x = """',
        *plain[:20],
        '"""',
        "<script>",
        *plain,
        "</script>",
        "/* a comment",
        *plain[:20],
        "*/",
        *plain,
    ]
    for end in range(1, len(lines) + 1):
        part = (end - 1) // 64 * 64  # as the splitter cuts them
        before = lines[max(0, part - 128) : part]
        grown = highlight(lines[part:end], before, language, palette, growing=True)
        if end % 5 == 0 or end > len(lines) - 20:
            whole = highlight(lines[part:end], before, language, palette)
            assert ["".join(text for text, _ in spans) for spans in grown] == lines[part:end]
            assert grown[-8:] == whole[-8:]
    assert highlight(lines[part:], before, language, palette) == whole


def test_all_parts_of_a_table_have_the_same_columns() -> None:
    splitter = BlockSplitter()
    splitter.feed("| a | b |\n|---|---|\n" + "| 1 | 22 |\n" * 200)
    splitter.close()
    drawn = [line for block in splitter.blocks for line in draw(block, 60, P)]
    assert len({sum(s.cell_length for s in line.segments) for line in drawn}) == 1
    assert len(drawn) == 202


def test_a_table_with_more_columns_than_cells_of_width_is_told_row_by_row() -> None:
    head = (
        "|"
        + "|".join(f"c{i}" for i in range(30))
        + "|\n|"
        + "---|" * 30
        + "\n|"
        + "|".join(str(i) for i in range(30))
        + "|\n"
    )
    assert "c29: 29" in shown(head, 40)


def test_numbers_of_a_list_line_up_and_go_on() -> None:
    said = shown("9. nine\n10. ten\n")
    assert "9. nine" in said and "10. ten" in said


@pytest.mark.parametrize(
    "text",
    [
        "1. Write this:\n\n   ```python\n   if x:\n       print(1)\n   ```\n\n2. Run:\n\n   ```sh\n   a.py\n   ```\n",
        "- a\n\n    ```\n    x\n\n    y\n    ```\n- b\n",
        "> a\n> ```\n> x\n>   y\n> ```\n",
        "10. z\n\n    ~~~py\n    q\n    ~~~\n",
        "- ```sh\n  ls\n  ```\n- x\n  - y\n    ```\n    deep\n      er\n    ```\n",
        "text\n\n    indented\n\n      more\n\nend\n\n\tt1\n\t\tt2\n",
        "- x\n\n      code in an item\n\n  after\n",
        "1. a\n   ````md\n   ```sh\n   ls\n   ```\n   ````\n   b\n",
        "1. a\n   ```\n" + "   x = 1\n\n" * 3000 + "   ```\n2. b\n",
        "```\nall:\n\tgcc a.c\n\n```\n",
        "no `code` here\n",
    ],
    ids=["steps", "bullets", "quote", "tildes", "nested", "indented", "deep", "in-four", "long", "tabs", "none"],
)
def test_code_is_handed_out_as_commonmark_reads_it_wherever_it_stands(text: str) -> None:
    tokens = MarkdownIt("commonmark").parse(text)
    code = [t.content.removesuffix("\n") for t in tokens if t.type in ("fence", "code_block")]
    assert code_blocks(text) == code


FORMULAS = [
    r"Let \(a_{1}*b*c\) and $\{x_1,\,x_2\} \subset A_{1}$, $\underbrace{a}_{P_1},\underbrace{b}_{P_2}$.",
    r"- \[ a \\ b \]",
    r"$$a_b*c*$$ is shown, and \[x_1\_y\] too, **not** $`b*a*`$",
    r"# Of $a_b$ and \(c*d*e\)",
    r"> $f_{i}\!\left[x\right]_{j}$",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_every_character_of_a_formula_is_there_in_order_and_unstyled(text: str) -> None:
    signs = [(r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")]
    formulas = []
    rest = text
    for opening, closing in signs:
        while opening in rest:
            before, _, after = rest.partition(opening)
            formula, _, behind = after.partition(closing)
            formulas.append(opening + formula + closing)
            rest = before + behind
    drawn = lines(text, 200)
    for formula in formulas:
        assert any(formula in line.text for line in drawn), formula
        assert all(not (s.style and s.style.italic) for line in drawn for s in line.segments)


def test_a_formula_in_a_cell_of_a_table_keeps_its_backslashes() -> None:
    assert r"$a\_b$" in shown("| x |\n|---|\n| $a\\_b$ |\n")


@pytest.mark.parametrize(
    "text",
    [
        "It costs $5 and $6_000_.",
        "$x_1$ and $y_2$",
        "$ a_b $",
        "a $5, b 6$ c",
        "x$y_z$",
        r"\$a_b_ c$",
        "$a\nb$",
        "$_a_ $5",
    ],
)
def test_dollars_are_a_formula_or_prose_as_other_readers_decide(text: str) -> None:
    other = MarkdownIt("commonmark").use(dollarmath_plugin, allow_space=False, allow_digits=False)
    formulas = [t.content for line in other.parseInline(text) for t in line.children or [] if t.type == "math_inline"]
    drawn = "\n".join(line.text for line in lines(text, 200))
    assert [f for f in (f"${formula}$" for formula in formulas) if f not in drawn] == []
    if not formulas:
        plain = [t for line in MarkdownIt("commonmark").parseInline(text) for t in line.children or []]
        assert drawn == "".join("\n" if t.type == "softbreak" else t.content for t in plain)


def test_text_after_a_displayed_formula_on_its_line_is_prose_again() -> None:
    assert [line.text for line in lines("$$a_b$$ where *a* is\nthe first\n\nend", 80)] == [
        "$$a_b$$ where a is",
        "the first",
        "end",
    ]


@pytest.mark.parametrize("text", ["```make\nall:\n\tgcc a.c\n```", "a\tb **c\td**", "x\n\n\tcode\there"])
@pytest.mark.parametrize("width", [3, 8, 60])
def test_tabs_are_drawn_as_blanks_to_the_next_stop_and_no_line_is_too_wide(text: str, width: int) -> None:
    for line in lines(text, width):
        assert sum(segment.cell_length for segment in line.segments) <= width
        assert not any(c in segment.text for segment in line.segments for c in "\t\ufdd0\ufdd1")
    if width == 60 and "make" in text:
        assert "      gcc a.c" in shown(text)
