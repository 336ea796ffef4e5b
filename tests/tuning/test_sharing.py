"""Two processes that hold a part of the model each learn what one does that holds all of it.

Covers tuning/sharing/__init__.py, tuning/sharing/base.py, tuning/sharing/cut.py, tuning/sharing/fsdp.py,
tuning/sharing/zero.py, tuning/pieces.py.

They are started as docs/tuning.md says, with exactly its files.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, losses, plain, rows_of
from safetensors.torch import load_file
from tiny_checkpoints import build

from glmchat.core.errors import Usage
from glmchat.tuning.sharing import sharing_of
from glmchat.tuning.trainer import Result

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
OF_ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
STAGED = "zero_stage: 3"
STATES: dict[str, dict[str, Any]] = {
    "stopped": {**CASES["lora"], "stop": 3},
    "stopped full": {**CASES["full"], "moments": "bfloat16", "stop": 3},
    "undisturbed full": {**CASES["full"], "moments": "bfloat16"},
    "packed": {"quant": 8},
}
# What each way of sharing is tried with; what the stages of DeepSpeed's ZeRO have in common, with one of them.
WAYS = {
    "fsdp": [*CASES, *STATES],
    "deepspeed-3": [*CASES, *STATES],
    "deepspeed-2": ["lora", "full", *STATES],
    "deepspeed-1": ["lora", "packed"],
}
# Three passes make a step, so one of the two processes computes one that counts nothing.
PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from collections.abc import Callable
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


def config_of(way: str, folder: Path) -> Path:
    """The file of docs/accelerate for it, with the stage that is asked for."""
    name, _, stage = way.partition("-")
    words = (CONFIGS / f"{name}.yaml").read_text()
    if stage:
        assert STAGED in words
        words = words.replace(STAGED, f"zero_stage: {stage}")
    path = folder / f"{way}.yaml"
    path.write_text(words)
    return path


def in_ways(*names: str) -> pytest.MarkDecorator:
    """The test in each way of sharing, with each of these cases that the way has."""
    found = [(way, name) for way in WAYS for name in names if name in WAYS[way]]
    given = [pytest.param(*one, marks=OF_ZERO if one[0] != "fsdp" else ()) for one in found]
    return pytest.mark.parametrize(("way", "name"), given, ids=[" ".join(one) for one in found])


@pytest.fixture(scope="module")
def launches(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Learns all cases of a way in two processes, once."""

    @functools.cache
    def launch(way: str) -> Path:
        folder = tmp_path_factory.mktemp(way)
        launched(
            config_of(way, folder), model, folder, {name: {**COMMON, **{**CASES, **STATES}[name]} for name in WAYS[way]}
        )
        return folder

    return launch


@pytest.fixture
def sharded(way: str, launches: Callable[[str], Path]) -> Path:
    """A folder of runs in two processes, by name."""
    return launches(way)


