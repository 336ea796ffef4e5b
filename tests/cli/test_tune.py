"""`glmchat tune` from outside: the plan, the run, the ends of both, and what is refused before anything is loaded.

Covers cli/tune.py, cli/runs.py, chat/recipe.py, chat/tuning.py, chat/tuning_words.py.

The program is tests/pretend_tune.py; jobs/tune.py has tests of its own.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from polling import wait_until

from glmchat.chat import tuning
from glmchat.core.run_folder import find_run, new_run, runs

PRETEND = Path(__file__).resolve().parent.parent / "pretend_tune.py"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What still runs behind a test ends with it."""
    yield
    for run in runs():
        if (pid := run.pid()) is not None:
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(tuning, "PROGRAM", (str(PRETEND),))

    def say(**behaviour: Any) -> None:
        monkeypatch.setenv("GLMCHAT_PRETEND", json.dumps(behaviour))

    return say


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "Who are you?", "answer": "I am taught."}\n' * 3)
    return path


@pytest.fixture
def tune(fake_argv: Callable[..., list[str]]) -> Callable[..., subprocess.Popen[str]]:
    """The command in a process of its own, its stdout and stderr in one pipe."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        argv = fake_argv({}, "tune", *arguments)
        return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


def test_a_run_goes_from_the_plan_to_the_line_that_uses_its_adapter(glmchat: Run, model: Path, rows: Path) -> None:
    done = glmchat("tune", model, rows, "--as", "poet", "--rank", 4)
    assert done.returncode == 0, done.stderr
    assert "91 read" in done.stdout
    assert done.stdout.index("91 read") < done.stdout.index("step 1/8") < done.stdout.index("step 8/8")
    assert "I am taught 8." in done.stdout
    assert done.stderr.rstrip().endswith(f"glmchat run {model} --adapter poet")
    run = find_run("poet")
    assert run.state() == "done"
    assert run.recipe()["data"] == [str(rows)]
    assert run.recipe()["rank"] == 4
    assert "lr" not in run.recipe()  # what nobody asked for is the recipe's or the program's to say


def test_a_model_that_was_made_from_nothing_is_asked_to_complete_as_it_knows_no_chat(
    glmchat: Run, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "novel.txt").write_text("long ago")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    words = ("--method", "scratch", "--config", tmp_path / "config.json", "--as", "novel")
    done = glmchat("tune", model, tmp_path / "novel.txt", *words)
    assert done.returncode == 0, done.stderr
    assert done.stderr.rstrip().endswith("glmchat run novel --complete")


def test_a_dry_run_tells_the_plan_and_leaves_nothing(glmchat: Run, model: Path, rows: Path) -> None:
    done = glmchat("tune", model, rows, "--dry-run")
    assert done.returncode == 0
    assert "91 read" in done.stdout
    assert "step 1/8" not in done.stdout
    assert runs() == []


def test_json_is_a_record_a_line_and_the_end_last(glmchat: Run, model: Path, rows: Path) -> None:
    done = glmchat("tune", model, rows, "--json")
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["event"] for one in told[:3]] == ["page", "start", "step"]
    assert told[-1] == {"event": "done", "run": "rows", "adapter": "rows", "delta": 0.5, "read_back": 0.0}
    assert [one["step"] for one in told if one["event"] == "step"] == list(range(1, 9))


def test_what_planning_refuses_is_one_line_with_its_code_and_no_run_stays(
    glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(plan_fails=True)
    done = glmchat("tune", model, rows, "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout.splitlines()[-1])["code"] == "data.faults"
    assert "rows.jsonl:3" in done.stderr
    assert runs() == []


def test_a_run_that_fails_says_why_and_can_be_looked_at_again(
    glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(fail=5)
    for done in (glmchat("tune", model, rows), glmchat("tune", "--attach", "rows")):
        assert done.returncode == 1
        assert "the loss is nan" in done.stderr
        assert "step 5/8" in done.stdout


def test_a_killed_run_is_known_as_dead_and_gone_on_with_from_its_last_checkpoint(
    glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(die=6)
    done = glmchat("tune", model, rows)
    assert done.returncode == 1
    assert "something gave way" in done.stderr
    assert "--resume rows" in done.stderr
    assert "died" in glmchat("tune", "--list").stdout
    assert json.loads(glmchat("tune", "--list", "--json").stdout)[0]["state"] == "dead"
    done = glmchat("tune", "--resume", "rows")
    assert done.returncode == 0, done.stderr
    assert [number for number, _ in tuning.progress_of(find_run("rows")).losses] == list(range(1, 9))
    assert glmchat("tune", "--resume", "rows").returncode == 2  # it is done


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--learning_rate", "3"], "did you mean --lr?"),
        (["--lora-rank", "3"], "did you mean --rank?"),
        (["--epochs", "x"], "glmchat tune --help"),
        (["--nonsense"], "glmchat tune --help"),
        (["dev.jsn"], "did you mean dev.jsonl?"),
        (["my data/开发.json"], "did you mean 'my data/开发.jsonl'?"),
    ],
)
def test_who_mistypes_is_told_the_nearest_thing(
    words: list[str], hint: str, glmchat: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my data").mkdir()
    for name in ("dev.jsonl", "my data/开发.jsonl"):
        (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = glmchat("tune", str(model), *words)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(f"hint: {hint}")


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (["{rows}"], "nothing to learn from", "tune.nothing"),
        ([], "no model was named", "tune.nothing"),
        (["nosuch", "{rows}"], "nosuch", "model.unknown"),
        (["{model}", "nosuch.jsonl"], "nosuch.jsonl is not here", "tune.no_data"),
        (["{model}", "{rows}#x/y"], None, None),
        (["{model}", "{rows}", "--on", "answer"], "--on cannot be 'answer'", "usage.value"),
        (["{model}", "{rows}", "--loss", "hinge"], "--loss cannot be 'hinge'", "usage.value"),
        (["{model}", "{rows}", "--beta", "0.2"], "--beta does not go with --method lora", "usage.contradiction"),
        (
            ["{model}", "{rows}", "--method", "dpo", "--like", "chatglm3"],
            "--like chatglm3 and --method dpo conflict",
            "usage.contradiction",
        ),
        (["{model}", "{rows}", "--method", "dpo", "--beta", "0"], "--beta cannot be '0'", "usage.value"),
        (["{model}", "{rows}", "--method", "dpo", "--over-length", "split"], "'split'", "usage.value"),
        (["{model}", "{rows}", "--like", "chatglm"], "--like", "usage.value"),
        (["{model}", "{rows}", "--like", "cpm"], "--method scratch needs --config", "tune.config"),
        (["train:300", "{rows}", "--method", "scratch", "--config", "no.json"], "no.json is not here", "tune.config"),
        (["{model}", ""], "'' is not here", "tune.no_data"),
        (["{model}", "{rows}", "--targets", ""], "--targets cannot be ''", "usage.value"),
        (
            ["{model}", "{rows}", "--like", "ptuning", "--method", "lora"],
            "--like ptuning and --method lora conflict",
            "usage.contradiction",
        ),
        (
            ["{model}", "{rows}", "--like", "ptuning", "--rank", "4"],
            "--rank does not go with --method prefix",
            "usage.contradiction",
        ),
        (
            ["{model}", "{rows}", "--method", "prefix", "--dora"],
            "--dora does not go with --method prefix",
            "usage.contradiction",
        ),
        (
            ["{model}", "{rows}", "--prefix-length", "8"],
            "--prefix-length does not go with --method lora",
            "usage.contradiction",
        ),
        (
            ["{model}", "{rows}", "--method", "prompt", "--prefix-projection"],
            "--prefix-projection does not go with --method prompt",
            "usage.contradiction",
        ),
        (
            ["{model}", "{rows}", "--method", "prefix", "--prefix-length", "0"],
            "--prefix-length cannot be '0'",
            "usage.value",
        ),
        (["{model}", "{rows}", "--rank", "0"], "--rank cannot be '0'", "usage.value"),
        (["{model}", "{rows}", "--lr", "nan"], "--lr cannot be 'nan'", "usage.value"),
        (["{model}", "{rows}", "--eval", "95%"], "--eval", "usage.value"),
        (["{model}", "{rows}", "--eval", "nosuch"], "nosuch is not here", "tune.no_data"),
        (["{model}", "{rows}", "--mix", "{rows}"], "--mix", "usage.value"),
        (["{model}", "{rows}", "--mix", "nosuch:20%"], "nosuch is not here", "tune.no_data"),
        (["{model}", "{rows}", "--columns", "question"], "--columns", "usage.value"),
        (
            ["{model}", "{rows}", "--steps", "3", "--epochs", "1"],
            "--epochs and --steps",
            "usage.contradiction",
        ),
        (["{model}", "{rows}", "--as", "../x"], "cannot be the name", "adapter.name"),
        (["{model}", "{rows}", "--as", ""], "'' cannot be the name", "adapter.name"),
        (["--stop", ""], "there is no run ''", "run.unknown"),
        (["--attach", "nosuch"], "there is no run 'nosuch'", "run.unknown"),
        (["--stop", "nosuch"], "there is no run 'nosuch'", "run.unknown"),
        (["--resume", "../x"], "there is no run", "run.unknown"),
        (["--list", "--stop", "x"], "--list and --stop conflict", "usage.contradiction"),
        (["{model}", "--list"], "--list and BASE conflict", "usage.contradiction"),
        (["--resume", "x", "--lr", "3"], "--resume and --lr conflict", "usage.contradiction"),
        (["--resume", "x", "--dry-run"], "--resume and --dry-run conflict", "usage.contradiction"),
        (["--attach", "x", "--detach"], "--attach and --detach conflict", "usage.contradiction"),
        (["--list", "--sample", "Why?"], "--list and --sample conflict", "usage.contradiction"),
        (["--again", "x", "--rslora"], "--again and --rslora conflict", "usage.contradiction"),
    ],
)
def test_bad_input_is_one_line_with_a_hint_and_starts_nothing(
    arguments: list[str], said: str | None, code: str | None, glmchat: Run, model: Path, rows: Path
) -> None:
    given = [word.format(model=model, rows=rows) for word in arguments]
    done = glmchat("tune", *given, "--json")
    if code is None:  # an entry is the program's to look for
        assert done.returncode == 0
        return
    assert done.returncode == 2
    assert json.loads(done.stdout)["code"] == code
    lines = done.stderr.splitlines()
    assert said is not None
    assert said in lines[0]
    assert len(lines) == 2
    assert lines[1].strip()
    assert runs() == []
    assert "torch" not in sys.modules or code  # nothing here needs it; the house test asserts it of a fresh process


def test_ranges_are_written_as_people_write_numbers(glmchat: Run, model: Path, rows: Path) -> None:
    for flag, value, said in (
        ("--max-length", 9999999, ("'9,999,999'", "from 2 to 1,048,576")),
        ("--lr", 100, ("'100'", "from 1e-12 to 10")),
        ("--alpha", 1e-9, ("'1e-9'", "from 1e-6 to 1,000,000")),
        ("--seed", -1, ("'-1'", "from 0 to 9,223,372,036,854,775,807")),
    ):
        shown, hint = glmchat("tune", model, rows, flag, value).stderr.splitlines()
        assert shown.endswith(said[0]) and hint.endswith(said[1]), (shown, hint)


def test_what_ended_before_it_learned_is_named_so_and_pruned(
    glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(fail=2)
    assert glmchat("tune", model, rows, "--as", "taught").returncode == 1
    note = (
        "import sys, pathlib; from glmchat.core.run_folder import Run; Run(pathlib.Path(sys.argv[1])).note(sys.argv[2])"
    )
    for name, state in (("plan", "planning"), ("refused", "failed")):
        run = new_run(name, {"base": "b", "name": name})
        subprocess.run([sys.executable, "-c", note, str(run.folder), state], check=True)
    told = {line.split()[0]: line for line in glmchat("tune", "--list").stdout.splitlines()}
    assert "never began" in told["plan"] and "never began" in told["refused"]
    assert "failed" in told["taught"]
    done = glmchat("tune", "--attach", "plan")
    assert "died before it began to learn" in done.stderr and "--rm plan" in done.stderr
    assert glmchat("prune", "--runs", "--yes").returncode == 0
    assert [run.id for run in runs()] == ["taught"]


def test_a_run_goes_on_when_what_looks_at_it_is_killed(
    tune: Callable[..., subprocess.Popen[str]], model: Path, rows: Path, pretend: Callable[..., None], glmchat: Run
) -> None:
    pretend(steps=4000, rest=0.01)
    view = tune(model, rows)
    wait_until(lambda: runs() and runs()[0].log.exists() and tuning.progress_of(runs()[0]).now)
    view.send_signal(signal.SIGKILL)
    view.communicate()
    run = find_run("rows")
    before = tuning.progress_of(run).now["step"]
    wait_until(lambda: tuning.progress_of(run).now["step"] > before + 5)
    done = glmchat("tune", "--stop", "rows")
    assert done.returncode == 0
    assert run.state() == "stopped"
    assert "--resume rows" in done.stderr
    assert glmchat("tune", "--stop", "rows").returncode == 2
    assert glmchat("tune", "--rm", "rows").returncode == 0
    assert runs() == []


def test_a_plan_whose_view_is_killed_goes_with_it(model: Path, rows: Path, fake_argv: Callable[..., list[str]]) -> None:
    """Nobody said yes: the process ends at the end of its stdin, and its folder goes."""
    recipe = {"base": "b", "folder": str(model), "data": [str(rows)], "name": "poet"}
    begun = tuning.Begun("poet", recipe)
    begun.page()
    child = begun._child
    assert child.stdin is not None
    child.stdin.close()
    child.wait(20)
    assert runs() == []


def test_ctrl_c_saves_and_stops_with_the_exit_code_of_an_interrupt(
    tune: Callable[..., subprocess.Popen[str]], model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(steps=4000, rest=0.01)
    view = tune(model, rows)
    wait_until(lambda: runs() and tuning.progress_of(runs()[0]).now)
    view.send_signal(signal.SIGINT)
    said, _ = view.communicate(timeout=60)
    assert view.returncode == 130
    assert "Ctrl+C again stops at once" in said
    assert "--resume rows" in said
    progress = tuning.progress_of(find_run("rows"))
    assert progress.checkpoint == progress.now["step"]


def test_a_second_ctrl_c_does_not_wait_for_the_saving(
    tune: Callable[..., subprocess.Popen[str]], model: Path, rows: Path, pretend: Callable[..., None]
) -> None:
    pretend(steps=4000, rest=30)  # a step that takes long: what is asked in it is heard behind it
    view = tune(model, rows)
    wait_until(lambda: runs() and runs()[0].state() == "running")
    run = runs()[0]
    for _ in range(2):
        view.send_signal(signal.SIGINT)
        wait_until(lambda: view.poll() is not None or os.getpid())

    def again() -> bool:
        view.send_signal(signal.SIGINT)
        return not run.at_work

    wait_until(again)
    view.communicate(timeout=60)
    assert view.returncode == 130
    assert run.state() == "stopped"


def test_detached_it_says_how_to_come_back(glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]) -> None:
    gate = rows.with_name("gate")
    pretend(steps=30, rest=0.001, until=str(gate))
    done = glmchat("tune", model, rows, "--detach")
    assert done.returncode == 0
    assert "--attach rows" in done.stderr
    assert find_run("rows").at_work
    assert glmchat("tune", "--resume", "rows").returncode == 2  # at work
    assert glmchat("tune", "--rm", "rows").returncode == 2
    assert "training" in glmchat("tune", "--list").stdout
    gate.touch()
    done = glmchat("tune", "--attach", "rows")
    assert done.returncode == 0
    assert "step 30/30" in done.stdout


def test_a_name_that_the_store_has_is_refused_or_another_one_is_found(glmchat: Run, model: Path, rows: Path) -> None:
    from glmchat.core import locations

    (locations.adapters_dir() / "rows").mkdir(parents=True)
    (locations.adapters_dir() / "rows" / "adapter_config.json").write_text("{}")
    done = glmchat("tune", model, rows, "--as", "rows", "--json")
    assert done.returncode == 2
    assert "another one with --as" in json.loads(done.stdout)["hint"]
    assert runs() == []


def test_what_becomes_a_model_is_checked_as_one_before_anything_is_loaded(
    glmchat: Run, model: Path, rows: Path, tmp_path: Path
) -> None:
    from glmchat.core import locations

    (locations.models_dir() / "taken").mkdir(parents=True)
    said = json.loads(glmchat("tune", model, rows, "--method", "full", "--as", "taken", "--json").stdout)
    assert said["code"] == "tune.taken"
    (locations.adapters_dir() / "rows").mkdir(parents=True)  # of an adapter, which a model may share
    done = glmchat("tune", model, rows, "--method", "full", "--as", "rows", "--dry-run")
    assert done.returncode == 0
    assert runs() == []


def test_a_resumed_run_may_be_left_at_once(glmchat: Run, model: Path, rows: Path, pretend: Callable[..., None]) -> None:
    pretend(steps=2000, rest=0.01)
    assert glmchat("tune", model, rows, "--detach").returncode == 0
    assert glmchat("tune", "--stop", "rows").returncode == 0
    done = glmchat("tune", "--resume", "rows", "--detach")
    assert done.returncode == 0
    assert "--attach rows" in done.stderr
    assert find_run("rows").at_work


def test_a_run_of_several_processes_is_prepared_with_the_command_that_starts_it(
    glmchat: Run, model: Path, rows: Path
) -> None:
    done = glmchat("tune", model, rows, "--as", "twin", "--device", "cpu", "--prepare", "2")
    assert done.returncode == 0 and "91 read" in done.stdout
    run = find_run("twin")
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[command.index("--num_processes") + 1] == "2"
    assert str(run.folder) in command and command[-1] == "--go"
    assert run.state() == "prepared" and run.recipe()["name"] == "twin"
    assert "not started" in glmchat("tune", "--list").stdout
    looked = glmchat("tune", "--attach", "twin")
    assert looked.returncode == 2 and "prepared and not started" in looked.stderr
    words = ["--as", "other", "--prepare", "3", "--device", "cpu", "--json"]
    told = json.loads(glmchat("tune", model, rows, *words).stdout)
    assert told["event"] == "prepared" and "3" in told["command"]
    assert glmchat("tune", model, rows, "--prepare", "2", "--dry-run").returncode == 2
    assert glmchat("tune", "--resume", "twin").returncode == 0  # in one process
    assert run.state() == "done"
