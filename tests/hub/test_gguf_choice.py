"""One GGUF file out of a repository of many: named as other programs name it, fetched alone, told, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import odd_models
import pytest
from hub_helpers import glmchat
from loopback_hub import LoopbackHub

from glmchat.chat.launch import choice_note, installed_row
from glmchat.core.errors import NotInstalled, Usage
from glmchat.hub import lookup
from glmchat.hub.gguf_choice import choices, chosen, default_choice, label_of, matching
from glmchat.hub.installed import Installed
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse

REPO = "acme/x-GGUF"
FILES = ("x.Q4_K_M.gguf", "x.Q6_K.gguf", "x-IQ4_XS.gguf", "x.UD-Q4_K_M.gguf", "mmproj-f16.gguf")
PARTS = tuple(f"x.Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3))


@pytest.fixture
def hub(loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A repository of five models, one of them in parts, and a projector. No file is another one."""
    files = {}
    for number, name in enumerate(FILES):
        files[name] = odd_models.gguf(tmp_path / name, fields={"general.name": f"model {number}"}).read_bytes()
    first = odd_models.gguf_parts(tmp_path)
    for number, name in enumerate(PARTS, 1):
        files[name] = first.with_name(f"x-0000{number}-of-00003.gguf").read_bytes()
    loopback_hub.add(REPO, {**files, "README.md": b"# x"})
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def fetched(hub: LoopbackHub, names: tuple[str, ...] = (*FILES, *PARTS)) -> set[str]:
    return {name for name in names if hub.sent_for(name)}


def here(text: str) -> Installed:
    row = find_installed(parse(text))
    assert row is not None
    return row


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (f"{REPO}:Q6_K", {"x.Q6_K.gguf"}),
        (f"{REPO}:iq4_xs", {"x-IQ4_XS.gguf"}),
        (f"hf.co/{REPO}:q6_k", {"x.Q6_K.gguf"}),
        (f"{REPO}/x.Q6_K.gguf", {"x.Q6_K.gguf"}),
        (f"https://huggingface.co/{REPO}/blob/main/x.Q6_K.gguf", {"x.Q6_K.gguf"}),
        (f"https://huggingface.co/{REPO}/resolve/main/x.Q6_K.gguf?download=true", {"x.Q6_K.gguf"}),
        (f"{REPO}:Q4_K_M", {"x.Q4_K_M.gguf"}),
        (f"{REPO}:UD-Q4_K_M", {"x.UD-Q4_K_M.gguf"}),
        (f"{REPO}:Q8_0", set(PARTS)),
        (f"{REPO}/{PARTS[1]}", set(PARTS)),
    ],
)
def test_the_model_that_is_named_is_fetched_and_no_other(
    asked: str, names: set[str], hub: LoopbackHub, capsys: Any
) -> None:
    code, out, err = glmchat(capsys, "pull", asked, "--json")
    assert code == 0, err
    assert fetched(hub) == names
    done = json.loads(out.splitlines()[-1])
    assert Path(done["path"]).name == min(names) and done["complete"]
    assert here(asked).path == Path(done["path"])


def test_without_a_label_it_is_said_which_is_taken_and_which_there_are(hub: LoopbackHub, capsys: Any) -> None:
    for extra in ("--dry-run", "--quiet"):
        code, _, err = glmchat(capsys, "pull", REPO, extra)
        assert code == 0
        assert f"{PARTS[0]} is taken; there are also {REPO}:IQ4_XS, {REPO}:Q4_K_M, {REPO}:Q6_K, {REPO}:UD-Q4_K_M" in err
    assert fetched(hub) == set(PARTS)


def test_a_label_that_is_not_there_is_refused_with_those_that_are(hub: LoopbackHub, capsys: Any) -> None:
    code, _, err = glmchat(capsys, "pull", f"{REPO}:Q2_K")
    assert code == 2 and "this repository has no GGUF file Q2_K" in err
    assert "it has IQ4_XS, Q4_K_M, Q6_K, Q8_0, UD-Q4_K_M" in err and fetched(hub) == set()


