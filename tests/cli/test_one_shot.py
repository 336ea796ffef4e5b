"""One answer on stdout and nothing else there; every ending has its exit code.

Covers cli/run.py, cli/asking.py, cli/output.py, chat/connect.py, chat/answering.py.
"""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from polling import wait_until

from glmchat.chat.history.history import History
from glmchat.cli import output, run
from glmchat.core import locations

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Argv = Callable[..., list[str]]


def lines(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_answer_is_all_that_stdout_holds(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "hello", pieces=["Hi ", "there, ", "你好"])
    assert (done.returncode, done.stdout) == (0, "Hi there, 你好\n")
    assert done.stderr == ""


def test_json_lines_have_their_promised_form(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "hello", "--json", "--temp", "0", "--seed", "5", "--system", "S", pieces=["a", "b"])
    start, *texts, end = lines(done)
    assert done.returncode == 0
    assert set(start) == {"event", "model", "revision", "quant", "adapter", "prompt_tokens"}
    assert start["event"] == "start" and start["prompt_tokens"] == len("<system>S<user>hello<assistant>")
    assert start["adapter"] is None and start["model"] == str(model)
    assert texts == [{"event": "text", "text": "a"}, {"event": "text", "text": "b"}]
    assert set(end) == {
        "event", "finish_reason", "prompt_tokens", "completion_tokens", "token_ids", "ttft_seconds",
        "prefill_tokens_per_second", "decode_tokens_per_second", "load_seconds", "seed",
    }  # fmt: skip
    assert (end["finish_reason"], end["completion_tokens"], end["token_ids"], end["seed"]) == ("stop", 2, [0, 1], 5)
    assert end["load_seconds"] is not None and end["ttft_seconds"] is not None


def test_the_chat_template_is_told_what_the_flag_says(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "hi", "--json", "--template-var", "enable_thinking=false")
    assert lines(done)[0]["prompt_tokens"] == len("{enable_thinking=False}<user>hi<assistant>")
    refused = glmchat("run", model, "hi", "--template-var", "enable_thinking")
    assert refused.returncode == 2 and "enable_thinking=false" in refused.stderr


def test_minus_one_is_no_limit_and_no_fixed_seed(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "hi", "--json", "-n", "-1", "--seed", "-1", "--top-k", "-1", pieces=["a", "b"])
    assert done.returncode == 0 and lines(done)[-1]["finish_reason"] == "stop"
    refused = glmchat("run", model, "hi", "-n", "0")
    assert refused.returncode == 2 and "between 1 and" in refused.stderr


def test_with_a_server_alone_the_first_word_is_the_model_and_that_is_said(glmchat: Run) -> None:
    done = glmchat("run", "--server", "http://127.0.0.1:9", "hi")
    assert done.returncode == 2 and "the first word names the model" in done.stderr


def test_an_id_without_text_makes_no_text_event(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "x", "--json", pieces=["a", "", "b", ""])
    assert [event["text"] for event in lines(done) if event["event"] == "text"] == ["a", "b"]
    assert lines(done)[-1]["token_ids"] == [0, 1, 2, 3]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_under_stdout_is_one_line_and_exit_4(fake_argv: Argv, model: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            fake_argv({}, "run", model, "x", "--json"),
            stdout=full,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=60,
        )
    assert done.returncode == 4 and done.stderr.startswith("glmchat: the output cannot be written")
    assert len(done.stderr.splitlines()) == 2


def test_reaching_the_limit_of_tokens_says_so(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "x", "--max-tokens", "2", pieces=["a", "b", "c"])
    assert (done.returncode, done.stdout) == (0, "ab\n") and "--max-tokens" in done.stderr
    done = glmchat("run", model, "x", "-n", "2", "--json", pieces=["a", "b", "c"])
    assert lines(done)[-1]["finish_reason"] == "length"


def test_stdin_follows_the_prompt_after_a_blank_line(glmchat: Run, model: Path) -> None:
    assert glmchat("run", model, "Sum up:", stdin="文\nmore\n".encode(), echo=True).stdout == "Sum up:\n\n文\nmore\n"
    assert glmchat("run", model, stdin=b"only this", echo=True).stdout == "only this\n"
    assert glmchat("run", model, "-p", "x", stdin=b"\xef\xbb\xbfbom", echo=True).stdout == "x\n\nbom\n"


def test_a_closed_stdin_is_an_empty_one(fake_argv: Argv, model: Path) -> None:
    argv = fake_argv({"echo": True}, "run", model, "hello")
    done = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *argv], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"hello\n")


def test_messages_come_from_a_file_or_stdin(glmchat: Run, model: Path, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "二"},
    ]
    file = tmp_path / "m.json"
    file.write_text(json.dumps(messages))
    assert glmchat("run", model, "--messages", file, stdin=b"not read", echo=True).stdout == "二\n"
    done = glmchat(
        "run", model, "--messages", "-", "--json", stdin=json.dumps({"messages": messages}).encode(), echo=True
    )
    assert lines(done)[0]["prompt_tokens"] == len("<user>one<assistant>1<user>二<assistant>")


