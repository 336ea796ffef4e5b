"""How jobs speak and how they are started and stopped: the same for every job and for both faces.

Covers chat/jobs.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from glmchat.chat.jobs import job_environment, run_job
from glmchat.core.errors import Damaged, DoesNotFit, EngineDied, Interrupted

# A job like those of the house: the same main wrapper, a work of a few lines.
JOB = """
import os, sys, time
from pathlib import Path
from glmchat.core.errors import Damaged
from glmchat.jobs.lines import run

def work(request, tell):
    tell({"event": "plan", "words": ["a plan"]})
    print("a library talks")
    if request["do"] == "fail":
        raise Damaged("the file is damaged", hint="fetch it again", code="test.damaged")
    if request["do"] == "refuse":
        raise OSError(28, os.strerror(28), "/disk/file")
    if request["do"] == "die":
        raise RuntimeError("an unforeseen end")
    if request["do"] == "exit":
        os._exit(0)
    half = Path(request["half"])
    try:
        half.write_text("half")
        while request["do"] == "wait":
            tell({"event": "progress", "done": 1, "total": 2})
            time.sleep(0.01)
    finally:
        half.unlink()
    return {"answer": 42}

sys.exit(run(work))
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Starts the job above by the real starter: the interpreter is handed another file to run."""
    file = tmp_path / "job.py"
    file.write_text(JOB)
    popen = subprocess.Popen

    def start(command: list[str], **rest: Any) -> subprocess.Popen[str]:
        return popen([sys.executable, "-P", str(file), *command[4:]], **rest)

    monkeypatch.setattr("glmchat.chat.jobs.subprocess.Popen", start)

    def events(do: str, **more: Any) -> Any:
        return run_job("any", {"do": do, "half": str(tmp_path / "half")}, **more)

    yield events
    assert not (tmp_path / "half").exists()


def test_the_plan_is_told_first_and_the_result_last(job: Any) -> None:
    assert list(job("work")) == [{"event": "plan", "words": ["a plan"]}, {"event": "result", "answer": 42}]


def test_an_error_of_the_tree_comes_through_with_its_class_hint_and_code(job: Any) -> None:
    with pytest.raises(Damaged) as caught:
        list(job("fail"))
    assert caught.value.to_json() == {
        "code": "test.damaged", "message": "the file is damaged", "hint": "fetch it again", "exit": 3
    }  # fmt: skip


@pytest.mark.parametrize(("do", "said"), [("die", "an unforeseen end"), ("exit", "code 0")])
def test_a_job_that_ends_without_a_result_has_died_and_its_last_words_are_told(job: Any, do: str, said: str) -> None:
    with pytest.raises(EngineDied, match=said) as caught:
        list(job(do))
    log = Path(caught.value.hint.rpartition(": ")[2])
    assert "a library talks" in log.read_text() or do == "exit"


def test_a_cancelled_job_takes_away_what_is_half_done_and_says_that_it_was_stopped(job: Any) -> None:
    pressed = threading.Event()
    with pytest.raises(Interrupted, match="stopped"):
        for event in job("wait", cancelled=pressed.is_set):
            if event["event"] == "progress":
                pressed.set()


def test_a_job_ends_when_nobody_listens_any_more(job: Any, tmp_path: Path) -> None:
    events = job("wait")
    assert [next(events)["event"], next(events)["event"]] == ["plan", "progress"]
    assert (tmp_path / "half").exists()
    started = time.monotonic()
    events.close()
    assert not (tmp_path / "half").exists() and time.monotonic() - started < 5


def test_a_job_ends_on_sigint_and_when_the_face_is_killed(tmp_path: Path) -> None:
    file, half = tmp_path / "job.py", tmp_path / "half"
    file.write_text(JOB)
    for end in ("sigint", "stdin"):
        child = subprocess.Popen(
            [sys.executable, "-P", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(json.dumps({"do": "wait", "half": str(half)}) + "\n")
        child.stdin.flush()
        while json.loads(child.stdout.readline())["event"] != "progress":
            pass
        child.send_signal(signal.SIGINT) if end == "sigint" else child.stdin.close()
        *_, last = child.stdout.read().splitlines()
        assert child.wait(60) == 130 and json.loads(last)["event"] == "error" and not half.exists()


def test_only_a_job_that_pulls_is_given_the_hubs_token_and_the_proxies() -> None:
    given = {"HF_TOKEN": "secret", "HTTPS_PROXY": "socks5://p", "no_proxy": "x", "HF_ENDPOINT": "http://hub"}
    keys = {"OPENAI_API_KEY": "key", "GLMCHAT_API_KEY": "key"}
    closed, open_ = (job_environment(pulls=pulls, environ=given | keys) for pulls in (False, True))
    assert "HF_TOKEN" not in closed and "HTTPS_PROXY" not in closed and closed["HF_HUB_OFFLINE"] == "1"
    assert given.items() <= open_.items() and "HF_HUB_OFFLINE" not in open_
    assert not set(keys) & (set(closed) | set(open_))
    assert job_environment(pulls=True, environ={"HF_HUB_OFFLINE": "1"})["HF_HUB_OFFLINE"] == "1"


def test_a_full_disk_is_an_error_in_words(job: Any) -> None:
    with pytest.raises(DoesNotFit, match="/disk/file") as caught:
        list(job("refuse"))
    assert caught.value.code == "file.refused"