Alone = Callable[[str], tuple[Path, Result, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The same run in one process: its folder, its result, what it told. Once for all ways of sharing."""
    folder = tmp_path_factory.mktemp("alone")

    @cache
    def run(name: str) -> tuple[Path, Result, list[dict[str, Any]]]:
        torch.set_num_threads(1)
        options = {**COMMON, **CASES.get(name, STATES.get(name, {}))}
        rows, held = rows_of(options, 18), rows_of(options, 3)
        return folder / name, *learn(folder / name, model, rows, plain(**options), evaluation=held)

    return run


@pytest.mark.timeout(300)
@in_ways(*CASES)
def test_losses_gradients_and_the_result_are_those_of_one_process(name: str, alone: Alone, sharded: Path) -> None:
    _, result, events = alone(name)
    both = told(sharded / name)
    assert losses(both) == pytest.approx(losses(events), rel=1e-5)
    norms, own = ([one["grad_norm"] for one in log if one["kind"] == "step"] for log in (both, events))
    assert norms == pytest.approx(own, rel=1e-4)
    end = both[-1]
    assert end["change"] == pytest.approx(result.change, rel=1e-4)
    assert end["evaluation"] == pytest.approx(result.evaluation, rel=1e-5)
    assert result.probe is not None
    torch.testing.assert_close(torch.tensor(end["probe"]), result.probe.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.timeout(300)
@in_ways("lora", "full")
def test_what_is_written_is_whole_and_named_as_one_process_does(name: str, alone: Alone, sharded: Path) -> None:
    folder, _, _ = alone(name)
    written = sorted(folder.rglob("*.safetensors"))
    assert written
    for one in written:
        two = load_file(sharded / name / one.relative_to(folder))
        for key, value in load_file(one).items():
            assert two[key].shape == value.shape
            if not one.name.startswith(("generator", "optimiser")):
                torch.testing.assert_close(two[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.timeout(300)
@in_ways("stopped", "stopped full")
def test_a_run_that_was_stopped_goes_on_bit_by_bit(name: str, sharded: Path) -> None:
    whole = {"stopped": "lora", "stopped full": "undisturbed full"}[name]
    found = told(sharded / name)
    assert [one["step"] for one in found if one["kind"] == "resumed"] == [3]
    assert losses(found) == losses(told(sharded / whole))
    weights = sorted((sharded / whole / "adapter").glob("*.safetensors"))
    assert weights
    for path in weights:
        other = load_file(sharded / name / "adapter" / path.name)
        assert all(torch.equal(other[key], value) for key, value in load_file(path).items())


@pytest.mark.timeout(300)
@in_ways("packed")
def test_a_packed_base_is_refused_where_all_weights_are_cut_and_learns_elsewhere(
    way: str, name: str, alone: Alone, sharded: Path
) -> None:
    if way in ("fsdp", "deepspeed-3"):
        assert "packed matrices are not cut" in (sharded / name / "error.txt").read_text()
        return
    assert losses(told(sharded / name)) == pytest.approx(losses(alone(name)[2]), rel=1e-4)


@in_ways("full")
def test_each_process_is_told_to_hold_less_than_all_of_gradients_and_moments(
    way: str, name: str, sharded: Path
) -> None:
    plan = next(one for one in told(sharded / name) if one["kind"] == "plan")
    assert plan["processes"] == 2 and plan["sharing"] == way
    assert plan["prediction"]["learning"] > 12 * plan["learning"] / 2  # its half, and what is whole besides
    kept = 4 if way.startswith("deepspeed") else 0  # DeepSpeed has a copy of its own of what learns
    assert plan["prediction"]["learning"] < (12 + kept) * plan["learning"]


@pytest.mark.timeout(300)
def test_plain_processes_by_the_same_launcher_learn_what_one_does(model: Path, alone: Alone, tmp_path: Path) -> None:
    launched(CONFIGS / "plain.yaml", model, tmp_path, {"lora": {**COMMON, **CASES["lora"]}})
    found = told(tmp_path / "lora")
    assert losses(found) == pytest.approx(losses(alone("lora")[2]), rel=1e-5)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("kind", "changes", "name"),
    [
        ("fsdp", {"fsdp_version: 2": "fsdp_version: 1", "forward: true": "forward: FULL_SHARD"}, "fsdp_version"),
        ("fsdp", {"mixed_precision: 'no'": "mixed_precision: 'bf16'"}, "mixed_precision"),
        ("fsdp", {"checkpointing: false": "checkpointing: true"}, "fsdp_activation_checkpointing"),
        pytest.param("deepspeed", {STAGED: "zero_stage: 0"}, "zero_stage", marks=OF_ZERO),
        pytest.param("deepspeed", {"optimizer_device: none": "optimizer_device: nvme"}, "offload", marks=OF_ZERO),
    ],
    ids=["version", "precision", "checkpointing", "stage", "nvme"],
)
def test_what_a_run_would_not_hear_of_a_configuration_is_refused(
    kind: str, changes: dict[str, str], name: str, model: Path, tmp_path: Path
) -> None:
    words = (CONFIGS / f"{kind}.yaml").read_text()
    for said, instead in changes.items():
        assert said in words
        words = words.replace(said, instead)
    config = tmp_path / "changed.yaml"
    config.write_text(words)
    launched(config, model, tmp_path / "runs", {"refused": COMMON})
    assert name in (tmp_path / "runs" / "refused" / "error.txt").read_text()


def test_pieces_of_another_kind_are_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what accelerate's launcher tells its processes; on a CPU accelerate itself passes over it without a word."""
    monkeypatch.setenv("ACCELERATE_USE_MEGATRON_LM", "true")
    with pytest.raises(Usage) as raised:
        sharing_of(plain())
    assert raised.value.code == "tune.shards"
    assert "Megatron" in raised.value.message and "FSDP" in str(raised.value.hint)


def test_without_deepspeed_the_way_to_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Usage) as raised:
        sharing_of(plain())
    assert raised.value.code == "tune.shards" and "pip install" in str(raised.value.hint)
