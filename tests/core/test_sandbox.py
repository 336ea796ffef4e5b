"""A helper process has no secrets, answers within a time, and ends with whoever started it."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from glmchat.core.sandbox import Sandbox

LINES = "glmchat.engine.prompts.template_process"  # one that answers lines
LATER = "code"  # Python's own prompt, which waits for lines and never says that it is ready


def test_it_answers_lines_and_has_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("GLMCHAT_API_KEY", "sk-secret")
    helper = Sandbox(LINES)
    assert helper.obstacle() is None
    assert helper.send({"template": "{{ 1 }}"}) > 10
    assert helper.reply(10.0) == {"ok": True}
    if sys.platform.startswith("linux"):
        process = Path(f"/proc/{helper.process.pid}")
        assert b"secret" not in (process / "environ").read_bytes()
        assert (process / "cwd").readlink() == Path("/")
    helper.stop()
    assert helper.process.poll() is not None


def test_one_that_does_not_start_says_why_in_its_own_words() -> None:
    helper = Sandbox("glmchat.no_such_program")
    assert "No module named" in str(helper.obstacle())
    assert helper.process.poll() is not None


def test_a_reply_that_does_not_come_is_late_and_one_that_cannot_come_is_told() -> None:
    helper = Sandbox(LATER)
    assert "late" in helper.reply(0.1)
    helper.process.kill()
    assert helper.reply(10.0) == {"died": True}
    assert helper.send({"to": "nobody"}) > 0
    helper.stop()


def test_a_reply_beyond_its_bound_is_none() -> None:
    helper = Sandbox(LINES)
    assert helper.obstacle() is None
    helper.send({"template": "{{ 'a' * 100000 }}"})
    assert helper.reply(10.0) == {"ok": True}
    helper.send({"messages": [], "variables": {}, "tokens": {}, "add_generation_prompt": False})
    assert helper.reply(10.0, largest=1000) == {"died": True}
    helper.stop()


def test_it_ends_with_the_object_that_stands_for_it() -> None:
    helper = Sandbox(LATER)
    process = helper.process
    del helper
    gc.collect()
    assert process.poll() is not None


def test_a_process_that_confined_itself_gets_no_more_memory() -> None:
    lines = "from glmchat.core.sandbox import confine\nconfine(256 * 2**20)\nbytearray(400 * 2**20)"
    done = subprocess.run([sys.executable, "-P", "-c", lines], capture_output=True, text=True, check=False)
    if sys.platform.startswith("linux"):
        assert done.returncode == 1 and "MemoryError" in done.stderr
