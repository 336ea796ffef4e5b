"""The store of adapters: added from a folder or a hub, listed with what they are, verified, removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import adapter_builders as adapters
import hub_helpers as helpers
import pytest
import torch

from glmchat.chat.adapters_choice import known, parse_adapter, shown
from glmchat.core import locations
from glmchat.core.errors import UnknownModel, Usage
from glmchat.hub.adapters import find_adapter, list_adapters


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    folder = adapters.write_lora(tmp_path / "poet-lora", adapters.factors(2), base_model_name_or_path="me/Tiny-7M")
    for name in ("optimizer.pt", "training_args.bin", "modeling_evil.py"):
        (folder / name).write_bytes(b"x")
    return folder


def test_an_added_adapter_tells_what_it_is_and_leaves_the_rest_behind(lora: Path, capsys: Any) -> None:
    code, out, _ = helpers.glmchat(capsys, "adapters", "add", str(lora), "--json")
    told = json.loads(out)
    assert (code, told["name"], told["base"], told["adapter"]["rank"]) == (0, "poet-lora", "me/Tiny-7M", 4)
    place = locations.adapters_dir() / "poet-lora"
    assert sorted(p.name for p in place.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "glmchat.json",
    ]  # fmt: skip
    assert place.stat().st_mode & 0o777 == 0o700
    assert told["sha256"] == helpers.sha256((lora / "adapter_model.safetensors").read_bytes())
    code, out, _ = helpers.glmchat(capsys, "adapters", "list")
    assert "LoRA of rank 4" in out and "me/Tiny-7M" in out
    code, out, _ = helpers.glmchat(capsys, "adapters", "show", "poet-lora")
    assert "layers: q_proj" in out


def test_a_changed_file_is_found_and_a_removed_adapter_is_gone(lora: Path, capsys: Any) -> None:
    assert helpers.glmchat(capsys, "adapters", "add", str(lora), "--name", "poet")[0] == 0
    assert helpers.glmchat(capsys, "adapters", "verify")[0] == 0
    file = locations.adapters_dir() / "poet" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, _ = helpers.glmchat(capsys, "adapters", "verify", "poet")
    assert code == 3 and "adapter_model.safetensors is wrong" in out
    assert helpers.glmchat(capsys, "adapters", "rm", "poet", "--yes")[0] == 0
    assert list_adapters() == []


@pytest.mark.parametrize("name", ["../evil", "a/b", "..", ".hidden", "", "x" * 200])
def test_a_name_that_is_a_path_is_refused(lora: Path, capsys: Any, name: str) -> None:
    code, _, err = helpers.glmchat(capsys, "adapters", "add", str(lora), "--name", name)
    assert code == 2 and "cannot be the name" in err
    assert not locations.adapters_dir().exists() or not list(locations.adapters_dir().iterdir())


def test_a_name_is_taken_once(lora: Path, capsys: Any) -> None:
    assert helpers.glmchat(capsys, "adapters", "add", str(lora))[0] == 0
    code, _, err = helpers.glmchat(capsys, "adapters", "add", str(lora))
    assert code == 2 and "is there already" in err and "adapters rm poet-lora" in err


def test_a_damaged_adapter_leaves_nothing_in_the_store(lora: Path, capsys: Any) -> None:
    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = helpers.glmchat(capsys, "adapters", "add", str(lora))
    assert code == 3 and "cannot be read" in err
    assert list_adapters() == []


def test_an_older_full_checkpoint_is_stored_as_its_prefix_alone(tmp_path: Path, capsys: Any) -> None:
    tensors = {f"transformer.layers.{n}.weight": torch.zeros(1000, 100) for n in range(4)}
    tensors["transformer.prefix_encoder.embedding.weight"] = torch.ones(8, 56)
    (tmp_path / "tuned").mkdir()
    torch.save(tensors, tmp_path / "tuned" / "pytorch_model.bin")
    code, out, _ = helpers.glmchat(capsys, "adapters", "add", str(tmp_path / "tuned"), "--json")
    assert (code, json.loads(out)["adapter"]["length"]) == (0, 8)
    assert find_adapter("tuned").size_bytes < 10_000


def test_an_adapter_of_a_hub_is_pulled_and_pinned(
    lora: Path, capsys: Any, loopback_hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {n: (lora / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")}
    loopback_hub.add("someone/poet", files)
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    code, out, err = helpers.glmchat(capsys, "adapters", "add", "someone/poet", "--json")
    assert code == 0, err
    told = helpers.last_json(out)
    assert (told["name"], told["repo"], len(told["revision"])) == ("poet", "someone/poet", 40)
    listed = json.loads(helpers.glmchat(capsys, "list", "--json")[1])
    assert [row["kind"] for row in listed] == ["adapter"]


def test_names_and_weights_are_read_as_people_write_them(lora: Path, capsys: Any) -> None:
    assert [parse_adapter(t) for t in ("poet", "poet:0.5", "poet=-2")] == [("poet", 1), ("poet", 0.5), ("poet", -2)]
    with pytest.raises(Usage, match="is no weight"):
        parse_adapter("poet:much")
    with pytest.raises(UnknownModel, match="there is no adapter 'poet'"):
        known([("poet", 1.0)])
    with pytest.raises(Usage, match="is a path") as caught:
        known([("./poet", 1.0)])
    assert caught.value.hint == "glmchat adapters add ./poet"
    helpers.glmchat(capsys, "adapters", "add", str(lora), "--name", "poet")
    assert known([("poet", 0.5)], force=True) == (("poet", 0.5),)
    told = json.loads(helpers.glmchat(capsys, "adapters", "show", "poet", "--json")[1])
    assert told["adapter"]["forced"] is True
    assert shown("poet", 0.5, forced=True) == "poet:0.5 (forced)"
