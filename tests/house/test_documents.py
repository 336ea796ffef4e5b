"""What the documents show is there: commands and flags parse, scripts and pages exist, and no machine's own paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from glmchat.cli.main import COMMANDS, build
from glmchat.core import errors

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
DOCUMENTS = [str(page.relative_to(ROOT)) for page in PAGES]
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md"))
WIDEST_LINE = 140  # characters


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def shell_lines(text: str) -> Iterator[str]:
    """Every command that a document shows: lines of console blocks, and code in a sentence that begins with glmchat."""
    yield from block_lines(text)
    yield from re.findall(r"`((?:glmchat|python benchmarks/)[^`]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def block_lines(text: str) -> Iterator[str]:
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                yield line[2:].partition("  #")[0].strip()


def glmchat_words(document: str) -> set[str]:
    """Commands in sentences, as they are written."""
    return set(re.findall(r"`(glmchat [^`]*)`", re.sub(r"```.*?```", "", read(document), flags=re.DOTALL)))


def glmchat_arguments(document: str) -> list[list[str]]:
    """The arguments of every `glmchat …` of a document; of a pipe the part that is ours, up to a redirection."""
    found = []
    for line in shell_lines(read(document)):
        words = shlex.split(line.split(" > ")[0])
        if "glmchat" in words and "…" not in line:
            found.append(words[words.index("glmchat") + 1 :])
    return found


def top() -> Any:
    return typer.main.get_command(build())


def parse(arguments: list[str]) -> None:
    """Raises what the command line would raise before anything runs."""
    group, name, context = top(), "glmchat", None
    if arguments and arguments[0].startswith("-"):
        known = {"-h", "--help"}.union(*(flag.opts for flag in group.params))
        assert arguments[0] in known, f"glmchat has no {arguments[0]}"
        return
    while arguments:
        command = group.get_command(context, arguments[0])
        assert command is not None, f"{name} has no command {arguments[0]!r}"
        name, rest = f"{name} {arguments[0]}", arguments[1:]
        if not rest:  # "`glmchat show` names them": the command is there, and its own help says what it wants
            return
        context = command.make_context(name, list(rest), parent=context)
        if not hasattr(command, "get_command"):
            return
        group, arguments = command, [*context._protected_args, *context.args]


def test_both_readmes_show_the_same_commands() -> None:
    assert list(block_lines(read("README.md"))) == list(block_lines(read("README.zh.md")))
    assert glmchat_words("README.md") == glmchat_words("README.zh.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_a_document_shows_parses(document: str) -> None:
    for arguments in glmchat_arguments(document):
        parse(arguments)


def test_the_check_of_commands_finds_them_and_refuses_a_wrong_one() -> None:
    assert ["pull", "THUDM/chatglm-6b"] in glmchat_arguments("README.md")
    assert ["run", "-p", "Explain this change:"] in glmchat_arguments("README.md")
    with pytest.raises(typer.TyperException):
        parse(["run", "--no-such-flag"])
    with pytest.raises(AssertionError):
        parse(["no-such-command"])


def every_command(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        yield (*path, name), command
        if hasattr(command, "get_command"):
            yield from every_command(command, (*path, name))


def test_every_flag_says_what_it_does() -> None:
    plain = {"top_p", "min_p", "repetition_penalty", "seed", "threads"}  # the field's own words
    silent = {
        f"glmchat {' '.join(path)} {flag.opts[0]}"
        for path, command in every_command(top())
        for flag in command.params
        if flag.param_type_name == "option" and not flag.help and not flag.hidden and flag.name not in plain
    }
    assert not silent


def test_every_command_is_shown_in_the_readme() -> None:
    shown = {arguments[0] for arguments in glmchat_arguments("README.md") if arguments}
    assert {name for name, (_, summary) in COMMANDS.items() if summary} <= shown


def test_the_exit_codes_are_those_of_the_error_tree() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.GlmchatError)]
    codes = {0} | {kind.exit for kind in kinds}
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", read("README.md"), re.MULTILINE)} == codes
    assert {int(n) for n in re.findall(r"exit (\d+)", errors.__doc__ or "")} == codes - {0}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_scripts_folders_and_pages_that_a_document_names_exist(document: str) -> None:
    text = read(document)
    for script, flags in re.findall(r"(benchmarks/\w+\.(?:py|sh))((?: --?[\w-]+(?: [\w.]+)?)*)", text):
        assert (ROOT / script).is_file(), script
        source = read(script)
        for flag in re.findall(r"--[\w-]+", flags):
            assert f'"{flag}"' in source, f"{script} has no {flag}"
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / document).parent.joinpath(link).exists(), link
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    for path in re.findall(rf"`((?:{folders})/[\w/.*-]*)`", text):
        assert list(ROOT.glob(path)) or list(ROOT.glob(path + "-*")), path
    for number in re.findall(r"`(\d{4})`", text):  # "(`docs/decisions/0003`, `0007`)"
        assert list((ROOT / "docs" / "decisions").glob(f"{number}-*.md")), number


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_that_a_document_shows_is_a_target(document: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    shown = re.findall(r"(?:`|^\$ )make ([a-z][\w-]*)", read(document), re.MULTILINE)
    assert set(shown) <= targets


def test_decisions_are_numbered_without_gaps_and_say_why_and_at_what_price() -> None:
    for number, page in enumerate(DECISIONS, 1):
        text = page.read_text(encoding="utf-8")
        assert page.name.startswith(f"{number:04d}-"), page.name
        assert text.startswith(f"# {number}. "), page.name
        assert all(f"**{part}.**" in text for part in ("Context", "Decision", "Price")), page.name


def test_the_index_of_decisions_lists_each_with_its_title() -> None:
    index = read("docs/decisions/README.md")
    titles = [
        page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ").split(". ", 1) for page in DECISIONS
    ]
    assert re.findall(r"^\| \[(\d+)\] \| (.+?) \| .+? \| .+? \|$", index, re.MULTILINE) == [tuple(t) for t in titles]
    assert re.findall(r"^\[\d+\]: (.+)$", index, re.MULTILINE) == [page.name for page in DECISIONS]


def test_no_line_of_a_page_is_wider_than_a_screen() -> None:
    """Every Markdown file, tables and those of the tests too."""
    pages = [
        page for page in ROOT.rglob("*.md") if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
    ]
    assert set(PAGES) <= set(pages)
    wide = [
        f"{page.relative_to(ROOT)}:{number}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST_LINE
    ]
    assert not wide, "\n".join(wide)


def test_no_file_names_a_path_of_a_machine_it_was_written_on() -> None:
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "build"]
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name[0] != "."]
    files += [path for room in rooms for path in room.rglob("*") if path.is_file()]
    for path in files:
        if path.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".c", ".svg", ".tcss", "") and path != Path(__file__):
            # /root/autodl-tmp is where rented GPU machines keep models: published adapters name it.
            found = re.search(
                r"(?<![\w.])/(?:work|home|root|Users)/(?!autodl-tmp)\w+", path.read_text(encoding="utf-8")
            )
            assert not found, f"{path.relative_to(ROOT)}: {found and found[0]}"
