"""`run --adapter`: by name, by folder, with weights; a wrong one is refused before anything heavy is imported.

Covers cli/choosing.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import model_in

from glmchat.core.errors import Usage
from glmchat.hub.adapters import list_adapters

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def write_lora(folder: Path, *, width: int = 64, number: int = 0, **config: Any) -> Path:
    """A safetensors file made by hand: these tests must not import torch."""
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_" for layer in range(3)]
    header: dict[str, Any] = {}
    size = 4 * 4 * width
    for index, name in enumerate(name + part + ".weight" for name in names for part in "AB"):
        shape = [4, width] if ".lora_A" in name else [width, 4]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [index * size, (index + 1) * size]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    data = len(text).to_bytes(8, "little") + text + bytes([number]) * (6 * size)
    (folder / "adapter_model.safetensors").write_bytes(data)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "optimizer.pt").write_bytes(b"not to be opened")
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return model_in(tmp_path / "Tiny-7M")


def used(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout.splitlines()[0])["adapter"])


def test_a_folder_goes_into_the_store_once_and_is_used(glmchat: Run, base: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "poet" / "checkpoint-3000")
    first = glmchat("run", base, "hi", "--json", "--adapter", folder)
    assert used(first) == "poet-checkpoint-3000"
    assert "was added to the store as poet-checkpoint-3000: LoRA of rank 4" in first.stderr
    as_model = glmchat("rm", "poet-checkpoint-3000")
    assert "is an adapter, not a model" in as_model.stderr and "glmchat adapters show" in as_model.stderr
    again = glmchat("run", base, "hi", "--json", "--adapter", f"{folder}:0.5")
    assert used(again) == "poet-checkpoint-3000:0.5" and "is in the store as poet-checkpoint-3000" in again.stderr
    assert len(list_adapters()) == 1


@pytest.mark.usefixtures("adds_here")
def test_a_training_that_went_on_gets_a_name_of_its_own(
    glmchat: Run, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lora(tmp_path / "run" / "poet")
    monkeypatch.chdir(tmp_path / "run")
    assert used(glmchat("run", base, "hi", "--json", "--adapter", "poet")) == "poet"
    (tmp_path / "run" / "poet").rename(tmp_path / "earlier")
    write_lora(tmp_path / "run" / "poet", number=1)
    assert used(glmchat("run", base, "hi", "--json", "--adapter", "./poet")) == "poet-2"
    mixed = glmchat("run", base, "hi", "--json", "--adapter", "poet:0.3", "--adapter", "poet-2:-0.7")
    assert used(mixed) == "poet:0.3+poet-2:-0.7", "a name of the store comes before a folder"


@pytest.mark.usefixtures("adds_here")
@pytest.mark.parametrize(
    ("config", "width", "reason", "hint"),
    [
        ({}, 128, "q_proj is 128 × 128 in it, but 64 × 64 in the model", "a different size"),
        ({"base_model_name_or_path": "me/Other-7M"}, 64, "trained on me/Other-7M, but this model is", "--force"),
        ({"peft_type": "NEW"}, 64, "'NEW', which glmchat does not support", "LoHa"),
    ],
)
def test_a_wrong_folder_is_refused_and_leaves_nothing_in_the_store(
    glmchat: Run, base: Path, tmp_path: Path, config: dict[str, Any], width: int, reason: str, hint: str
) -> None:
    folder = write_lora(tmp_path / "wrong", width=width, **config)
    done = glmchat("run", base, "hi", "--adapter", folder)
    assert done.returncode == 2 and reason in done.stderr and hint in done.stderr
    assert done.stdout == "" and list_adapters() == []


@pytest.mark.usefixtures("adds_here")
@pytest.mark.parametrize(
    ("number", "rank", "reason"), [(255, 4, "not finite"), (0, 8, "adapter_config.json gives rank 8")]
)
def test_a_damaged_folder_is_refused_and_leaves_nothing_in_the_store(
    glmchat: Run, base: Path, tmp_path: Path, number: int, rank: int, reason: str
) -> None:
    folder = write_lora(tmp_path / "broken", number=number, r=rank)
    for line in (["run", base, "hi", "--adapter", folder], ["adapters", "add", folder]):
        done = glmchat(*line)
        assert done.returncode == 3 and reason in done.stderr and "hint" in done.stderr
        assert done.stdout == "" and list_adapters() == []


def test_an_adapter_whose_layers_only_sound_like_the_models_never_comes_into_the_store(
    glmchat: Run, base: Path, tmp_path: Path
) -> None:
    """Its layers have the model's names and sizes, in another place: only a look at every tensor tells."""
    folder = write_lora(tmp_path / "odd")
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b"model.layers.0.self_attn.q", b"model.layers.0.crossattn.q"))
    done = glmchat("run", base, "hi", "--adapter", folder)
    assert done.returncode == 2 and "belong to no layer of this model" in done.stderr
    assert done.stdout == "" and list_adapters() == []


def test_where_one_of_several_folders_is_refused_none_stays_in_the_store(
    glmchat: Run, base: Path, tmp_path: Path
) -> None:
    good, wide = write_lora(tmp_path / "good"), write_lora(tmp_path / "wide", width=128)
    for line in ((good, "--adapter", wide), (good, "--adapter", good)):
        done = glmchat("run", base, "hi", "--adapter", *line)
        assert done.returncode == 2 and "taken out of the store again: good" in done.stderr
        assert done.stdout == "" and list_adapters() == []


def test_what_the_engine_cannot_attach_after_all_does_not_stay(glmchat: Run, base: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "good")
    refusal = Usage("the engine cannot attach it", hint="x", code="adapter.shape").to_json()
    done = glmchat("run", base, "hi", "--adapter", folder, load_failure=refusal)
    assert done.returncode == 2 and "the engine cannot attach it" in done.stderr
    assert list_adapters() == []


