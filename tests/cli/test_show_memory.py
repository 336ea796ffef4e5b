"""`glmchat show` and `show --fit` tell one truth: transformers' count of parameters, and the bytes the engine holds.

Covers cli/models.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from glmchat.checkpoints import fit
from glmchat.checkpoints.recipe import Recipe
from glmchat.cli.main import run
from glmchat.engine.families import identify
from glmchat.engine.loading import load_model
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute

NO_KERNEL = NativeCpu().unavailable()
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama with biases": ("LlamaConfig", {**SMALL, "attention_bias": True, "mlp_bias": True}),
    "llama, tied": ("LlamaConfig", {**SMALL, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**SMALL, "sliding_window": None}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", {**SMALL, "head_dim": 64}),
    "gpt2": ("GPT2Config", {"vocab_size": 320, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}),
}


def config_of(name: str, **changes: Any) -> Any:
    kind, measures = CONFIGS[name]
    return getattr(transformers, kind)(**{**measures, **changes})


@pytest.fixture(autouse=True)
def a_machine_where_activations_are_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "has_bf16", lambda: True)
    monkeypatch.setattr(fit, "available_memory", lambda: 1)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_model_is_called_what_its_makers_call_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(name)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      ")
    assert run(["show", str(tmp_path)]) == 0
    family = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("family: "))
    assert family.split()[1].strip(",") == config.model_type
    assert run(["show", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["architecture"]["model_type"] == config.model_type
    assert family.split()[-1] == told["family"]


def shown(capsys: pytest.CaptureFixture[str], folder: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """What `show --json` says, and the bytes of the weights for each width that `show --fit` names."""
    told = []
    for more in ([], ["--fit"]):
        capsys.readouterr()
        assert run(["show", str(folder), *more, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    return told[0], {row["quant"]: row["weights_bytes"] for row in told[1]["fit"]}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("full", [False, True])
def test_the_parameters_are_those_that_transformers_counts(
    name: str, full: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = getattr(transformers, CONFIGS[name][0])() if full else config_of(name)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(8))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert shown(capsys, tmp_path)[0]["architecture"]["parameters"] == count


@pytest.mark.skipif(NO_KERNEL is not None, reason=f"the C kernel, whose layout is counted, is not here: {NO_KERNEL}")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_both_say_the_bytes_that_the_engine_then_holds(
    name: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=getattr(torch, dtype)).save_pretrained(folder)
    said, fit = shown(capsys, folder)
    assert fit == {label: said["memory"]["float16" if label == dtype else label] for label in (dtype, "int8", "int4")}
    for bits in (8, 4):
        copy = execute(plan_quantise(folder, tmp_path / f"copy{bits}", Recipe(bits)))
        model = load_model(identify(copy), dtype=torch.bfloat16)
        tensors = [*model.named_parameters(), *model.named_buffers()]
        # Biases beside packed matrices keep the file's type; `show` speaks of 16 bits.
        held = sum(2 * t.numel() if name.endswith("bias") else t.nbytes for name, t in tensors)
        assert said["memory"][f"int{bits}"] == held


@pytest.mark.parametrize("name", ["llama, tied", "gpt2"])
def test_a_head_that_was_trained_apart_is_counted_whatever_config_json_says(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({**load_file(path), "lm_head.weight": torch.randn(320, 128)}, path, metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == sum(parameter.numel() for parameter in model.parameters()) + 320 * 128
    said = shown(capsys, tmp_path)[0]
    assert said["architecture"]["parameters"] == count
    assert said["memory"]["float16"] == 2 * count


def test_weights_that_are_not_loaded_take_no_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers.AutoModelForCausalLM.from_config(config_of("llama")).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    for number in (1, 2):  # what an earlier save left there
        (tmp_path / f"model-0000{number}-of-00002.safetensors").write_bytes(bytes(5000))
    old = {"weight_map": {f"{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(old))
    assert shown(capsys, tmp_path)[0]["memory"]["none"] == size


def test_a_network_that_is_not_counted_is_as_large_in_float16_whatever_its_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memories = []
    for dtype, size in (("float16", 2_000_000), ("float32", 4_000_000)):
        folder = tmp_path / dtype
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "opt", "torch_dtype": dtype}))
        (folder / "model.safetensors").write_bytes(bytes(size))
        said, fit = shown(capsys, folder)
        assert said["memory"].pop("none") == size
        assert (fit["int8"], fit["int4"]) == (said["memory"]["int8"], said["memory"]["int4"])
        memories.append(said["memory"])
    assert memories[0] == memories[1] and memories[0]["float16"] == 2_000_000
