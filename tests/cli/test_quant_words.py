"""`--quant`: one set of words in every command, read before any network is asked and before torch is loaded.

Covers cli/engine_flags.py, cli/quantize.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from glmchat.cli.main import run
from glmchat.hub import references

COMMANDS = {
    "run": ["run", "tiny/absent", "hi"],
    "serve": ["serve", "tiny/absent"],
    "bench": ["bench", "tiny/absent"],
    "pull": ["pull", "tiny/absent"],
    "adapters merge": ["adapters", "merge", "tiny/absent", "tiny/adapter", "out"],
}
NOWHERE = "http://127.0.0.1:9"  # the port that throws everything away: whoever asks it fails with other words

# Runs every command line of sys.argv[1] in turn and tells what each did.
RUNNER = """
import contextlib, io, json, sys
from glmchat.cli.main import run
results = []
for arguments in json.loads(sys.argv[1]):
    words = io.StringIO()
    with contextlib.redirect_stderr(words):
        code = run(arguments)
    results.append({"code": code, "words": words.getvalue(), "torch": "torch" in sys.modules})
print(json.dumps(results))
"""


def results_of(commands: list[list[str]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUNNER, json.dumps(commands)], cwd="/", capture_output=True, text=True, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("word", ["5", "q5", "four", ""])
def test_a_width_that_does_not_exist_is_refused_alike_everywhere_before_network_and_torch(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    told = results_of([[*arguments, "--quant", word] for arguments in COMMANDS.values()])
    assert [result["code"] for result in told] == [2] * len(COMMANDS)
    assert not any(result["torch"] for result in told)
    assert {result["words"] for result in told} == {f"glmchat: --quant cannot be {word!r}\n  hint: 4 or 8\n"}


@pytest.mark.parametrize("word", ["4", "8", "q4", "Q8", "int4", "INT8"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_the_same_words_for_a_width(
    command: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    run([*COMMANDS[command], "--quant", word])
    err = capsys.readouterr().err
    later = (
        "cannot reach" if command == "pull" else "tiny/"
    )  # what is missing is the model, which comes after the width
    assert later in err


@pytest.mark.parametrize(("word", "quant"), [("int4", "int4"), ("INT8", "int8"), ("q4", "int4"), ("8", "int8")])
def test_a_name_takes_the_same_words_behind_its_colon(word: str, quant: str) -> None:
    for text in (f"smollm2:{word}", f"THUDM/chatglm-6b@main:{word}", f"./absent-folder:{word}"):
        assert references.parse(text).quant == quant


def test_widths_of_quantize_are_read_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", "tiny/absent", "--bits", "5"]) == 2
    assert "--bits cannot be '5'" in capsys.readouterr().err
    assert run(["quantize", "tiny/absent", "--bits", "q4"]) == 1
    assert "tiny/absent" in capsys.readouterr().err
