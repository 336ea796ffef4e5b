"""The first minutes, in a pseudo-terminal: no model is here yet, one is pulled, and what was asked meanwhile is sent.

Covers tui/screens/models.py, tui/model_rows.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes import model_in
from hub_helpers import hub_entry, user_catalogue
from loopback_hub import LoopbackHub
from screen import TerminalSession

RATE = 250_000  # bytes per second: the weights take a second


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model_in(tmp_path / "tiny").iterdir()}


@pytest.fixture
def hub(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Has a tiny model, the first of the list."""
    with LoopbackHub(rate=RATE) as hub:
        user_catalogue(hub_entry("tiny", "owner/tiny", hub.add("owner/tiny", files), files))
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(("columns", "rows"), [(100, 30), (40, 12)])
def test_a_question_before_the_first_pull_says_what_it_waits_for_and_is_sent_after_it(columns: int, rows: int) -> None:
    with TerminalSession(columns=columns, rows=rows) as terminal:
        terminal.until_seen("tiny")
        terminal.press("esc")
        terminal.until_seen("F4", "choose a model")
        terminal.say("first of all")
        terminal.until_seen("F4 chooses one")
        terminal.press("f4")
        terminal.until(lambda: re.search(r"▸ +tiny .*fits", terminal.text))
        terminal.press("enter")
        terminal.until_seen("to fetch")
        terminal.press("enter")
        terminal.until_seen("downloading model.safetensors", "kB /")
        terminal.until(lambda: re.search(r"kB/s|MB/s", terminal.text))
        terminal.until_seen("one two")  # without another key
        assert "F4 chooses one" not in terminal.text


def test_a_pull_that_fails_names_keys_of_the_window_and_is_tried_again_with_enter(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LoopbackHub() as hub:
        user_catalogue(hub_entry("tiny", "owner/tiny", hub.add("owner/tiny", files), files))
        url, port = hub.url, int(hub.url.rpartition(":")[2])
    monkeypatch.setenv("HF_ENDPOINT", url)
    with TerminalSession() as terminal:
        terminal.until_seen("tiny")
        terminal.press("enter")
        terminal.until_seen("to fetch")
        terminal.press("enter")
        terminal.until_seen("cannot reach 127.0.0.1", "Enter tries again")
        assert "--endpoint" not in terminal.text and "Errno" not in terminal.text
        with LoopbackHub(port=port) as hub:
            hub.add("owner/tiny", files)
            terminal.press("enter")
            terminal.until(lambda: "to fetch" in terminal.text and "cannot reach" not in terminal.text)
            terminal.press("enter")
            terminal.until(lambda: "tiny" in terminal.lines[-1])
