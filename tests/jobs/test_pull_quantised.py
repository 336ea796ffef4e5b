"""`pull --quant`: weights are quantised as they arrive, and only the copy stays.

Covers jobs/staging.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hub_helpers import glmchat, last_json
from loopback_hub import LoopbackHub
from polling import wait_until
from safetensors.torch import load_file

from glmchat.checkpoints.recipe import Recipe
from glmchat.cli.main import run
from glmchat.core import locations
from glmchat.core.errors import DoesNotFit, GlmchatError
from glmchat.engine.quantize.plan import plan_quantise
from glmchat.engine.quantize.quantiser import execute
from glmchat.hub import store
from glmchat.jobs import pull_quantised, staging

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

REPO = "tiny/llama"
TINY_CHATGLM: dict[str, dict[str, Any]] = {
    "chatglm-6b-early": {"hidden_size": 32, "inner_hidden_size": 64},
    "chatglm2-6b": {"padded_vocab_size": 400, "hidden_size": 64, "ffn_hidden_size": 96},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in four safetensors files with an index, its norms in float32 beside float16 matrices."""
    from engine_builders import write_folder
    from safetensors.torch import save_file

    folder = write_folder(tmp_path_factory.mktemp("tiny") / "llama", torch_dtype="float16")
    tensors = {k: v if "norm" in k else v.half() for k, v in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    table: dict[str, str] = {}
    for number in range(4):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        part = {n: tensors[n].contiguous() for n in names[number::4]}
        save_file(part, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": dict(sorted(table.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def hub(loopback_hub: LoopbackHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    loopback_hub.add(REPO, {p.name: p.read_bytes() for p in checkpoint.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    yield loopback_hub


def pull(**request: Any) -> dict[str, Any]:
    """The job's work in this process, where a test may look at its steps; -> its result."""
    return pull_quantised.work({"name": REPO, "bits": 4, "options": {}, **request}, lambda event: None)


def copy() -> Path:
    (found,) = [p for p in locations.models_dir().iterdir() if p.name.endswith("int4")]
    return found


def left_over() -> list[str]:
    folders = [p.name for p in locations.models_dir().iterdir() if "incomplete" in p.name]
    return folders + [str(p) for p in locations.hf_cache().rglob("*") if p.is_file() and p.suffix != ".lock"]


def same_weights(one: Path, other: Path) -> bool:
    """Every tensor bit for bit; how they are spread over files may differ."""
    mine, theirs = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (one, other)
    )
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def made_from(checkpoint: Path, out: Path) -> Path:
    return execute(plan_quantise(checkpoint, out, Recipe(4)))


def test_what_arrives_quantised_is_what_quantising_the_whole_makes(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    code, out, err = glmchat(capsys, "pull", REPO, "--quant", "4", "--json")
    done = last_json(out)
    assert code == 0, err
    assert done["event"] == "done" and done["quant"].startswith("int4") and done["kind"] == "quantized"
    assert left_over() == []
    assert same_weights(copy(), made_from(checkpoint, tmp_path / "whole"))
    assert glmchat(capsys, "verify", str(copy()))[0] == 0
    asked = len(hub.requests)
    code, out, _ = glmchat(capsys, "pull", REPO, "--quant", "4", "--json")
    assert code == 0 and last_json(out)["made"] is False
    fetched = [seen.path for seen in hub.requests[asked:] if "resolve" in seen.path]
    # The plan reads which files there are, and of what kind the model is.
    assert [path for path in fetched if not path.endswith((".index.json", "/config.json"))] == []


def test_never_more_than_one_file_of_the_original_lies_on_the_disk(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring, seen = staging.bring, []

    def watched(plan: Any, paths: Any, folder: Path, *rest: Any) -> Any:
        got = bring(plan, paths, folder, *rest)
        seen.append(sorted(p.name for p in folder.glob("model-*")))
        return got

    monkeypatch.setattr(staging, "bring", watched)
    assert pull()["made"] is True
    assert [len(names) for names in seen if names] == [1, 1, 1, 1]


def test_the_plan_shows_both_numbers_and_fetches_nothing_large(hub: LoopbackHub, checkpoint: Path, capsys: Any) -> None:
    code, out, err = glmchat(capsys, "pull", REPO, "--quant", "4", "--dry-run", "--json")
    plan = last_json(out)
    sizes = [p.stat().st_size for p in checkpoint.glob("model-*.safetensors")]
    assert code == 0 and plan["bytes_to_fetch"] == sum(sizes)
    assert plan["disk_needed"] == plan["bytes_out"] + max(sizes) and plan["fits"] is True
    assert not hub.requests_for("model-00001-of-00004.safetensors")
    assert not locations.models_dir().exists() or not list(locations.models_dir().iterdir())
    assert "one after another" in err


def test_a_disk_that_is_too_small_is_refused_before_the_first_weights(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "free_bytes", lambda path: 64 * 2**20)
    with pytest.raises(DoesNotFit, match="of free space"):
        pull()
    assert not hub.requests_for("model-00001-of-00004.safetensors")


@pytest.mark.parametrize("stops_at", range(0, 26, 5))
def test_a_run_that_stopped_anywhere_goes_on_and_fetches_no_finished_file_again(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_at: int
) -> None:
    from glmchat.engine.quantize import quantiser

    write, count = quantiser._write, 0

    def failing(*arguments: Any) -> None:
        nonlocal count
        if count == stops_at:
            raise GlmchatError("the power went", hint="", code="test")
        count += 1
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(quantiser, "_write", failing)
        with pytest.raises(GlmchatError, match="the power went"):
            pull()
    assert pull()["made"] is True
    assert left_over() == []
    for number in range(1, 5):
        assert len(hub.requests_for(f"model-{number:05}-of-00004.safetensors")) == 1
    if stops_at == 10:
        assert same_weights(copy(), made_from(checkpoint, tmp_path / "whole"))


def begun(hub: LoopbackHub) -> subprocess.Popen[str]:
    """`glmchat pull --quant` in a process of its own, in the middle of its second file."""
    hub.rate = 60_000
    command = [sys.executable, "-P", "-m", "glmchat", "pull", REPO, "--quant", "4", "-q"]
    child = subprocess.Popen(
        command, env=dict(os.environ), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    wait_until(lambda: hub.sent_for("model-00002-of-00004.safetensors") or child.poll() is not None, 60)
    return child


def half_files() -> list[str]:
    """Of the growing copy: what is neither whole nor known as half."""
    return [p.name for p in locations.models_dir().glob("*.incomplete/*.incomplete") if "arriving" not in p.parent.name]


def test_a_process_that_is_killed_goes_on_where_it_was(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    child = begun(hub)
    (job,) = psutil.Process(child.pid).children()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    job.wait(60)  # the end of its stdin is its own
    hub.rate = None
    assert not [p for p in locations.models_dir().iterdir() if p.name.endswith("int4")] and half_files() == []
    assert glmchat(capsys, "pull", REPO, "--quant", "4")[0] == 0
    assert len(hub.requests_for("model-00001-of-00004.safetensors")) == 1
    assert left_over() == [] and same_weights(copy(), made_from(checkpoint, tmp_path / "whole"))


def test_ctrl_c_exits_130_and_the_same_command_goes_on(hub: LoopbackHub, capsys: Any) -> None:
    child = begun(hub)
    (job,) = psutil.Process(child.pid).children()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=300)
    assert child.returncode == 130 and "the files downloaded so far are kept" in err
    assert not job.is_running() and half_files() == []
    hub.rate = None
    assert glmchat(capsys, "pull", REPO, "--quant", "4")[0] == 0
    assert len(hub.requests_for("model-00001-of-00004.safetensors")) == 1 and left_over() == []


def test_a_second_pull_of_the_same_copy_says_that_it_waits(hub: LoopbackHub, capsys: Any) -> None:
    folder = staging.staging_folder(locations.private_dir(locations.models_dir()) / "tiny-llama-int4")
    folder.mkdir()
    codes: list[int] = []
    second = threading.Thread(target=lambda: codes.append(run(["pull", REPO, "--quant", "4"])))
    with store.alone(folder, lambda: False):
        second.start()
        wait_until(lambda: "waiting for it" in capsys.readouterr().err)
        assert not hub.requests_for("model-00001-of-00004.safetensors")
    second.join()
    assert codes == [0] and copy().is_dir() and left_over() == []


def test_keep_keeps_the_original_in_the_cache(hub: LoopbackHub, capsys: Any) -> None:
    assert glmchat(capsys, "pull", REPO, "--quant", "4", "--keep")[0] == 0
    kinds = {
        r["kind"] for r in map(json.loads, glmchat(capsys, "list", "--json")[1].splitlines()) if isinstance(r, dict)
    }
    assert copy().is_dir() and len(list(locations.hf_cache().rglob("model-*.safetensors"))) == 4
    assert not kinds or {"model", "quantized"} <= kinds


def test_a_wrong_shape_in_a_file_is_named_and_the_copy_is_not_there(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 128}))
    hub.add("tiny/wrong", {p.name: p.read_bytes() for p in folder.iterdir()})
    code, _, err = glmchat(capsys, "pull", "tiny/wrong", "--quant", "4")
    assert code == 3 and "mlp" in err
    assert not [p for p in locations.models_dir().iterdir() if p.name.endswith("int4")]


@pytest.mark.parametrize("name", TINY_CHATGLM)
def test_a_chatglm_in_bin_shards_arrives_as_quantising_the_whole_makes_it(
    loopback_hub: LoopbackHub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from random_checkpoints import tiny, write_checkpoint

    folder, bring, seen = tmp_path / name, staging.bring, []
    config = tiny(name, **TINY_CHATGLM[name])
    shards = [p.name for p in write_checkpoint(folder, config, kind="bin", shard_bytes=20_000)]
    assert len(shards) >= 5
    loopback_hub.add("tiny/glm", {p.name: p.read_bytes() for p in folder.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)

    def watched(plan: Any, paths: Any, folder: Path, *rest: Any) -> Any:
        got = bring(plan, paths, folder, *rest)
        seen.append(len(list(folder.glob("*.bin"))))
        return got

    monkeypatch.setattr(staging, "bring", watched)
    assert pull(name="tiny/glm")["made"] is True
    assert max(seen) == 1
    tied = ["pytorch_model-00006-of-00006.bin"] if name == "chatglm-6b-early" else []  # lm_head alone: never asked for
    assert [s for s in shards if len(loopback_hub.requests_for(s)) != 1] == tied
    assert left_over() == []
    assert same_weights(copy(), made_from(folder, tmp_path / "whole"))
    assert glmchat(capsys, "verify", str(copy()))[0] == 0


def test_a_model_that_runs_through_transformers_is_quantised_as_it_arrives(
    loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from engine_builders import write_folder
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = write_folder(tmp_path / "gemma")
    (folder / "model.safetensors").unlink()
    config = Gemma2Config(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).half().save_pretrained(folder, max_shard_size="80KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    loopback_hub.add("tiny/gemma", {p.name: p.read_bytes() for p in folder.iterdir()})
    monkeypatch.setenv("HF_ENDPOINT", loopback_hub.url)
    most: list[int] = []
    drop = staging.drop

    def counted(folder: Path, path: str) -> None:
        most.append(len(list(folder.glob("*.safetensors"))))
        drop(folder, path)

    monkeypatch.setattr(staging, "drop", counted)
    done = pull(name="tiny/gemma")
    assert done["quant"] == "int4-g64" and max(most) == 1, "one of its files at a time"
    assert left_over() == []
    assert same_weights(copy(), made_from(folder, tmp_path / "whole"))
    code, _, err = glmchat(capsys, "run", "tiny/gemma", "--quant", "4", "--max-tokens", "2", "hi")
    assert code == 0, err
