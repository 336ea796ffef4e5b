"""Drawing: exact widths, inert text, links whose target is seen, code that keeps its text.

Covers tui/transcript/tables.py, tui/transcript/highlight.py.
"""

from __future__ import annotations

import pytest
from rich.cells import cell_len

from glmchat.tui.theme import PALETTES
from glmchat.tui.transcript.blocks import BlockSplitter
from glmchat.tui.transcript.highlight import highlight
from glmchat.tui.transcript.markdown import draw
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
