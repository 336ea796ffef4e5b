"""Folders that are not what they claim: each refused with its reason before memory is taken.

Covers engine/formats/weights.py, engine/families.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmchat.core.errors import Damaged, Hostile, NotInstalled, Usage
from glmchat.engine import Engine, Sampling, load_tokenizer
from glmchat.engine.families import identify

IDS = [5, 9, 40, 41]


@pytest.fixture
def folder(tmp_path: Path, builders: ModuleType) -> Path:
    path: Path = builders.write_folder(tmp_path / "model")
    return path


def change(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def refused(folder: Path, kind: type[Damaged] = Damaged) -> Damaged:
    with pytest.raises(kind) as caught:
        Engine.load(folder, threads=1)
    assert caught.value.exit == 3
    assert caught.value.hint
    return caught.value


def test_a_folder_loads_and_answers(folder: Path) -> None:
    stages: list[str] = []
    engine = Engine.load(folder, threads=1, on_progress=lambda stage, done: stages.append(stage))
    assert list(dict.fromkeys(stages)) == ["tokenizer", "weights", "warmup"]
    chunks = list(engine.stream([{"role": "user", "content": "hi"}], Sampling(temperature=0, max_tokens=3)))
    assert chunks[-1].finish_reason in ("stop", "length")


def test_a_folder_without_tokenizer_files_computes_and_says_what_it_cannot(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    engine = Engine.load(folder, threads=1)
    assert engine.logits(IDS).shape == (4, 272)
    assert len(list(engine.generate(IDS, Sampling(temperature=0, max_tokens=2, ignore_eos=True)))) == 2
    with pytest.raises(Damaged, match="tokenizer"):
        engine.render([{"role": "user", "content": "hi"}])


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotInstalled):
        Engine.load(tmp_path / "absent")
    assert "config.json" in refused(tmp_path).message


def test_a_folder_of_gguf_files_points_at_one(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert "x.gguf" in refused(tmp_path).hint


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"model_type": "llama"}', "\xff", "[" * 100_000])
def test_a_damaged_config_is_refused(text: str, folder: Path) -> None:
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9), ("hidden_size", -1), ("hidden_size", "64"), ("vocab_size", 2**40),
        ("num_attention_heads", True), ("num_key_value_heads", 3), ("rms_norm_eps", "x"), ("rope_theta", -5),
        ("intermediate_size", 1.5), ("max_position_embeddings", 0),
    ],
)  # fmt: skip
def test_absurd_measures_are_refused(name: str, value: Any, folder: Path) -> None:
    change(folder, **{name: value})
    refused(folder)


def test_every_missing_left_over_and_misshapen_tensor_is_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.extra"] = torch.ones(2)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder).message
    for name in ("model.norm.weight", "model.extra", "model.layers.1.mlp.up_proj.weight is [3, 3]"):
        assert name in message


def test_whole_numbers_without_a_scale_are_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.zeros_like(tensors[name], dtype=torch.int8)}, folder / "model.safetensors")
    with pytest.raises(Damaged, match=r"up_proj\.weight holds whole numbers") as caught:
        Engine.load(folder)
    assert caught.value.code == "weights.type"


@pytest.mark.parametrize("part", [0, 7, 100, 5000])
def test_a_truncated_safetensors_file_is_refused_with_its_name(part: int, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:part])
    assert "model.safetensors" in refused(folder).message


def test_a_pointer_in_place_of_weights_says_the_real_size(folder: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1740651802\n"
    (folder / "model.safetensors").write_bytes(pointer)
    assert "1.7 GB" in refused(folder).message


def shards(folder: Path, kind: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, index = ("model", {}) if kind == "safetensors" else ("pytorch_model", {})
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        name = f"{stem}-{number:05}-of-00002.{kind}"
        part = {n: tensors[n] for n in names}
        if kind == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name)
        index.update(dict.fromkeys(names, name))
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_compute_what_one_file_computes(kind: str, folder: Path) -> None:
    wanted = Engine.load(folder, dtype="float32", threads=1).logits(IDS)
    shards(folder, kind)
    assert torch.equal(Engine.load(folder, dtype="float32", threads=1).logits(IDS), wanted)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_named(kind: str, folder: Path) -> None:
    shards(folder, kind)
    next(folder.glob("*-00002-of-*")).unlink()
    assert "00002-of-00002" in refused(folder).message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b", "", 5, "x\x00y"])
def test_an_index_that_leads_elsewhere_is_refused(name: Any, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")  # beside it no index is read
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(folder, Hostile)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_never_runs(legacy: bool, folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    path = folder / "pytorch_model.bin"
    if legacy:
        path.write_bytes(pickle.dumps({"model.norm.weight": Canary(canary)}))
    else:
        torch.save({"model.norm.weight": Canary(canary)}, path)
    refused(folder)
    assert not canary.exists()


def test_end_tokens_of_the_generation_config_count(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert {2, 7} <= set(Engine.load(folder, threads=1).stop_ids)


@pytest.mark.parametrize(
    "given",
    [{"quant": 5}, {"dtype": "float8"}, {"context": 100_000}, {"context": 3}],
    ids=["quant", "dtype", "long", "short"],
)
def test_options_that_cannot_be_are_refused(given: dict[str, Any], folder: Path) -> None:
    with pytest.raises(Usage):
        Engine.load(folder, threads=1, **given)


def test_quantising_what_is_quantised_is_refused_on_another_width(tmp_path: Path, builders: ModuleType) -> None:
    path = builders.write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    assert Engine.load(path, quant=4, threads=1).logits(IDS).shape == (4, 272)
    with pytest.raises(Usage, match="already"):
        Engine.load(path, quant=8, threads=1)


# Other architectures, through transformers


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    """A Mistral with a sliding window, whose config.json reaches for a kernel and for code."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(folder)
    builders.tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    change(
        folder,
        attn_implementation="someone/kernel", _attn_implementation="someone/kernel",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )  # fmt: skip
    return folder


def test_a_config_that_names_a_foreign_kernel_or_code_is_harmless(foreign: Path) -> None:
    engine = Engine.load(foreign, dtype="float32", threads=1)
    assert engine.checkpoint.family.name == "transformers"
    ids = IDS * 6
    answer = list(engine.generate(ids, Sampling(temperature=0, max_tokens=6, ignore_eos=True)))
    rows = engine.logits(ids + answer)[len(ids) - 1 : -1]
    assert rows.argmax(-1).tolist() == answer
    assert load_tokenizer(foreign).decode(load_tokenizer(foreign).encode("hi")) == "hi"


def test_missing_tensors_of_a_foreign_architecture_are_named(foreign: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(foreign, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.self_attn.q_proj.weight" in refused(folder).message


def test_an_architecture_that_nobody_knows_is_named(folder: Path) -> None:
    change(folder, model_type="telepathy")
    assert "telepathy" in refused(folder).message


def test_a_native_model_is_loaded_without_transformers(starter_model: Path) -> None:
    code = (
        "import sys; from glmchat.engine import Engine, Sampling\n"
        "engine = Engine.load(sys.argv[1], threads=1)\n"
        "assert list(engine.generate([1, 2, 3], Sampling(temperature=0, max_tokens=2)))\n"
        "heavy = {'transformers', 'torch._dynamo', 'sympy', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(starter_model)], check=True, cwd="/", timeout=300)


def test_importing_the_engine_does_not_import_torch() -> None:
    code = "import sys, glmchat.engine; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd="/", timeout=300)


def test_a_spec_is_read_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert identify(folder).spec.layers == 3
