"""What `/file` takes, in the window and in plain lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmchat.chat.text_file import LIMIT, read_text_file
from glmchat.core.errors import Usage


def test_a_text_of_the_limit_is_read_and_one_byte_more_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_bytes(b"x" * LIMIT)
    read = read_text_file(str(file))
    assert (read.name, read.size, read.text) == ("notes.txt", LIMIT, "x" * LIMIT)
    file.write_bytes(b"x" * (LIMIT + 1))
    with pytest.raises(Usage) as refused:
        read_text_file(str(file))
    assert refused.value.code == "file.size"


def test_quotes_around_the_path_and_a_byte_order_mark_are_taken_off(tmp_path: Path) -> None:
    file = tmp_path / "my 笔记.txt"
    file.write_bytes("\ufeff量化".encode())
    assert read_text_file(f'"{file}"').text == "量化"


@pytest.mark.parametrize(
    ("content", "code"),
    [(None, "file.unreadable"), (b"\xff\xfe\x00", "file.binary"), (b" \n\t", "file.no_text"), (b"", "file.no_text")],
)
def test_what_holds_no_text_is_refused_with_its_reason(tmp_path: Path, content: bytes | None, code: str) -> None:
    file = tmp_path / "x"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(Usage) as refused:
        read_text_file(str(file))
    assert refused.value.code == code


def test_no_path_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="needs a path"):
        read_text_file("")
    with pytest.raises(Usage, match="not a file"):
        read_text_file(str(tmp_path))
