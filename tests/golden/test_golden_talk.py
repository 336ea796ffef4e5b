"""The slash commands of plain mode, and an answer that was recorded before and is said again."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fakes import model_in
from golden_files import HERE, Golden

from glmchat.chat.commands.table import COMMANDS
from glmchat.cli.main import run

TESTS = Path(__file__).resolve().parents[1]
sys.path += [str(TESTS), str(TESTS / "engine")]

import engine_builders as llamas  # noqa: E402

ENDING = {"quit", "bye", "exit"}
PROMPT = "\n> "


class PlainMode:
    """`glmchat run --plain` with a fake engine, on a pseudo-terminal."""

    def __init__(self, model: Path) -> None:
        self._controller, terminal = pty.openpty()
        script = str(TESTS / "cli" / "with_fake_engine.py")
        self.process = subprocess.Popen(
            [sys.executable, "-P", script, "{}", "run", str(model), "--plain"],
            cwd=model, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            env={**os.environ, "TERM": "dumb", "COLUMNS": "300"},
        )  # fmt: skip
        os.close(terminal)
        self._heard = b""
        self.wait()

    def wait(self) -> str:
        """What it says until it asks again or ends."""
        until = time.monotonic() + 60
        while PROMPT not in self.text and self.text != "> ":
            assert select.select([self._controller], [], [], max(0.0, until - time.monotonic()))[0], self.text
            try:
                self._heard += os.read(self._controller, 65536)
            except OSError:  # it ended
                break
        said, self._heard = self.text, b""
        return said

    @property
    def text(self) -> str:
        return self._heard.decode("utf-8", "ignore").replace("\r\n", "\n")

    def say(self, line: str) -> str:
        os.write(self._controller, line.encode() + b"\n")
        return self.wait()

    def end(self) -> int:
        """Ctrl-D."""
        os.write(self._controller, b"\x04")
        code = self.process.wait(60)
        os.close(self._controller)
        return code


def kind_of(said: str) -> str:
    if "there is no command" in said:
        return "unknown"
    return "needs the window" if "only works in the window" in said else "known"


def test_plain_mode_knows_the_slash_commands_it_knew(golden: Golden, tmp_path: Path) -> None:
    model_in(tmp_path)
    plain = PlainMode(tmp_path)
    listed = re.findall(r"^/(\w+)  ", plain.say("/help"), re.MULTILINE)
    words = sorted({word for c in COMMANDS for word in (c.name, *c.aliases)} | set(listed) | {"regenerate", "nothing"})
    told = {word: kind_of(plain.say(f"/{word}")) for word in words if word not in ENDING}
    assert plain.end() == 0
    golden("plain_commands.json", {"listed": sorted(listed), "words": told})


def told_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Any]:
    capsys.readouterr()
    assert run(list(arguments)) == 0, capsys.readouterr()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_answer_that_was_recorded_before_is_said_again(
    golden: Golden, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = llamas.write_folder(tmp_path / "tiny-llama")
    assert run(["add", str(folder), "--name", "golden-llama"]) == 0
    record = HERE / "replay_record.json"
    if golden.writing:
        settings = ("--threads", "1", "--dtype", "float32", "-n", "16", "--seed", "11", "--temp", "0.9", "--json")
        told_of(capsys, "run", "-m", "golden-llama", "-p", "hello the world", *settings)
        kept = tmp_path / "kept.json"
        assert run(["history", "export", "1", "-f", "json", "-o", str(kept)]) == 0
        told_of(capsys, "history", "rm", "1", "--yes", "--forever", "--json")
        golden.write("replay_record.json", json.loads(kept.read_text().replace(str(tmp_path), "/gone")))
    ((row,),) = told_of(capsys, "history", "import", str(record), "--json")
    said = told_of(capsys, "replay", str(row["id"]), "--json")
    assert said[-1]["event"] == "end" and said[-1]["identical"] is True and said[-1]["tokens"] == 16
    (message,) = [m for m in golden.read("replay_record.json")["conversations"][0]["messages"] if m["token_ids"]]
    assert said[0]["tokens"] == len(message["token_ids"])
    assert [stretch["seed"] for stretch in said[0]["stretches"]] == [11]
