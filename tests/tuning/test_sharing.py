"""Two processes that hold a part of the model each learn what one does that holds all of it.

Covers tuning/sharing/__init__.py, tuning/sharing/base.py, tuning/sharing/fsdp.py, tuning/pieces.py.

They are started as docs/tuning.md says, with exactly its files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, losses, plain, rows_of
from safetensors.torch import load_file
from tiny_checkpoints import build

from glmchat.core.errors import Usage
from glmchat.tuning.sharing import sharing_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "docs" / "accelerate"
COMMON = {"epochs": 1, "rows_per_step": 3, "row_tokens": 1, "learning_rate": 1e-2, "save_every": 2}
CASES: dict[str, dict[str, Any]] = {
    "lora": {"epochs": 2, "checkpointing": "on"},
    "dora": {"dora": True, "clip": 0.0},
    "full": {"method": "full"},
    "last layer": {"method": "full", "last_layers": 1, "checkpointing": "on"},
    "dpo": {"method": "dpo"},
    "prefix": {"method": "prefix", "prefix_length": 5, "prefix_projection": True},
}
# Three passes make a step, so one of the two processes computes one that counts nothing.
PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from glmchat.core.errors import GlmchatError
from glmchat.tuning.trainer import train
from learning import plain, rows_of
torch.set_num_threads(1)
model, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
for name, options in cases.items():
    once = options.pop("stop", None)
    rows, held = rows_of(options, 18), rows_of(options, 3)
    for stop in [once, None] if once else [None]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        seen = []
        def tell(event):
            seen.append(event)
            with open(folder / name / "log.jsonl", "a") as log:
                log.write(json.dumps(event) + "\\n")
        done = lambda: stop is not None and any(e.get("step", 0) >= stop and e["kind"] == "step" for e in seen)
        try:
            result = train(model, rows, plain(**options), folder / name, tell, done, evaluation=held)
        except GlmchatError as error:
            with open(folder / name / "error.txt", "a") as file:
                file.write(str(error) + "\\n")
            continue
        if result.probe is not None:
            told = {{"kind": "result", "change": result.change, "evaluation": result.evaluation,
                     "probe": result.probe.logits.tolist()}}
            tell(told)
"""


def launched(config: Path, model: Path, folder: Path, cases: dict[str, Any]) -> None:
    """Runs over tiny models, one after the other, in the processes that the file asks for."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "program.py"
    program.write_text(PROGRAM.format(tests=str(ROOT / "tests")))
    launch = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--config_file", str(config)]
    words = [*launch, "--main_process_port", "0", str(program), str(model), str(folder), json.dumps(cases)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def told(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def sharded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs in two processes with FSDP, by name."""
    cases = {name: {**COMMON, **options} for name, options in CASES.items()}
    cases["stopped"] = {**COMMON, **CASES["lora"], "stop": 3}
    cases["stopped full"] = {**COMMON, **CASES["full"], "moments": "bfloat16", "stop": 3}
    cases["undisturbed full"] = {**COMMON, **CASES["full"], "moments": "bfloat16"}
    cases["packed"] = {**COMMON, "quant": 8}
    folder = tmp_path_factory.mktemp("sharded")
    launched(CONFIGS / "fsdp.yaml", model, folder, cases)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_the_result_are_those_of_one_process(
    name: str, model: Path, sharded: Path, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    options = {**COMMON, **CASES[name]}
    result, events = learn(tmp_path, model, rows_of(options, 18), plain(**options), evaluation=rows_of(options, 3))
    both = told(sharded / name)
    assert losses(both) == pytest.approx(losses(events), rel=1e-5)
    norms, alone = ([one["grad_norm"] for one in log if one["kind"] == "step"] for log in (both, events))
    assert norms == pytest.approx(alone, rel=1e-4)
    end = both[-1]
    assert end["change"] == pytest.approx(result.change, rel=1e-4)
    assert end["evaluation"] == pytest.approx(result.evaluation, rel=1e-5)
    assert result.probe is not None
    torch.testing.assert_close(torch.tensor(end["probe"]), result.probe.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.timeout(300)
def test_what_is_written_is_whole_and_named_as_one_process_does(model: Path, sharded: Path, tmp_path: Path) -> None:
    for name in ("lora", "full"):
        options = {**COMMON, **CASES[name]}
        learn(tmp_path / name, model, rows_of(options, 18), plain(**options))
        for one in sorted((tmp_path / name).rglob("*.safetensors")):
            two = load_file(sharded / name / one.relative_to(tmp_path / name))
            for key, value in load_file(one).items():
                assert two[key].shape == value.shape
                if not one.name.startswith(("generator", "optimiser")):
                    torch.testing.assert_close(two[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("stopped", "whole"), [("stopped", "lora"), ("stopped full", "undisturbed full")])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(stopped: str, whole: str, sharded: Path) -> None:
    found = told(sharded / stopped)
    assert [one["step"] for one in found if one["kind"] == "resumed"] == [3]
    assert losses(found) == losses(told(sharded / whole))
    weights = sorted((sharded / whole / "adapter").glob("*.safetensors"))
    assert weights
    for path in weights:
        other = load_file(sharded / stopped / "adapter" / path.name)
        assert all(torch.equal(other[name], value) for name, value in load_file(path).items())


def test_a_packed_base_is_refused_with_the_reason(sharded: Path) -> None:
    assert "packed matrices are not cut" in (sharded / "packed" / "error.txt").read_text()


def test_each_process_is_told_to_hold_less_than_all_of_gradients_and_moments(sharded: Path) -> None:
    plan = next(one for one in told(sharded / "full") if one["kind"] == "plan")
    assert plan["processes"] == 2 and plan["sharing"] == "fsdp"
    assert plan["prediction"]["learning"] < 12 * plan["learning"]


@pytest.mark.timeout(300)
def test_plain_processes_by_the_same_launcher_learn_what_one_does(model: Path, tmp_path: Path) -> None:
    options = {**COMMON, **CASES["lora"]}
    launched(CONFIGS / "plain.yaml", model, tmp_path / "two", {"lora": options})
    _, events = learn(tmp_path / "one", model, rows_of(options, 18), plain(**options))
    found = told(tmp_path / "two" / "lora")
    assert losses(found) == pytest.approx(losses(events), rel=1e-5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"fsdp_version: 2": "fsdp_version: 1", "forward: true": "forward: FULL_SHARD"}, "fsdp_version"),
        ({"mixed_precision: 'no'": "mixed_precision: 'bf16'"}, "mixed_precision"),
        ({"checkpointing: false": "checkpointing: true"}, "fsdp_activation_checkpointing"),
    ],
    ids=["version", "precision", "checkpointing"],
)
def test_what_a_run_would_not_hear_of_a_configuration_is_refused(
    changes: dict[str, str], name: str, model: Path, tmp_path: Path
) -> None:
    words = (CONFIGS / "fsdp.yaml").read_text()
    for said, instead in changes.items():
        assert said in words
        words = words.replace(said, instead)
    config = tmp_path / "changed.yaml"
    config.write_text(words)
    launched(config, model, tmp_path / "runs", {"refused": COMMON})
    assert name in (tmp_path / "runs" / "refused" / "error.txt").read_text()


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_pieces_of_another_kind_are_refused_with_the_way_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what accelerate's launcher tells its processes; on a CPU accelerate itself passes over it without a word."""
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(Usage) as raised:
        sharing_of(plain())
    assert raised.value.code == "tune.shards"
    assert kind in raised.value.message and "FSDP" in str(raised.value.hint)
