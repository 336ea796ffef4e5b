"""`glmchat show NAME`: its `--fit`, and how a model learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmchat.checkpoints import fit
from glmchat.cli.main import run
from glmchat.hub.trained_models import keep


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    config: dict[str, Any] = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "num_layers": 28, "hidden_size": 4096,
        "num_attention_heads": 32, "vocab_size": 130528, "inner_hidden_size": 16384, "max_sequence_length": 2048,
        "torch_dtype": "float16",
    }  # fmt: skip
    folder = tmp_path / "chatglm-6b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "pytorch_model.bin").open("wb") as file:
        file.truncate(12_346_621_952)
    monkeypatch.setattr(fit, "available_memory", lambda: 8_000_000_000)
    monkeypatch.setattr(fit, "has_bf16", lambda: False)
    return folder


def test_the_table_says_for_each_width_what_it_takes_and_whether_it_fits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["show", str(folder), "--fit"]) == 0
    out, err = capsys.readouterr()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0][0] == "bits" and "8.0 GB free" in err
    assert [(line[0], line[-1]) for line in lines[1:]] == [("float16", "no"), ("int8", "yes"), ("int4", "yes")]


def test_programs_get_the_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["show", str(folder), "--fit", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["fit"]
    assert [row["quant"] for row in rows] == ["float16", "int8", "int4"]
    assert all(row["fits"] == (row["total_bytes"] <= row["free_bytes"]) for row in rows)


def test_a_model_that_learned_here_tells_the_command_that_would_learn_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 8}))
    (made / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    recipe = {"base": "train:500", "method": "scratch", "config": "/novels/config.json", "lr": 0.001, "name": "novel"}
    facts = {"recipe": recipe, "data": ["/novels/one\x1b[31m two"], "loss": 1.25, "evaluation": 1.5, "run": "novel"}
    keep(made, "novel", "train:500", facts)
    assert run(["show", "novel"]) == 0
    out = capsys.readouterr().out
    assert "--method scratch" in out and "--config /novels/config.json" in out and "--lr 0.001" in out
    assert "held-out loss: 1.5000" in out and "\x1b" not in out
    assert run(["show", "novel", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained"] == facts
