"""`glmchat show NAME --fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glmchat.checkpoints import fit
from glmchat.cli.main import run


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
