"""A run is a folder that only whole things are in, and whose owner is known to live or to be gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from glmchat.core import run_folder
from glmchat.core.errors import Usage
from glmchat.core.run_folder import Run, find_run, new_run, runs


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path))
    return tmp_path


def test_runs_of_one_name_are_numbered_and_the_newest_is_first() -> None:
    made = [new_run("poet", {"base": "b", "n": number}) for number in range(3)]
    for number, run in enumerate(made):
        os.utime(run.folder / "recipe.json", (number, number))
    assert [run.id for run in made] == ["poet", "poet-2", "poet-3"]
    assert [run.id for run in runs()] == ["poet-3", "poet-2", "poet"]
    assert find_run("poet-2").recipe() == {"base": "b", "n": 1}


def test_nobody_else_may_read_a_run() -> None:
    run = new_run("poet", {"base": "b"})
    run.note("running")
    assert run.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in run.folder.iterdir()} == {0o600}


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a" * 200, "x\0y"])
def test_what_is_no_name_leads_nowhere(name: str) -> None:
    with pytest.raises(Usage) as error:
        find_run(name)
    assert error.value.code == "run.unknown"
    with pytest.raises(Usage):
        new_run(name, {})


def test_a_run_whose_process_is_gone_is_dead_and_one_that_ended_is_what_it_said() -> None:
    run = new_run("poet", {})
    assert run.state() == "dead"  # nobody ever took it
    run.note("running")
    assert run.state() == "running"
    assert run.pid() == os.getpid()
    code = (
        "import sys, pathlib; from glmchat.core.run_folder import Run; Run(pathlib.Path(sys.argv[1])).note(sys.argv[2])"
    )
    for note, seen in (("running", "dead"), ("waiting", "dead"), ("done", "done"), ("failed", "failed")):
        subprocess.run([sys.executable, "-P", "-c", code, str(run.folder), note], check=True)
        assert run.state() == seen
        assert run.pid() is None


def test_another_process_of_the_same_number_is_not_the_owner() -> None:
    run = new_run("poet", {})
    run.note("running")
    note = json.loads((run.folder / "state.json").read_text())
    machine, pid, start = note["owner"].split(" ")
    run.write("state.json", json.dumps({**note, "owner": f"{machine} {pid} {start}1"}))
    assert run.state() == "dead"


def test_a_file_that_cannot_be_written_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("poet", {})
    run.note("running")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.note("done")
    assert run.state() == "running"
    assert sorted(path.name for path in run.folder.iterdir()) == ["recipe.json", "state.json"]


def test_what_lies_in_the_folder_and_is_no_run_is_left_out(home: Path) -> None:
    assert runs() == []
    run = new_run("poet", {})
    (run.folder.parent / "notes").mkdir()
    (run.folder.parent / "file").touch()
    (run.folder.parent / "link").symlink_to(run.folder)
    assert runs() == [Run(home / "data" / "runs" / "poet")]


def test_a_run_is_found_by_how_its_name_begins_and_deleted_by_all_of_it() -> None:
    for name in ("poet", "小星", "小星二号", "poppy"):
        new_run(name, {})
    assert find_run("pop").id == "poppy" and find_run("小星").id == "小星" and find_run("小星二").id == "小星二号"
    with pytest.raises(Usage) as several:
        find_run("po")
    assert several.value.message == "several runs begin with 'po'"
    assert set(several.value.hint.removeprefix("there are ").split(", ")) == {"poet", "poppy"}
    with pytest.raises(Usage) as part:
        find_run("pop", is_whole=True)
    assert part.value.message == "there is no run 'pop'" and "小星二号" in part.value.hint


def test_a_run_that_the_kernel_killed_for_memory_is_known_by_the_kills_since_its_last_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = new_run("poet", {})
    note = "from glmchat.core.run_folder import find_run; find_run('poet').note('running')"
    subprocess.run([sys.executable, "-P", "-c", note], check=True)  # its owner is gone when it has noted
    noted = json.loads((run.folder / "state.json").read_text())
    for before, now, told in [(3, 3, False), (3, 4, True), (None, 4, False), (3, None, False)]:
        run.write("state.json", json.dumps({**noted, "oom_kills": before}))
        monkeypatch.setattr(run_folder, "oom_kills", lambda now=now: now)
        assert run.state() == "dead" and run.died_for_memory is told
