"""Weights and vocabularies that lie are refused by every command that would load them, before anything is started."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from glmchat.chat import connect, jobs

Run = Callable[..., "subprocess.CompletedProcess[str]"]
CONFIG = {
    "model_type": "llama", "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip


def archive(table: bytes, compress: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compress) as made:
        made.writestr("archive/data.pkl", table)
    return file.getvalue()


LIES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "127 MB of instructions in 129 kB": lambda: (
        "bin", archive(b"\x80\x02" + b"N" * 127_000_000 + b".", zipfile.ZIP_DEFLATED)),
    "20 million marks": lambda: ("bin", archive(b"\x80\x02" + b"(" * 20_000_000 + b".", zipfile.ZIP_STORED)),
    "a call": lambda: ("bin", archive(b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", zipfile.ZIP_STORED)),
    "100 MB of lists": lambda: (
        "safetensors", struct.pack("<Q", 99_000_007) + b'{"a":[' + b"[]," * 33_000_000 + b"}"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_weights_that_lie_start_nothing(
    case: str, glmchat: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"{arguments} was started")

    monkeypatch.setattr(jobs, "run_job", start)
    monkeypatch.setattr(connect, "start_engine", start)
    suffix, data = LIES[case]()
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    names = {"bin": ("pytorch_model.bin", "adapter_model.bin"),
             "safetensors": ("model.safetensors", "adapter_model.safetensors")}[suffix]  # fmt: skip
    for folder, name in zip((model, adapter), names, strict=True):
        folder.mkdir()
        (folder / name).write_bytes(data)
    (model / "config.json").write_text(json.dumps(CONFIG))
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "base_model_name_or_path": "a/b"}')
    for command, name in (
        (("run", model, "hello"), names[0]),
        (("serve", model, "--no-api-key"), names[0]),
        (("quantize", model), names[0]),
        (("bench", model), names[0]),
        (("adapters", "add", adapter), names[1]),
        (("adapters", "merge", model, adapter, tmp_path / "out"), names[0]),
    ):
        done = glmchat(*command)
        assert done.returncode == 3, (command, done)
        said = done.stderr.strip().splitlines()
        assert name in said[-2] and "hint" in said[-1]
    assert name in (shown := glmchat("show", model)).stdout.replace(names[0], name) and "does not run" in shown.stdout