def test_of_two_that_are_here_each_is_run_by_its_label_and_one_without_and_it_is_said(
    hub: LoopbackHub, capsys: Any
) -> None:
    for label in ("Q6_K", "Q4_K_M"):
        assert glmchat(capsys, "pull", f"{REPO}:{label}")[0] == 0
    assert [here(f"{REPO}:{label}").path.name for label in ("q6_k", "Q4_K_M")] == ["x.Q6_K.gguf", "x.Q4_K_M.gguf"]
    row = here(REPO)
    assert row.path.name == "x.Q4_K_M.gguf" and row.quant == "q4_k_m"
    note = choice_note(REPO, row)
    assert note == f"x.Q4_K_M.gguf is taken; there are also {REPO}:Q6_K"
    assert choice_note(f"{REPO}:Q6_K", here(f"{REPO}:Q6_K")) is None
    (listed,) = [row for row in lookup.list_installed() if row.repo == REPO]
    assert listed.name == REPO
    with pytest.raises(NotInstalled) as missing:
        installed_row(f"{REPO}:IQ4_XS")
    assert missing.value.hint == f"glmchat pull {REPO}:IQ4_XS"


def test_what_was_run_last_is_found_again_by_its_own_file(hub: LoopbackHub, capsys: Any) -> None:
    for label in ("Q4_K_M", "Q6_K"):
        assert glmchat(capsys, "pull", f"{REPO}:{label}")[0] == 0
    last = lookup.last_used()
    assert last is not None and last.name == f"{REPO}:Q6_K" and last.path.name == "x.Q6_K.gguf"


def test_one_of_several_in_a_folder_is_not_removed_alone(hub: LoopbackHub, capsys: Any) -> None:
    for label in ("Q4_K_M", "Q6_K"):
        assert glmchat(capsys, "pull", f"{REPO}:{label}")[0] == 0
    code, _, err = glmchat(capsys, "rm", f"{REPO}:Q6_K", "--yes")
    assert code == 2 and f"glmchat rm {REPO} removes all of them" in err
    assert here(f"{REPO}:Q6_K").path.is_file()
    assert glmchat(capsys, "rm", REPO, "--yes")[0] == 0
    assert find_installed(parse(f"{REPO}:Q6_K"), incomplete=True) is None


def test_a_folder_of_one_model_in_parts_is_that_model_and_each_part_is_added_with_the_others(
    tmp_path: Path, capsys: Any
) -> None:
    first = odd_models.gguf_parts(tmp_path)
    assert here(str(tmp_path)).path == first
    second = first.with_name("x-00002-of-00003.gguf")
    code, out, err = glmchat(capsys, "add", str(second), "--json")
    assert code == 0, err
    row = json.loads(out.splitlines()[-1])
    assert row["path"] == str(first) and row["name"] == "x"
    assert row["size_bytes"] == sum(part.stat().st_size for part in tmp_path.glob("*.gguf"))


def test_two_models_of_one_label_are_told_apart_by_name() -> None:
    names = ("small.Q6_K.gguf", "large.Q6_K.gguf")
    with pytest.raises(Usage) as caught:
        chosen(names, "Q6_K")
    assert caught.value.code == "pull.several" and "large.Q6_K.gguf, small.Q6_K.gguf" in caught.value.hint
    assert chosen(names, "large.Q6_K.gguf") == ["large.Q6_K.gguf"]


def test_labels_are_read_off_names_as_their_makers_write_them() -> None:
    named = {
        "Qwen3-8B-Q4_K_M.gguf": "Q4_K_M", "x.i1-IQ3_XXS.gguf": "IQ3_XXS", "llama-2-7b.Q8_0.gguf": "Q8_0",
        "sub/m-BF16-00001-of-00002.gguf": "BF16", "gpt-oss-mxfp4.gguf": "MXFP4", "x-UD-IQ2_M.gguf": "UD-IQ2_M",
        "plain.gguf": "plain.gguf",
    }  # fmt: skip
    assert {name: label_of(name) for name in named} == named
    assert default_choice(["a-Q8_0.gguf", "a-Q4_0.gguf", "mmproj-a.gguf"]) == ["a-Q4_0.gguf"]
    assert list(choices(PARTS)) == ["x.Q8_0.gguf"] and matching(FILES, "nothing") == []
