"""Sentences that are as wide as the terminal they are printed to.

Covers cli/output.py.
"""

from __future__ import annotations

import io
import os
import pty
from collections.abc import Iterator
from typing import TextIO

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from glmchat.cli.output import prose

WORDS = st.lists(st.text("ab内存，", min_size=1, max_size=8), min_size=1, max_size=30)


@pytest.fixture
def terminal() -> Iterator[TextIO]:
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb"), os.fdopen(theirs, "w") as stream:
        yield stream


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS, st.integers(20, 60))
def test_on_a_terminal_a_sentence_is_broken_between_words(terminal: TextIO, words: list[str], width: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        lines = prose(" ".join(words), terminal)
    assert all(cell_len(line) <= width for line in lines)
    assert " ".join(lines).split() == words


def test_a_pipe_and_what_is_set_in_from_the_left_stay_as_they_are(terminal: TextIO) -> None:
    long = "word " * 60
    assert prose(long, io.StringIO()) == [long] and prose(long, None) == [long]
    assert prose(f"  {long}", terminal) == [f"  {long}"]
    assert prose("", terminal) == [""]
