"""`glmchat compare` as scripts and people see it.

Covers cli/compare.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glmchat.chat.history.history import History

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_json_lines_carry_their_column_and_identity(glmchat: Run, model: Path) -> None:
    done = glmchat("compare", "-p", "hello", model, ",temp=0", "--set", "seed=3", "--json", "--pick", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert lines[0]["event"] == "start" and [c["column"] for c in lines[0]["columns"]] == [0, 1]
    ends = sorted((line for line in lines if line["event"] == "end"), key=lambda line: int(line["column"]))
    assert [(e["column"], e["token_ids"], e["seed"]) for e in ends] == [(0, [0, 1], 3), (1, [0, 1], 3)]
    assert lines[-1]["event"] == "done"
    with History.default() as history:
        tree = history.load(lines[-1]["conversation"])
    assert tree.path()[-1].details["sampling"]["temperature"] == 0


def test_people_read_one_answer_after_the_other(glmchat: Run, model: Path) -> None:
    done = glmchat("compare", "-p", "hello", model, "")
    assert done.stdout == f"== 1  {model}\none two\n== 2  \none two\n"
    assert "2 tokens" in done.stderr and "--pick" in done.stderr


def test_wrong_columns_are_refused_before_anything_loads(glmchat: Run, model: Path) -> None:
    assert glmchat("compare", "-p", "hello", model).returncode == 2
    assert glmchat("compare", "-p", "hello", model, "+nobody").returncode == 2
    assert glmchat("compare", "-p", "hello", model, ",colour=red").returncode == 2
    assert glmchat("compare", model, ",temp=0").returncode == 2
    assert glmchat("compare", "-p", "hello", model, "", "--pick", 3).returncode == 2


def test_an_interrupt_keeps_what_was_said_and_begins_no_other(fake_argv: Callable[..., list[str]], model: Path) -> None:
    behaviour: dict[str, Any] = {"repeat": 500, "seconds_per_token": 0.02}
    command = fake_argv(behaviour, "compare", "-p", "hi", model, ",temp=0", "--one-by-one", "--json")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ), text=True)
    assert child.stdout is not None
    events = []
    for line in child.stdout:
        events.append(json.loads(line))
        if events[-1]["event"] == "text":
            child.send_signal(signal.SIGINT)
            break
    events += [json.loads(line) for line in child.stdout]
    assert child.wait() == 130
    assert [e["column"] for e in events if e["event"] == "end"] == [0] and events[-1]["event"] == "done"
    with History.default() as history:
        tree = history.load(events[-1]["conversation"])
    (answer,) = (m for m in tree.messages.values() if m.role == "assistant")
    assert answer.state == "stopped" and answer.text.startswith("one ")


def test_a_kill_half_way_loses_nothing(fake_argv: Callable[..., list[str]], glmchat: Run, model: Path) -> None:
    behaviour: dict[str, Any] = {"repeat": 50, "seconds_per_token": 0.02}
    command = fake_argv(behaviour, "compare", "-p", "hello", model, ",temp=0", "--one-by-one", "--json")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ), text=True)
    assert child.stdout is not None
    heard = ""
    for line in child.stdout:
        event = json.loads(line)
        heard += event["text"] if event["event"] == "text" and event["column"] == 1 else ""
        if len(heard) > len("one two" * 40):  # 0.8 s of it: the first half is on the disk
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with History.default() as history:
        head = history.last()
        assert head is not None
        tree = history.load(head.id)
        first, second = sorted((m for m in tree.messages.values() if m.role == "assistant"), key=lambda m: m.id)
    assert first.state == "complete" and first.text == "one two" * 50
    assert second.state == "interrupted" and second.text.startswith("one two")
    done = glmchat("compare", "--resume", head.id, "--json")
    assert done.returncode == 0 and '"column": 0' in done.stdout.splitlines()[0]
    with History.default() as history:
        answer = history.load(head.id).messages[second.id]
    assert answer.state == "complete" and answer.text.startswith(second.text) and len(answer.text) > len(second.text)


def test_a_kill_while_two_are_written_together_loses_nothing(
    fake_argv: Callable[..., list[str]], glmchat: Run, model: Path
) -> None:
    behaviour: dict[str, Any] = {"repeat": 50, "seconds_per_token": 0.02, "parallel": 2}
    command = fake_argv(behaviour, "compare", "-p", "hello", model, ",temp=0", "--json")
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ), text=True)
    assert child.stdout is not None
    heard = {0: "", 1: ""}
    for line in child.stdout:
        event = json.loads(line)
        if event["event"] == "text":
            heard[event["column"]] += event["text"]
        if min(len(text) for text in heard.values()) > len("one two" * 40):
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with History.default() as history:
        head = history.last()
        assert head is not None
        before = {m.id: m for m in history.load(head.id).messages.values() if m.role == "assistant"}
    assert [m.state for m in before.values()] == ["interrupted"] * 2
    assert all(m.text.startswith("one two") for m in before.values())
    assert glmchat("compare", "--resume", head.id, "--json").returncode == 0
    with History.default() as history:
        after = history.load(head.id).messages
    for number, m in before.items():
        assert after[number].state == "complete" and after[number].text.startswith(m.text)
