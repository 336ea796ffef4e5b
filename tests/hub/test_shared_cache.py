"""Users and one cache of a group: one finishes what another began, and takes nothing of the other's away.

Covers hub/store.py, hub/removal.py. Needs root, who becomes other users that have none of root's rights.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import odd_models
import pytest
from loopback_hub import LoopbackHub
from other_users import GROUP, as_user, why_not
from polling import wait_until

USERS = {"a": 20001, "b": 20002, "c": 20003, "d": 20004}
SIZE = 3_000_000

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture
def place() -> Iterator[Path]:
    """A cache of the group (2775) and a home for each user, where every user can come."""
    folder = Path(tempfile.mkdtemp(prefix="glmchat-shared-"))
    folder.chmod(0o755)
    (folder / "cache").mkdir()
    os.chown(folder / "cache", 0, GROUP)
    (folder / "cache").chmod(0o2775)
    for name, user in USERS.items():
        (folder / name).mkdir()
        os.chown(folder / name, user, user)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    model = odd_models.llama(tmp_path / "model", weights=False)
    names = ("config.json", "tokenizer.json", "tokenizer_config.json")
    files: dict[str, Any] = {name: (model / name).read_bytes() for name in names}
    config = {**json.loads(files["config.json"]), "model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    files["config.json"] = json.dumps(config).encode()  # a type whose tensors may have any names
    header = json.dumps({"x": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    data = len(header).to_bytes(8, "little") + header + random.Random(3).randbytes(SIZE)
    with LoopbackHub(rate=400_000) as running:
        running.add("acme/tiny", {**files, "model.safetensors": data})
        yield running


def command(place: Path, user: str, *words: str, url: str = "") -> list[str]:
    home = place / user
    settings = {"HOME": home, "GLMCHAT_HOME": home / "glmchat", "HF_HUB_CACHE": place / "cache", "HF_ENDPOINT": url,
                "GLMCHAT_LANG": "en", "PATH": os.environ["PATH"]}  # fmt: skip
    given = [f"{name}={value}" for name, value in settings.items()]
    run = [sys.executable, "-P", "-m", "glmchat", *words]
    return [*as_user(USERS[user]), "env", "-i", *given, "sh", "-c", 'umask 0002; exec "$@"', "sh", *run]


def glmchat(place: Path, user: str, *words: str, url: str = "") -> subprocess.CompletedProcess[str]:
    line = command(place, user, *words, url=url)
    return subprocess.run(line, capture_output=True, text=True, cwd="/", check=False)


def half_files(place: Path) -> list[Path]:
    return [path for path in (place / "cache").rglob("*.glmchat.incomplete") if path.stat().st_size > 100_000]


def test_what_one_user_began_the_other_finishes_and_prune_takes_nothing_of_the_others(
    place: Path, hub: LoopbackHub
) -> None:
    line = command(place, "a", "pull", "acme/tiny", "--quiet", url=hub.url)
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/") as pull:
        wait_until(lambda: bool(half_files(place)))
        pull.kill()
    (half,) = half_files(place)
    begun = half.stat().st_size
    assert half.stat().st_uid == USERS["a"]

    assert glmchat(place, "b", "prune", "--yes").returncode == 0
    assert half.stat().st_size == begun, "what a began is a's to take away"

    hub.rate = None
    done = glmchat(place, "b", "pull", "acme/tiny", "--quiet", url=hub.url)
    assert done.returncode == 0, done.stderr
    assert hub.sent_for("model.safetensors") < SIZE + 1_500_000, "b goes on where a was"
    for user in USERS:
        shown = json.loads(glmchat(place, user, "show", "acme/tiny", "--json").stdout)
        assert shown["complete"] and shown["problem"] is None, user
        assert glmchat(place, user, "verify", "acme/tiny").returncode == 0, user
    for path in (place / "cache").rglob("*"):
        state = path.lstat()
        if stat.S_ISLNK(state.st_mode):
            continue
        assert state.st_gid == GROUP, path
        assert stat.S_IMODE(state.st_mode) == (0o2775 if path.is_dir() else 0o664), path


def test_what_is_written_for_one_user_alone_is_told_to_the_other_in_one_line(place: Path, hub: LoopbackHub) -> None:
    hub.rate = None
    assert glmchat(place, "a", "pull", "acme/tiny", "--quiet", url=hub.url).returncode == 0
    for folder in (place / "cache").rglob("*"):
        if folder.is_dir():
            folder.chmod(0o2755)
    assert json.loads(glmchat(place, "b", "show", "acme/tiny", "--json").stdout)["complete"]
    removed = glmchat(place, "b", "rm", "acme/tiny", "--yes")
    lines = removed.stderr.splitlines()
    assert removed.returncode == 1 and "Permission denied" in lines[0] and lines[1].startswith("  hint: ")
    assert json.loads(glmchat(place, "a", "show", "acme/tiny", "--json").stdout)["complete"]


def test_no_user_here_reads_what_is_roots(place: Path) -> None:
    secret = place / "secret"
    secret.write_text("root's")
    secret.chmod(0o600)
    code = f"open({str(secret)!r})"
    done = subprocess.run([*as_user(USERS["a"]), sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and "PermissionError" in done.stderr


def test_four_users_pull_and_remove_at_once_and_each_has_the_model_in_the_end(place: Path, hub: LoopbackHub) -> None:
    hub.rate = None
    rounds = (("pull", "acme/tiny"), ("verify", "acme/tiny"), ("rm", "acme/tiny", "--yes"), ("prune", "--yes"))
    for number in range(4):
        words = {user: rounds[(number + place) % 4] for place, user in enumerate(USERS)}
        running = [
            subprocess.Popen(command(place, user, *words[user], url=hub.url), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True, cwd="/") for user in USERS
        ]  # fmt: skip
        for child in running:
            said = child.communicate(timeout=120)[1]
            assert child.returncode in (0, 1, 3) and "Traceback" not in said, said
    for user in USERS:
        done = glmchat(place, user, "pull", "acme/tiny", "--quiet", url=hub.url)
        assert done.returncode == 0, done
    for user in USERS:
        assert glmchat(place, user, "verify", "acme/tiny").returncode == 0, user


def test_a_cache_that_others_may_only_read_is_used_by_all(place: Path, hub: LoopbackHub) -> None:
    hub.rate = None
    assert glmchat(place, "a", "pull", "acme/tiny", "--quiet", url=hub.url).returncode == 0
    for path in [place / "cache", *(place / "cache").rglob("*")]:
        if not path.is_symlink():
            os.chown(path, 0, 0)
            path.chmod(0o755 if path.is_dir() else 0o644)
    for words in (("list",), ("show", "acme/tiny"), ("verify", "acme/tiny"), ("pull", "acme/tiny", "--quiet")):
        done = glmchat(place, "b", *words, url=hub.url)
        assert done.returncode == 0, done
    for words in (("rm", "acme/tiny", "--yes"), ("pull", "acme/other", "--quiet")):
        done = glmchat(place, "b", *words, url=hub.url)
        lines = done.stderr.splitlines()
        assert done.returncode in (1, 3) and lines[-1].startswith("  hint: ") and "Traceback" not in done.stderr, done
    assert glmchat(place, "a", "verify", "acme/tiny").returncode == 0


def test_caches_in_which_a_user_may_not_look_are_passed_over_and_named_by_doctor(place: Path, hub: LoopbackHub) -> None:
    hub.rate = None
    closed = place / "a" / ".cache" / "modelscope"
    (closed / "hub" / "models" / "acme" / "tiny").mkdir(parents=True)
    other = place / "cache" / "models--acme--secret"
    (other / "snapshots" / ("c" * 40)).mkdir(parents=True)
    script = (
        "import json; from glmchat.cli import doctor; told = []\n"
        "doctor._paths(lambda message, hint: told.append([message, hint])); print(json.dumps(told))"
    )
    told = []
    for folder, mode in ((closed, 0o700), (closed, 0o744), (other, 0o700)):
        closed.chmod(0o755)
        folder.chmod(mode)
        assert glmchat(place, "a", "pull", "acme/tiny", "--quiet", url=hub.url).returncode == 0
        done = glmchat(place, "a", "list")
        assert done.returncode == 0 and "acme/tiny" in done.stdout and "secret" not in done.stdout
        line = command(place, "a")
        done = subprocess.run([*line[:-2], "-c", script], capture_output=True, text=True, cwd="/", check=True)
        told.append([one for one in json.loads(done.stdout) if "cannot be read" in one[0]])
    folders, names = (closed, closed, other), ("MODELSCOPE_CACHE", "MODELSCOPE_CACHE", "HF_HOME")
    for problems, folder, name in zip(told, folders, names, strict=True):
        assert [message for message, _ in problems] == [f"{folder} cannot be read: what lies there is not used"]
        assert name in problems[0][1]


def test_a_cache_that_may_only_be_read_is_told_by_doctor_with_its_own_setting(place: Path) -> None:
    (place / "cache").chmod(0o755)
    script = (
        "import json; from glmchat.cli import doctor; told = []\n"
        "doctor._paths(lambda message, hint: told.append([message, hint])); print(json.dumps(told))"
    )
    line = command(place, "a")
    done = subprocess.run([*line[:-2], "-c", script], capture_output=True, text=True, cwd="/", check=True)
    (problem,) = json.loads(done.stdout)
    assert str(place / "cache") in problem[0] and "none can be added" in problem[0] and "HF_HOME" in problem[1]
