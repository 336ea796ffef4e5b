"""The table of hostile inputs (`hostile_inputs.py`), each as a person meets it: by the command, and in the window.

What is said stands in one or two lines; no traceback, no control sequence, in a second of the processor and 300 MB.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from commands import Commands, Outcome
from hostile_inputs import CASES, ENGINE_SECONDS, Case, Place
from windows import Window, open_window

MEMORY = 300 * 2**20  # bytes above the start
LINES = 12  # of what is said of one error, a list of files in it


def controls(text: str) -> set[str]:
    return {c for c in text if (ord(c) < 32 and c not in "\n\t") or "\x7f" <= c < "\xa0"}


def run(case: Case, place: Place, commands: Commands) -> Outcome:
    argv = [word.replace("{home}", str(place.home)) for word in case.build(place)]
    place.home.mkdir(exist_ok=True)
    homes = {"HOME": place.home, "GLMCHAT_HOME": place.home, "HF_HOME": place.home / "hf"}
    return commands.run(argv, {name: str(path) for name, path in homes.items()} | {"GLMCHAT_LANG": "en"}, place.home)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_input_is_refused_by_the_command(case: Case, place: Place, commands: Commands) -> None:
    done = run(case, place, commands)
    assert done.code == case.exit, done
    assert case.words in done.out + done.err
    assert "Traceback" not in done.out + done.err
    assert not controls(done.err) and (case.is_answer or not controls(done.out))
    assert not case.exit or len(done.err.splitlines()) <= LINES
    assert done.processor < (ENGINE_SECONDS if case.starts_engine else 1.0), done
    assert case.starts_engine or done.growth < MEMORY, done


def refused(window: Window, since: int) -> bool:
    return any(turn.role in ("error", "warning") for turn in window.turns[since:])


async def test_what_is_no_model_is_refused_in_the_window_and_it_goes_on(place: Place, tmp_path: Path) -> None:
    """One window, and one after the other is chosen as its model."""
    async with open_window() as window:
        for number, case in enumerate(case for case in CASES if case.window):
            own = Place(tmp_path / str(number), place.serves)
            own.folder.mkdir()
            path, seen = case.build(own)[1], len(window.turns)
            await window.send(f"/model {path}")
            await window.until(partial(refused, window, seen))
            said = "\n".join(f"{turn.text}\n{turn.hint}" for turn in window.turns[seen:])
            assert case.words in said.replace(str(own.folder), ""), case.name
            assert "Traceback" not in said and not controls(window.screen_text()), case.name


def test_there_are_a_hundred_of_them_and_no_two_are_called_the_same() -> None:
    assert len(CASES) >= 100
    assert Counter(case.name for case in CASES).most_common(1)[0][1] == 1
