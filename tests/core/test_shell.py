"""What is shown to be copied into a shell arrives there as it was meant."""

from __future__ import annotations

import os
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmchat.core.shell import shell_line, shell_word
from glmchat.core.text import show_controls


@pytest.mark.parametrize(("text", "word"), [
    ("小星", "小星"), ("poppy-2", "poppy-2"), ("/data/我的/rows.csv", "/data/我的/rows.csv"), ("", "''"),
    ("two words", "'two words'"), ("it's", "'it'\"'\"'s'"), ("全角\u3000空格", "'全角\u3000空格'"), ("~me", "'~me'"),
    ("a\nb", "$'a\\x0ab'"), ("\x1b[31m'", "$'\\x1b[31m\\x27'"),
])  # fmt: skip
def test_a_word_is_quoted_only_where_a_shell_would_read_it_otherwise(text: str, word: str) -> None:
    assert shell_word(text) == word


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_bash_reads_each_word_as_it_was_and_nothing_in_the_line_acts_on_a_screen(words: list[str]) -> None:
    line = shell_line(words)
    assert show_controls(line, keep=frozenset()) == line
    done = subprocess.run(["bash", "-c", f'printf "%s\\0" {line}'], capture_output=True, check=True)
    assert done.stdout.split(b"\0")[:-1] == ([os.fsencode(word) for word in words] or [b""])
