"""Every file that glmchat writes or reads as its own, damaged in every way: no command ends in a traceback or waits.

What the damaged file tells of may be missing, and then something says so; what other files tell of is still there. A
file that a command writes and that is not in the table fails the first test.

Covers hub/aliases.py.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import WEIGHTS
from strange_files import STRANGE, put

from glmchat.chat.history.history import History
from glmchat.core import locations
from glmchat.core.fingerprints import fingerprint

Run = Callable[..., "subprocess.CompletedProcess[str]"]
SECONDS = 20.0  # for all commands of a case; they take one together

# The files of a home, below GLMCHAT_HOME; a star stands for a name.
FILES = (
    "config/config.toml",
    "config/models.toml",
    "data/adapters/poet/glmchat.json",
    "data/adapters/poet/adapter_config.json",
    "data/aliases.json",
    "data/history.db",
    "data/manifests/alpha@path.json",
    "data/models/made/glmchat.json",
    "state/fingerprints.json",
    "state/last-model.json",
    "state/plain-prompts",
)
# Written, but read by nobody or only shown.
NOT_READ = (
    "state/clipboard.txt",
    "state/logs/*",
    "data/history.db-*",
    "data/manifests/beta@path.json",
    "data/models/made/*",
    "data/adapters/poet/adapter_model.safetensors",
    "cache/vocabularies.json",  # written where a vocabulary was tried; tests/checkpoints/test_vocabulary_trial.py
)


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    return folder


def note_of(folder: Path, **facts: Any) -> str:
    files = [{"path": path.name, "size": path.stat().st_size, "sha256": None} for path in sorted(folder.iterdir())]
    return json.dumps(
        {"format": 1, "name": folder.name, "source": "made", "root": str(folder), "files": files, **facts}
    )


@pytest.fixture
def home(glmchat: Run, tmp_path: Path, own_home: Path) -> Path:
    """A home that was in use: two models, a copy, an adapter, a second name, conversations, settings."""
    for name in ("alpha", "beta"):
        assert glmchat("add", write_model(tmp_path / name), "--name", name).returncode == 0
    assert glmchat("alias", "short", "alpha").returncode == 0
    with History.default() as history:
        tree = history.new("alpha")
        history.append(tree, "user", "question")
    made = write_model(locations.models_dir() / "made")
    (made / "glmchat.json").write_text(note_of(made, kind="quantized", quant="int4"))
    adapter = locations.adapters_dir() / "poet"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x"}')
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (adapter / "glmchat.json").write_text(note_of(adapter, kind="adapter", adapter={"kind": "lora", "rank": 4}))
    locations.config_dir().mkdir(parents=True, exist_ok=True)
    locations.config_file().write_text('default_model = "alpha"\n')
    locations.user_catalogue().write_text("")
    fingerprint([made / "model.safetensors"])
    (locations.state_dir() / "plain-prompts").write_text("hello\n")
    return own_home / "glmchat"


def _retyped(path: Path) -> None:
    """Every value of an object to something of another type; the names stay."""
    try:
        data = json.loads(path.read_bytes())
    except ValueError:
        return
    path.write_text(json.dumps({key: 7 if isinstance(value, str | list | dict) else [] for key, value in data.items()}))


def _link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES: Mapping[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "random": lambda path: path.write_bytes(random.Random(7).randbytes(3000)),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "UTF-16": lambda path: path.write_bytes(path.read_bytes().decode("utf-8", "replace").encode("utf-16")),
    "more behind it": lambda path: path.write_bytes(path.read_bytes() + b"\xff\x00{"),
    "a list": lambda path: path.write_text("[]"),
    "too deep": lambda path: path.write_text("[" * 100_000),
    "half a character": lambda path: path.write_text('{"name": "\\ud800", "root": "\\ud800", "path": "\\ud800"}'),
    "other types": _retyped,
    "link to nowhere": _link_to_nowhere,
    **{kind: partial(put, kind) for kind in STRANGE},
}  # fmt: skip
# command -> what it must still say whatever one file is like, but for those files
COMMANDS: Mapping[tuple[str, ...], tuple[str, tuple[str, ...]]] = {
    ("list",): ("beta", ("config/models.toml",)),
    ("show", "beta"): ("beta", ("config/models.toml",)),
    ("adapters", "list"): ("", ()),
    ("adapters", "show", "poet"): ("", ()),
    ("alias",): ("", ()),
    ("history", "list"): ("", ()),
    ("history", "search", "question"): ("", ()),
    ("prune", "--dry-run"): ("", ()),
    ("verify", "beta"): ("", ()),
    ("lock",): ("", ()),
}


def below(home: Path) -> Iterator[str]:
    yield from (path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())


def test_every_file_that_commands_write_into_a_home_is_in_the_table(home: Path) -> None:
    unknown = [name for name in below(home) if name not in FILES and not any(Path(name).match(p) for p in NOT_READ)]
    assert not unknown, "damage these too"
    assert set(FILES) <= set(below(home)), "nothing writes these any more"


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_ends_no_command_and_hides_nothing_else(glmchat: Run, home: Path, file: str) -> None:
    whole = home.with_name("whole")
    shutil.copytree(home, whole)
    for name, damage in DAMAGES.items():
        shutil.rmtree(home)
        shutil.copytree(whole, home)
        damage(home / file)
        began = time.monotonic()
        for command, (word, but) in COMMANDS.items():
            done = glmchat(*command)
            assert done.returncode in (0, 1, 2, 3, 4), (name, done)
            assert "Traceback" not in done.stderr, (name, done)
            if file not in but:
                assert word in done.stdout, (name, done)
            if done.returncode:
                assert "hint" in done.stderr, (name, done)
        assert time.monotonic() - began < SECONDS, name


def test_a_damaged_record_of_a_model_is_named_in_the_list(glmchat: Run, home: Path) -> None:
    for file in ("data/manifests/alpha@path.json", "data/models/made/glmchat.json"):
        (home / file).write_bytes(b"\x00")
    said = glmchat("list").stderr
    assert "alpha@path.json is damaged" in said and "made/glmchat.json is damaged" in said
    assert "alpha@path.json" in glmchat("prune", "--dry-run").stdout


def test_damaged_aliases_are_set_aside_said_once_and_begun_anew(glmchat: Run, home: Path) -> None:
    (home / "data" / "aliases.json").write_bytes(b"\x93broken")
    first = glmchat("show", "alpha")
    assert first.returncode == 0 and "aliases.json.corrupt-" in first.stderr
    (aside,) = (home / "data").glob("aliases.json.corrupt-*")
    assert aside.read_bytes() == b"\x93broken"
    assert "corrupt" not in glmchat("show", "alpha").stderr
    assert glmchat("alias", "again", "alpha").returncode == 0
    assert "again" in glmchat("alias").stdout


@pytest.mark.parametrize("kind", [*STRANGE, "null"])
def test_what_stands_in_the_place_of_the_history_is_said_and_left_alone(glmchat: Run, home: Path, kind: str) -> None:
    path = home / "data" / "history.db"
    if kind == "null":
        path.unlink()
        path.symlink_to("/dev/null")
    else:
        put(kind, path)
    modes = {device: device.stat().st_mode for device in map(Path, ("/dev/zero", "/dev/full", "/dev/null", "/dev/tty"))}
    done = glmchat("history", "list")
    assert done.returncode == 0 and (str(path) in done.stderr or "history.db.corrupt" in done.stderr)
    assert modes == {device: device.stat().st_mode for device in modes}, "a device was given other rights"


@pytest.mark.parametrize("kind", [*STRANGE, "somebody's file"])
@pytest.mark.parametrize(
    "file", ["data/aliases.json", "data/history.db", "state/fingerprints.json", "state/last-model.json"]
)
def test_what_stands_where_a_command_writes_is_replaced_or_refused_and_never_written_through(
    glmchat: Run, home: Path, tmp_path: Path, file: str, kind: str
) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("theirs")
    theirs.chmod(0o644)
    devices = {name: Path(name).stat().st_mode for name in ("/dev/zero", "/dev/full", "/dev/tty")}
    if kind == "somebody's file":
        (home / file).unlink()
        (home / file).symlink_to(theirs)
    else:
        put(kind, home / file)
    began = time.monotonic()
    conversation = tmp_path / "c.json"
    conversation.write_text('[{"role": "user", "content": "hello"}]')
    gamma = write_model(tmp_path / "gamma")
    for command in (
        ("alias", "again", "beta"),
        ("add", gamma, "--name", "gamma"),
        ("history", "import", conversation),
        ("verify", "beta"),
    ):
        done = glmchat(*command)
        assert done.returncode in (0, 1, 3, 4) and "Traceback" not in done.stderr, done
        if done.returncode:
            assert "hint" in done.stderr, done
    assert time.monotonic() - began < SECONDS
    assert (theirs.read_text(), theirs.stat().st_mode & 0o777) == ("theirs", 0o644)
    assert devices == {name: Path(name).stat().st_mode for name in devices}
    assert "beta" in glmchat("list").stdout
