"""The store of adapters: added from a folder or a hub, listed with what they are, verified, removed.

Covers checkpoints/adapter_fit.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import adapter_builders as adapters
import hub_helpers as helpers
import pytest
import torch

from glmchat.chat.adapters_choice import parse_adapter, require_known, require_usable, shown
from glmchat.checkpoints.adapter_fit import Base, misfit
from glmchat.core import locations
from glmchat.core.errors import UnknownModel, Usage
from glmchat.hub.adapters import Origin, by_name, find_adapter, keep, list_adapters


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
    for line in (("adapters", "verify", "poet"), ("verify", "poet"), ("verify",)):
        code, out, err = helpers.glmchat(capsys, *line)
        assert code == 3 and "adapter_model.safetensors does not match" in out
        assert "glmchat adapters rm poet, then add it again" in err
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
    assert code == 2 and "there is already" in err and "adapters rm poet-lora" in err


def test_a_damaged_adapter_leaves_nothing_in_the_store(lora: Path, capsys: Any) -> None:
    file = lora / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = helpers.glmchat(capsys, "adapters", "add", str(lora))
    assert code == 3 and "truncated or damaged" in err
    assert list_adapters() == []


def test_an_older_full_checkpoint_is_stored_as_its_prefix_alone(tmp_path: Path, capsys: Any) -> None:
    tensors = {f"transformer.layers.{n}.weight": torch.zeros(1000, 100) for n in range(4)}
    tensors["transformer.prefix_encoder.embedding.weight"] = torch.ones(8, 56)
    (tmp_path / "tuned").mkdir()
    torch.save(tensors, tmp_path / "tuned" / "pytorch_model.bin")
    code, out, _ = helpers.glmchat(capsys, "adapters", "add", str(tmp_path / "tuned"), "--json")
    assert (code, json.loads(out)["adapter"]["length"]) == (0, 8)
    assert find_adapter("tuned").size_bytes < 10_000


@pytest.fixture
def poet_on_hub(lora: Path, loopback_hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    files = {n: (lora / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")}
    loopback_hub.add("someone/poet", files)
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    return loopback_hub


def test_an_adapter_of_a_hub_is_pulled_and_pinned(poet_on_hub: Any, capsys: Any) -> None:
    code, out, err = helpers.glmchat(capsys, "adapters", "add", "someone/poet", "--json")
    assert code == 0, err
    told = helpers.last_json(out)
    assert (told["name"], told["repo"], len(told["revision"])) == ("poet", "someone/poet", 40)
    listed = json.loads(helpers.glmchat(capsys, "list", "--json")[1])
    assert [row["kind"] for row in listed] == ["adapter"]
    served = {f.host for f in find_adapter("poet").files}
    assert served == {poet_on_hub.url.partition("//")[2]}, "who served each file"


@pytest.mark.parametrize("beside", [{}, {"config.json": b"{}", "sub/other.pt": b"x"}])
def test_a_repository_that_holds_one_raw_file_is_an_adapter(
    loopback_hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, beside: dict[str, bytes]
) -> None:
    torch.save(adapters.factors(2), tmp_path / "saved.pt")
    saved = {"chatglm-lora.pt": (tmp_path / "saved.pt").read_bytes(), "optimizer.pt": b"x", "README.md": b"x"}
    loopback_hub.add("someone/raw", saved | beside)
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    code, _, err = helpers.glmchat(capsys, "adapters", "add", "someone/raw", "--alpha", "8")
    assert code == 0, err
    assert "chatglm-lora.pt" in {f.path for f in find_adapter("raw").files}


def test_a_commit_that_is_named_is_the_one_that_is_pulled(poet_on_hub: Any, capsys: Any) -> None:
    assert helpers.glmchat(capsys, "adapters", "add", "someone/poet")[0] == 0
    first = find_adapter("poet")
    poet_on_hub.add("someone/poet", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"later"})
    code, _, err = helpers.glmchat(capsys, "adapters", "add", f"someone/poet@{first.revision}", "--name", "old")
    assert code == 0, err
    assert find_adapter("old").revision == first.revision


def test_a_lock_file_brings_the_same_adapter_elsewhere_under_its_name(
    poet_on_hub: Any, lora: Path, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert helpers.glmchat(capsys, "adapters", "add", "someone/poet", "--name", "bard")[0] == 0
    helpers.glmchat(capsys, "adapters", "add", str(lora), "--name", "mine")
    code, out, err = helpers.glmchat(capsys, "lock")
    assert code == 0 and "left out: mine" in err
    file = tmp_path / "glmchat.lock"
    file.write_text(out)
    assert helpers.glmchat(capsys, "lock", "bard")[1] == out
    monkeypatch.setenv("GLMCHAT_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere-hf"))
    poet_on_hub.add("someone/poet", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"later"})
    for _ in range(2):  # the second time everything is here
        code, _, err = helpers.glmchat(capsys, "pull", "--locked", str(file))
        assert code == 0, err
    assert [row.name for row in list_adapters()] == ["bard"]
    assert helpers.glmchat(capsys, "lock")[1] == out
    assert helpers.glmchat(capsys, "adapters", "rm", "bard", "--yes", "--json")[0] == 0
    helpers.glmchat(
        capsys, "adapters", "add", str(adapters.write_lora(tmp_path / "x", adapters.factors(1))), "--name", "bard"
    )
    code, _, err = helpers.glmchat(capsys, "pull", "--locked", str(file))
    assert code == 2 and "there is already" in err, "another one is never overwritten"


@pytest.mark.parametrize("name", ["../evil", ".hidden", "a/b"])
def test_a_lock_file_names_no_folder_outside_the_store(
    poet_on_hub: Any, capsys: Any, tmp_path: Path, name: str
) -> None:
    helpers.glmchat(capsys, "adapters", "add", "someone/poet")
    locked = json.loads(helpers.glmchat(capsys, "lock")[1])
    locked["adapters"][0]["name"] = name
    file = tmp_path / "glmchat.lock"
    file.write_text(json.dumps(locked))
    code, _, err = helpers.glmchat(capsys, "pull", "--locked", str(file))
    assert code == 2 and "cannot be the name" in err


def test_names_and_weights_are_read_as_people_write_them(lora: Path, capsys: Any) -> None:
    assert [parse_adapter(t) for t in ("poet", "poet:0.5", "poet=-2")] == [("poet", 1), ("poet", 0.5), ("poet", -2)]
    for text in ("poet:much", "poet:nan", "poet:inf", "poet:-1000", "poet:", ":much"):
        with pytest.raises(Usage, match="is not a valid weight"):
            parse_adapter(text)
    for text in ("", ":0.5", "=1"):
        with pytest.raises(Usage, match="does not name an adapter"):
            parse_adapter(text)
    with pytest.raises(UnknownModel, match="there is no adapter 'poet'"):
        require_known([("poet", 1.0)])
    with pytest.raises(Usage, match="is a path") as caught:
        require_known([("./poet", 1.0)])
    assert caught.value.hint == "glmchat adapters add ./poet"
    helpers.glmchat(capsys, "adapters", "add", str(lora), "--name", "poet")
    require_usable([("poet", 0.5)], None, force=True)
    told = json.loads(helpers.glmchat(capsys, "adapters", "show", "poet", "--json")[1])
    assert told["adapter"]["forced"] is True
    assert shown("poet", 0.5, forced=True) == "poet:0.5 (forced)"


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"kind": "prefix", "form": "peft", "width": 192}, None),
        ({"kind": "prefix", "form": "peft", "width": 256}, "made for a model of width 256, but this one has 192"),
        ({"kind": "prefix", "form": "thudm", "width": 192}, "a P-Tuning prefix for ChatGLM"),
        ({"kind": "prompt", "form": "peft", "width": 64}, None),
        ({"kind": "lora", "shapes": {"down_proj": [64, 96]}, "layers": 3}, None),
        ({"kind": "lora", "shapes": {"down_proj": [64, 128]}, "layers": 3}, "down_proj is 64 × 128 in it"),
        ({"kind": "lora", "shapes": {"q_proj": [64, 64]}, "layers": 4}, "trained on 4 layers, but this model has 3"),
        ({"kind": "lora", "vocabulary": 300}, "it was trained with 300 words, but this model has 272"),
        ({"kind": "lora", "shapes": {"c_attn": [192, 64]}}, "changes layers called c_attn"),
        ({"kind": "loha", "form": "peft"}, "a LoHa needs PEFT, and glmchat computes llama models itself"),
        ({}, None),
    ],
)
def test_what_does_not_fit_is_told_from_measures_alone(
    tmp_path: Path, facts: dict[str, Any], reason: str | None
) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 272,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = misfit(facts, None, Base.of(tmp_path))
    assert (found is None) is (reason is None)
    if found is not None and reason is not None:
        assert reason in found.reason and found.hint and not found.forceable


def test_a_prefix_has_the_weight_one(lora: Path) -> None:
    keep("before", [lora / "adapter_model.safetensors"], {"kind": "prefix"}, Origin("here"), base=None)
    require_usable([("before", 1.0)], None)
    with pytest.raises(Usage, match=r"add up to 0\.5"):
        require_usable([("before", 0.5)], None)


def test_a_kind_of_peft_fits_a_model_that_goes_through_transformers(tmp_path: Path) -> None:
    config = {"model_type": "gpt_neox", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert misfit({"kind": "loha", "form": "peft"}, None, Base.of(tmp_path)) is None


@pytest.mark.parametrize(
    ("facts", "weights", "reason"),
    [
        ([{"kind": "loha", "takes_weight": True}] * 2, (0.5, -1), None),
        ([{"kind": "ia3", "takes_weight": False}], (1,), None),
        ([{"kind": "ia3", "takes_weight": False}], (0.5,), r"this IA3 can only be on or off.*0\.5"),
        ([{"kind": "loha", "takes_weight": False}], (0.5,), r"this LoHa can only be on or off.*0\.5"),
        ([{"kind": "loha"}, {"kind": "vera"}], (1, 1), r"cannot be active at once: LoHa \+ VeRA"),
        ([{"kind": "lora"}, {"kind": "vera"}], (1, 1), r"cannot be active at once: LoRA \+ VeRA"),
        ([{"kind": "lora"}, {"kind": "vera"}], (1, 0), None),
        ([{"kind": "lora"}, {"kind": "prefix"}], (0.5, 1), None),
    ],
)
def test_what_cannot_be_used_together_is_refused_before_the_engine_starts(
    lora: Path, facts: list[dict[str, Any]], weights: tuple[float, ...], reason: str | None
) -> None:
    for number, said in enumerate(facts):
        keep(f"a{number}", [lora / "adapter_model.safetensors"], said, Origin("here"), base=None)
    chosen = [(f"a{number}", weight) for number, weight in enumerate(weights)]
    if reason is None:
        require_usable(chosen, None)
        return
    with pytest.raises(Usage, match=reason):
        require_usable(chosen, None)


def test_an_adapter_has_the_name_of_its_folder_and_is_found_by_it(lora: Path) -> None:
    weights = [lora / "adapter_model.safetensors"]
    kept = keep("poet", weights, {"kind": "lora"}, Origin("here"), base=None)
    shutil.copytree(kept.path, kept.path.with_name("copy"))
    shutil.copytree(lora, kept.path.with_name("by-hand"))
    assert [row.name for row in list_adapters()] == ["by-hand", "copy", "poet"]
    assert [by_name(row.name) for row in list_adapters()] == list_adapters()


@pytest.mark.parametrize("name", ["", ".", "..", "../adapters/poet", "/etc", "poet/", "nobody", "po\x00et"])
def test_what_is_no_name_of_an_adapter_finds_none(lora: Path, name: str) -> None:
    keep("poet", [lora / "adapter_model.safetensors"], {"kind": "lora"}, Origin("here"), base=None)
    assert by_name(name) is None
