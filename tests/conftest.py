"""What every test may use: a home of its own, the real starter model, the shared reference material."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the fakes are imported by name: `from fakes import FakeEngine`
KEPT = ("GLMCHAT_STARTER", "GLMCHAT_TEST_WHEEL")  # what `make` tells the tests
STARTER = "SmolLM2-135M-Instruct.Q4_1.gguf"


# A shell makes what it starts in the background ignore Ctrl-C, nohup makes it ignore a hangup, and every child inherits
# that. Tests that signal a child must not depend on how they themselves were started.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


# How fast a machine draws examples says nothing of what is tested with them.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


def pytest_sessionstart(session: pytest.Session) -> None:
    """With a C kernel that is older than its files the tests would pass over it, and answers would have other bits."""
    if os.environ.get("GLMCHAT_TEST_WHEEL"):
        return
    folder = ROOT / "engine" / "native"
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.[ch]")))).hexdigest()
    for library in folder.glob("_native*.so"):
        if sources.encode() not in library.read_bytes():
            command = f"{sys.executable} -P -m pip install --no-deps -e {ROOT}"
            pytest.exit(
                f"{library.name} was built from other C files than those beside it: `{command}` builds it again", 4
            )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A plain run says how many tests were left out and why, the commonest reason first."""
    reports = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason}")
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_line(f"passed or failed at the second try only: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What plays in a terminal or a window is tried twice, and the run says so: a busy machine can stop a program
    between two keys for longer than a person would wait. What is wrong fails twice.
    """
    for item in items:
        if isinstance(item, pytest.Function) and {"pty", "TerminalSession", "open_window"} & vars(item.module).keys():
            item.add_marker(pytest.mark.flaky(reruns=1))


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test reads or writes the home of the person who runs it, nor its settings, tokens and proxies.

    A vocabulary that one test tried is known to the next, as it is to a person's next start.
    """
    home = tmp_path_factory.mktemp("home")
    tried, notes = (
        tmp_path_factory.getbasetemp() / "vocabularies.json",
        home / "glmchat" / "cache" / "vocabularies.json",
    )
    if tried.is_file():
        notes.parent.mkdir(parents=True, mode=0o700)
        shutil.copyfile(tried, notes)
    for name in list(os.environ):
        if name not in KEPT and (name.startswith(("GLMCHAT_", "HF_", "XDG_")) or name.lower().endswith("_proxy")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("GLMCHAT_HOME", str(home / "glmchat"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.setenv("GLMCHAT_LANG", "en")
    monkeypatch.setenv(
        "GLMCHAT_KEEP_ALIVE", "0"
    )  # an engine ends with its test; what is about warm ones says otherwise
    monkeypatch.setenv("GLMCHAT_TITLES", "never")  # what is about them says otherwise
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield home
    if notes.is_file():
        shutil.copyfile(notes, tried)


@pytest.fixture
def adds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters are read and stored in this process, for tests that are about what is refused and not about its job."""
    from glmchat.core.errors import GlmchatError
    from glmchat.jobs import add_adapter

    def run_here(name: str, request: Mapping[str, Any], **_: object) -> Iterator[dict[str, Any]]:
        assert name == "add_adapter"
        told: list[Any] = []
        try:
            result = add_adapter.work(json.loads(json.dumps(request)), told.append)
        except GlmchatError as problem:
            raise GlmchatError.from_json(json.loads(json.dumps(problem.to_json()))) from None
        yield from json.loads(json.dumps([*told, {"event": "result", **result}]))

    monkeypatch.setattr("glmchat.chat.jobs.run_job", run_here)


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The real SmolLM2-135M-Instruct GGUF. `make test` fetches it; elsewhere GLMCHAT_STARTER names it."""
    named = os.environ.get("GLMCHAT_STARTER")
    path = Path(named) if named else ROOT / ".test-cache" / "data" / "models" / "smollm2" / STARTER
    if not path.is_file():
        pytest.skip(f"the starter model is not at {path}: `make test` fetches it")
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference vectors and real tokenizers; they stay outside the repository (licences)."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("../shared with the reference vectors is absent")
    return path
