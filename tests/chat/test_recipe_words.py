"""`/tune FILE --flags` asks for what the command line asks for, and refuses at the prompt.

Covers chat/recipe.py, chat/tune_request.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from tiny_talker import write_talker

from glmchat.chat.tune_request import request_in_chat
from glmchat.cli.main import build
from glmchat.core import locations
from glmchat.core.errors import Usage
from glmchat.core.run_folder import new_run

OTHERS = {"--dry-run", "--yes", "--detach", "--list", "--attach", "--stop", "--resume", "--rm", "--plain", "--json",
          "--help", "--again", "--prepare"}  # fmt: skip
VALUES = {"--like": "lora-guide", "--method": "lora", "--on": "last", "--eval": "5%", "--columns": "prompt=a,answer=b",
          "--over-length": "drop", "--checkpointing": "on", "--quant": "4", "--dtype": "float32", "--device": "cpu",
          "--loss": "ipo", "--output": "pt", "--optimiser-dtype": "bfloat16", "--dropout": "0.1"}  # fmt: skip
ONLY = {
    "--prefix-length": "prefix",
    "--prefix-projection": "prefix",
    "--beta": "dpo",
    "--loss": "dpo",
    "--last-layers": "full",
    "--optimiser-dtype": "full",
    "--config": "scratch",
}


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(write_talker(tmp_path / "base"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "my rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}')
    return path


def flags() -> dict[str, bool]:
    """Of `glmchat tune`: name -> whether it takes a value."""
    command = typer.main.get_command(build()).commands["tune"]  # type: ignore[attr-defined]
    options = [each for each in command.params if each.param_type_name == "option"]
    return {each.opts[0]: not each.is_flag for each in options if each.opts[0] not in OTHERS}


@pytest.mark.parametrize("flag", flags())
def test_every_flag_of_the_command_line_is_taken(flag: str, base: str, rows: Path) -> None:
    value = {"--mix": f"{rows}:20%", "--config": str(rows)}.get(flag) or VALUES.get(flag, "3")
    more = f" --method {ONLY[flag]}" if flag in ONLY else ""
    given = f' {flag} "{value}"' if flags()[flag] else f" {flag}"
    request = request_in_chat(f'"{rows}"{given}{more}', base)
    assert request is not None
    assert request["data"] == [str(rows)]
    name = {"--as": "name", "--sample": "samples"}.get(flag, flag[2:].replace("-", "_"))
    assert str(request[name]).strip("[]'") in (value, f"{value}.0", "True") or name in ("columns", "mix")


def test_a_file_alone_needs_no_quotes_and_a_name_of_a_run_is_none(base: str, rows: Path) -> None:
    request = request_in_chat(str(rows), base)
    assert request is not None and request["data"] == [str(rows)]
    assert request_in_chat("poet-2", base) is None
    new_run("poet.2", {})
    assert request_in_chat("poet.2", base) is None
    with pytest.raises(Usage, match=r"nosuch\.jsonl is not here"):
        request_in_chat("nosuch.jsonl", base)


@pytest.mark.parametrize(
    ("words", "said"),
    [("--epoch 3", "takes no --epoch"), ("--detach", "takes no --detach"), ("--epochs", "needs a value"),
     ("--epochs soon", "cannot be 'soon'"), ("--lr 1000", "--lr"), ("--epochs 2 --steps 3", "conflict"),
     ("--as 'x", "quote")],
)  # fmt: skip
def test_what_is_wrong_is_refused_at_the_prompt(words: str, said: str, base: str, rows: Path) -> None:
    with pytest.raises(Usage, match=said):
        request_in_chat(f'"{rows}" {words}', base)


def test_a_model_that_a_conversation_asks_for_is_checked_as_one(base: str, rows: Path) -> None:
    (locations.models_dir() / "taken").mkdir(parents=True)
    with pytest.raises(Usage) as refused:
        request_in_chat(f'"{rows}" --method full --as taken', base)
    assert refused.value.code == "tune.taken"
