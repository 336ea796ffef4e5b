"""`glmchat history`: for people and for programs."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from glmchat.chat.history.history import History

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def talked() -> None:
    with History.default() as history:
        for title, answer in (("关于量化", "It is \x1b[31m rounding."), ("Paris?", "France.")):
            tree = history.new("smollm2")
            history.append(tree, "user", title)
            history.append(tree, "assistant", answer)


def test_an_empty_history_is_an_empty_list(glmchat: Run) -> None:
    assert glmchat("history", "list", "--json").stdout == "[]\n"
    done = glmchat("history", "list")
    assert (done.returncode, done.stdout) == (0, "") and "no conversations" in done.stderr


def test_list_for_programs_and_people(glmchat: Run, talked: None) -> None:
    rows = json.loads(glmchat("history", "list", "--json").stdout)
    assert [(r["id"], r["title"], r["messages"], r["model"]) for r in rows] == [
        (2, "Paris?", 2, "smollm2"),
        (1, "关于量化", 2, "smollm2"),
    ]
    assert rows[0]["created"].endswith("+00:00")
    assert glmchat("history", "list", "-n", "1").stdout.count("\n") == 2
    assert "关于量化" in glmchat("history", "ls").stdout


def test_show_and_search(glmchat: Run, talked: None) -> None:
    assert "You:\n关于量化\n" in glmchat("history", "show", "1").stdout
    shown = json.loads(glmchat("history", "show", "1", "--json").stdout)
    assert [m["role"] for m in shown["messages"]] == ["user", "assistant"]
    assert "␛[31m rounding" in glmchat("history", "search", "rounding").stdout
    hits = json.loads(glmchat("history", "search", "量化", "--json").stdout)
    assert [(h["conversation"], h["spans"]) for h in hits] == [(1, [[2, 4]])]
    done = glmchat("history", "search", "鲸鱼")
    assert (done.returncode, done.stdout) == (0, "") and "Nothing" in done.stderr
    done = glmchat("history", "show", "9")
    assert done.returncode == 2 and "no conversation 9" in done.stderr


def test_the_hits_of_one_conversation_stand_under_its_title_once(glmchat: Run) -> None:
    with History.default() as history:
        one, other = history.new(), history.new()
        for tree, text in ((one, "first whale"), (other, "second whale"), (one, "third whale")):
            history.append(tree, "user", text)
    lines = glmchat("history", "search", "whale").stdout.splitlines()
    assert [line.split("  ")[0].strip() or line.rpartition(": ")[2] for line in lines] == [
        "1", "third whale", "first whale", "2", "second whale",
    ]  # fmt: skip
    hits = json.loads(glmchat("history", "search", "whale", "--json").stdout)
    assert [hit["conversation"] for hit in hits] == [1, 2, 1]


def test_export_and_import_go_round(glmchat: Run, talked: None, tmp_path: Path) -> None:
    assert glmchat("history", "export", "1").stdout.startswith("# 关于量化\n")
    done = glmchat("history", "export", "-o", f"{tmp_path}/out/", "-f", "md")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Paris.md", "关于量化.md"]
    assert done.stdout == ""
    file = tmp_path / "all.json"
    assert glmchat("history", "export", "--output", file).returncode == 0
    assert glmchat("history", "export", "--output", file).returncode == 2  # it is there already
    assert glmchat("history", "export", "--output", file, "--force").returncode == 0
    assert glmchat("history", "export", "--output", tmp_path / "no" / "folder.md", "1").returncode == 1
    done = glmchat("history", "import", file, "--json")
    assert [r["title"] for r in json.loads(done.stdout)] == ["关于量化", "Paris?"]
    done = glmchat("history", "import", "-", stdin=b'[{"role": "user", "content": "from stdin"}]')
    assert done.stdout == "5  from stdin\n"
    assert glmchat("history", "import", "-", stdin=b"rubbish").returncode == 3
    assert glmchat("history", "export", "--format", "pdf").returncode == 2


def test_rm_asks_or_needs_yes_and_can_be_undone(glmchat: Run, talked: None) -> None:
    done = glmchat("history", "rm", "1")
    assert done.returncode == 2 and "--yes" in done.stderr
    assert glmchat("history", "rm", "1", "99", "-y").returncode == 2  # all or none
    assert len(json.loads(glmchat("history", "list", "--json").stdout)) == 2
    done = glmchat("history", "rm", "1", "-y")
    assert done.returncode == 0 and "history restore 1" in done.stderr
    assert [r["id"] for r in json.loads(glmchat("history", "list", "--json").stdout)] == [2]
    assert glmchat("history", "restore", "1").stdout == "1  关于量化\n"
    assert glmchat("history", "restore", "1").returncode == 2
    assert glmchat("history", "rm", "2", "-y", "--forever").returncode == 0
    assert glmchat("history", "restore", "2").returncode == 2


def test_a_damaged_history_is_said(glmchat: Run, talked: None) -> None:
    from glmchat.core import locations

    locations.history_file().write_bytes(b"no database")
    done = glmchat("history", "list", "--json")
    assert (done.returncode, done.stdout) == (0, "[]\n") and "corrupt-" in done.stderr


def test_what_waits_for_its_week_can_go_for_ever_at_once(glmchat: Run, talked: None) -> None:
    assert glmchat("history", "rm", "2", "-y").returncode == 0
    assert glmchat("history", "rm", "2", "-y").returncode == 2
    done = glmchat("history", "rm", "2", "-y", "--forever", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, [{"id": 2, "forever": True}])
    assert glmchat("history", "restore", "2").returncode == 2
    assert json.loads(glmchat("history", "list", "--json").stdout)[0]["id"] == 1