@pytest.mark.parametrize(
    ("arguments", "stdin", "exit_code", "words"),
    [
        (["hi"], b"\xff\xfe", 2, "not UTF-8"),
        ([], b"", 2, "no prompt"),
        ([" \n "], b"\n \t", 2, "no prompt"),
        (["hi", "-p", "ho"], b"", 2, "conflict"),
        (["hi", "--messages", "x.json"], b"", 2, "conflict"),
        (["hi", "-c", "--resume", "1"], b"", 2, "conflict"),
        (["hi", "-c", "--no-history"], b"", 2, "conflict"),
        (["hi", "-c"], b"", 2, "no conversation to continue"),
        (["hi", "--resume", "99"], b"", 2, "no conversation 99"),
        (["hi", "--resume", "9" * 30], b"", 2, "no conversation 999"),
        (["hi", "--temp", "99"], b"", 2, "temperature"),
        (["hi", "--top-p", "nan"], b"", 2, "top_p"),
        (["hi", "--quant", "5"], b"", 2, "--quant"),
        (["hi", "--dtype", "float8"], b"", 2, "--dtype"),
        (["hi", "--server", "http://127.0.0.1:9", "--quant", "4"], b"", 2, "--server"),
        (["hi", "--server", "http://127.0.0.1:9"], b"", 1, "nothing is listening"),
        (["--messages", "/nonexistent"], b"", 2, "cannot be read"),
        (["--messages", "-"], b'[{"role": "boss", "content": "x"}]', 2, "message 1"),
        (["x" * 5000], b"", 4, "4096"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_hint(
    glmchat: Run, model: Path, arguments: list[str], stdin: bytes, exit_code: int, words: str
) -> None:
    done = glmchat("run", model, *arguments, "--json", stdin=stdin)
    assert done.returncode == exit_code, done.stderr
    error = lines(done)[-1]
    assert error["event"] == "error" and error["exit"] == exit_code and error["hint"]
    assert words in error["message"]
    assert done.stderr.splitlines()[0].startswith("glmchat: ") and "Traceback" not in done.stderr


def test_a_model_that_is_not_here_names_the_pull_line(glmchat: Run) -> None:
    done = glmchat("run", "smollm2", "hi")
    assert done.returncode == 1 and "glmchat pull smollm2" in done.stderr and done.stdout == ""
    done = glmchat("run", "smolm2", "hi")
    assert done.returncode == 2 and "did you mean smollm2" in done.stderr
    done = glmchat("run", "-p", "hi")
    assert done.returncode == 2 and "glmchat pull smollm2" in done.stderr


def test_a_model_that_was_not_named_is_named_on_stderr(
    glmchat: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLMCHAT_MODEL", str(model))
    done = glmchat("run", "-p", "hi", pieces=["ok"])
    assert (done.returncode, done.stdout) == (0, "ok\n") and "GLMCHAT_MODEL" in done.stderr


def test_a_conversation_goes_on_from_run_to_run(glmchat: Run, model: Path) -> None:
    glmchat("run", model, "first", "--system", "Be brief.", pieces=["A"])
    done = glmchat("run", "-c", "-p", "second", "--json", pieces=["B"])
    assert lines(done)[0]["prompt_tokens"] == len("<system>Be brief.<user>first<assistant>A<user>second<assistant>")
    glmchat("run", model, "elsewhere", "--no-history")
    done = glmchat("run", model, "--resume", "1", "-p", "third", pieces=["C"])
    assert done.stdout == "C\n"
    with History.default() as history:
        (head,) = history.conversations()
        assert [m.text for m in history.load(head.id).path()] == ["first", "A", "second", "B", "third", "C"]
    shown = json.loads(glmchat("history", "show", "1", "--json").stdout)
    assert [m["text"] for m in shown["messages"]] == ["first", "A", "second", "B", "third", "C"]
    assert shown["settings"]["system"] == "Be brief."


def test_ctrl_c_keeps_what_was_said_and_exits_130(fake_argv: Argv, model: Path) -> None:
    argv = fake_argv({"pieces": ["word "] * 500, "seconds_per_token": 0.02}, "run", model, "go", "--json")
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for _ in range(6):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    end = json.loads(out.splitlines()[-1])
    assert process.returncode == 130
    assert (end["event"], end["finish_reason"]) == ("end", "cancelled") and len(end["token_ids"]) >= 5
    with History.default() as history:
        answer = history.load(1).path()[-1]
    assert answer.state == "stopped" and answer.text.count("word") == len(end["token_ids"])


def test_ctrl_c_while_loading_exits_130(fake_argv: Argv, model: Path) -> None:
    argv = fake_argv({"seconds_to_load": 30}, "run", model, "go")
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: list(locations.logs_dir().glob("*")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and "Traceback" not in err


def test_a_reader_that_goes_away_is_no_failure_to_talk_about(fake_argv: Argv, model: Path) -> None:
    argv = fake_argv({"pieces": ["word\n"] * 2000, "seconds_per_token": 0.001}, "run", model, "go")
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) in (0, 1) and err == b""
    with History.default() as history:
        assert history.load(1).path()[-1].state == "stopped"


def test_an_engine_that_dies_is_told_with_its_cause_and_what_it_said_is_kept(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "go", "--json", pieces=["word "] * 500, seconds_per_token=0.02, die_after=30)
    events = lines(done)
    assert done.returncode == 1 and events[-1]["event"] == "error" and events[-1]["code"].startswith("engine.")
    with History.default() as history:
        answer = history.load(1).path()[-1]
    assert answer.state == "failed"
    assert answer.text == "".join(e["text"] for e in events if e["event"] == "text")


def test_control_sequences_are_shown_on_a_terminal_and_verbatim_in_a_pipe(
    fake_argv: Argv, glmchat: Run, model: Path
) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2Jred\u202e"
    assert glmchat("run", model, "x", pieces=[hostile]).stdout == hostile + "\n"
    shown = on_terminal(fake_argv({"pieces": [hostile]}, "run", model, "x"))
    assert b"\x1b]0" not in shown and b"\x1b[2J" not in shown and "␛[2Jred<U+202E>".encode() in shown


def on_terminal(argv: list[str], keys: bytes = b"", until: bytes | None = None) -> bytes:
    """What a command writes on a terminal of its own."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(argv, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen, deadline, typed = b"", time.monotonic() + 40, False
    while time.monotonic() < deadline:
        if select.select([controller], [], [], 0.1)[0]:
            try:
                part = os.read(controller, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
        if not typed and (until is None or until in seen):
            os.write(controller, keys)
            typed = True
        if process.poll() is not None and not select.select([controller], [], [], 0)[0]:
            break
    process.wait(timeout=60)
    os.close(controller)
    return seen


def test_on_a_terminal_the_pull_is_shown_and_asked_for(fake_argv: Argv) -> None:
    shown = on_terminal(fake_argv({}, "run", "smollm2", "hi"), keys=b"n\n", until=b"[y/N]").decode()
    assert "MB to fetch" in shown and "glmchat pull smollm2" in shown and "Traceback" not in shown


def test_no_stream_prints_the_same_answer(glmchat: Run, model: Path) -> None:
    assert glmchat("run", model, "x", "--no-stream", pieces=["a", "b\n"]).stdout == "ab\n"


def test_a_text_is_completed_without_a_template(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "Once upon", "--complete", "--json", pieces=[" a", " time"])
    assert lines(done)[0]["prompt_tokens"] == len("Once upon")
    assert "".join(e["text"] for e in lines(done) if e["event"] == "text") == " a time"


def test_no_history_leaves_no_trace(glmchat: Run, model: Path) -> None:
    assert glmchat("run", model, "secret", "--no-history").returncode == 0
    assert not locations.history_file().exists()


def test_a_home_that_cannot_be_written_costs_the_saving_only(glmchat: Run, model: Path, own_home: Path) -> None:
    locations.data_dir().parent.mkdir(parents=True, exist_ok=True)
    locations.data_dir().write_text("a file where the folder should be")
    done = glmchat("run", model, "x", pieces=["fine"])
    assert (done.returncode, done.stdout) == (0, "fine\n") and "not saved" in done.stderr


def test_both_spellings_of_flags_are_taken(glmchat: Run, model: Path) -> None:
    done = glmchat("run", model, "x", "--top_p", "0.5", "--temperature", "0.1", "--max_tokens", "3", "--min-p", "0.1")
    assert done.returncode == 0
    with History.default() as history:
        sampling = history.load(1).path()[-1].details["sampling"]
    assert (sampling["top_p"], sampling["temperature"], sampling["max_tokens"]) == (0.5, 0.1, 3)


def test_the_command_imports_neither_torch_nor_textual() -> None:
    heavy = "{'torch', 'textual', 'huggingface_hub'}"
    code = f"import glmchat.cli.run, glmchat.cli.history, sys; print({heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_a_plain_one_shot_loads_nothing_that_only_other_starts_need(model: Path) -> None:
    """Typer would load pydantic for flags that nobody typed, and the window alone has an event loop."""
    needless = "{'pydantic', 'asyncio', 'textual', 'torch'}"
    code = f"import sys; from glmchat.cli.main import run; run({['show', str(model)]!r})"
    code += f"; import glmchat.cli.one_shot; print({needless} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_plain_lines_stay_plain_when_what_is_said_goes_into_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """`glmchat run M --plain | tee log`: the terminal is typed at, and stdout is a pipe."""
    monkeypatch.setattr(output, "is_terminal", lambda stream: stream is sys.stdin)
    assert run._mode(run._Question(None), plain=True, as_json=False) == "plain"
    assert run._mode(run._Question(None), plain=False, as_json=False) == "once"
    assert run._mode(run._Question("hi"), plain=True, as_json=False) == "once"