@pytest.mark.usefixtures("adds_here")
def test_force_takes_another_base_and_says_so(glmchat: Run, base: Path, tmp_path: Path) -> None:
    folder = write_lora(tmp_path / "medical", base_model_name_or_path="me/Other-7M")
    done = glmchat("run", base, "hi", "--json", "--adapter", folder, "--force")
    assert used(done) == "medical" and "medical is attached by force" in done.stderr
    wide = write_lora(tmp_path / "wide", width=128)
    assert glmchat("run", base, "hi", "--adapter", wide, "--force").returncode == 2, "measures cannot be forced"


def test_the_names_of_a_server_are_the_servers(glmchat: Run, tmp_path: Path) -> None:
    done = glmchat("run", "x", "hi", "--server", "http://127.0.0.1:9/v1", "--adapter", "poet")
    assert "there is no adapter" not in done.stderr, "its own store knows"


def test_refusals_do_not_wait_for_torch(base: Path, tmp_path: Path) -> None:
    wrong = write_lora(tmp_path / "wrong", width=128)
    unknown = write_lora(tmp_path / "unknown", peft_type="NEW")
    lines = [
        ["run", str(base), "hi", "--adapter", str(wrong)],
        ["adapters", "add", str(unknown)],
        ["adapters", "add", str(wrong), "--base", str(base)],
    ]
    code = "import json, sys\nfrom glmchat.cli import main\nfor line in json.loads(sys.argv[1]):\n    main.run(line)\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, json.dumps(lines)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("q_proj is 128 × 128") == 2 and "'NEW'" in done.stderr


def write_loha(folder: Path, *, mark: str = "hada", **config: Any) -> Path:
    """A LoHa of one layer, made by hand: a 1 × 1 matrix each."""
    parts = ("w1_a", "w1_b", "w2_a", "w2_b")
    names = [f"base_model.model.gpt_neox.layers.0.attention.dense.{mark}_{part}" for part in parts]
    header = {n: {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * i, 4 * i + 4]} for i, n in enumerate(names)}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    settings = {"peft_type": "LOHA", "r": 1, "alpha": 1, "target_modules": ["dense"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_a_kind_of_peft_is_added_listed_and_shown_by_its_name(glmchat: Run, tmp_path: Path) -> None:
    done = glmchat("adapters", "add", write_loha(tmp_path / "poet"))
    assert done.returncode == 0 and "poet is ready: LoHa of rank 1" in done.stderr
    assert "LoHa of rank 1" in glmchat("adapters", "list").stdout
    told = json.loads(glmchat("adapters", "show", "poet", "--json").stdout)["adapter"]
    assert (told["kind"], told["form"], told["rank"], told["targets"]) == ("loha", "peft", 1, ["dense"])
    assert told["takes_weight"] is True and "kind: LoHa of rank 1" in glmchat("adapters", "show", "poet").stdout


def test_show_names_the_template_and_the_tokenizer_that_an_adapter_brings(glmchat: Run, tmp_path: Path) -> None:
    plain, own = write_loha(tmp_path / "plain"), write_loha(tmp_path / "own")
    (own / "chat_template.jinja").write_text("{{ messages }}")
    (own / "tokenizer.json").write_text("{}")
    pair = write_loha(tmp_path / "pair")
    for name in ("vocab.json", "merges.txt"):
        (pair / name).write_text("{}")
    settings = {"tokenizer_class": "CodeGenTokenizer", "chat_template": "{{ messages }}"}
    (pair / "tokenizer_config.json").write_text(json.dumps(settings))
    for folder in (plain, own):
        assert glmchat("adapters", "add", folder).returncode == 0
    refused = glmchat("adapters", "add", pair)
    assert refused.returncode == 2 and "for the class CodeGenTokenizer" in refused.stderr
    (pair / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "Qwen2Tokenizer"}))
    assert glmchat("adapters", "add", pair).returncode == 0
    told = glmchat("adapters", "show", "own").stdout
    assert "chat template: its own, used while it is active" in told and "tokenizer: tokenizer.json" in told
    told = glmchat("adapters", "show", "pair").stdout
    assert "chat template: its own" in told and "tokenizer: vocab.json, merges.txt" in told
    told = glmchat("adapters", "show", "plain").stdout
    assert "chat template" not in told and "tokenizer" not in told


@pytest.mark.usefixtures("adds_here")
@pytest.mark.parametrize(
    ("mark", "config", "code", "reason"),
    [
        ("hada", {"r": 40}, 3, "gives r 40, but no tensor is that long"),
        ("lokr", {}, 3, "says LoHa, and none of the 4 tensors belongs to one"),
        ("hada", {"peft_type": "POLY"}, 2, "a task number with every question"),
        ("hada", {"target_modules": "(a+)+b"}, 3, "target_modules is"),
    ],
)
def test_a_kind_of_peft_that_no_model_could_take_never_comes_into_the_store(
    glmchat: Run, tmp_path: Path, mark: str, config: dict[str, Any], code: int, reason: str
) -> None:
    done = glmchat("adapters", "add", write_loha(tmp_path / "poet", mark=mark, **config))
    assert done.returncode == code and reason in done.stderr and list_adapters() == []


@pytest.mark.usefixtures("adds_here")
def test_a_kind_of_peft_is_refused_on_a_model_that_glmchat_computes(glmchat: Run, base: Path, tmp_path: Path) -> None:
    done = glmchat("run", base, "hi", "--adapter", write_loha(tmp_path / "poet"))
    assert done.returncode == 2 and "a LoHa needs PEFT, and glmchat computes llama models itself" in done.stderr
    assert "the other kinds need a model that runs through transformers" in done.stderr
