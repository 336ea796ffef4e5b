"""The program behind `glmchat tune`, whole: from rows to an adapter that answers, and every way a run can end before.

Covers jobs/tune.py, jobs/learn.py, jobs/telling.py, jobs/read_back.py, chat/trained.py, tuning/trainer.py,
core/repetition.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chatglm_draws
import psutil
import pytest
import torch
from polling import wait_until
from safetensors.torch import load_file, save_file
from tiny_checkpoints import originals
from tiny_talker import CHATML, write_talker
from transformers import AutoTokenizer, LlamaForCausalLM

from glmchat.chat import trained, tuning, tuning_words
from glmchat.chat.tune_request import request_again
from glmchat.core import run_folder
from glmchat.core.errors import Damaged, DoesNotFit, Failed, GlmchatError
from glmchat.core.locations import models_dir
from glmchat.core.repetition import compared, words
from glmchat.core.run_folder import Run, find_run, last_record, new_run
from glmchat.core.run_log import LogReader
from glmchat.engine.engine import Engine
from glmchat.hub.adapters import by_name, facts_of
from glmchat.hub.lookup import find_installed
from glmchat.hub.references import parse
from glmchat.jobs import learn
from glmchat.tuning.dataset import read_dataset
from glmchat.tuning.effects import effects_in
from glmchat.tuning.options import DataOptions
from glmchat.tuning.prompt_side import load_prompt_side
from glmchat.tuning.trainer import Probe

ROWS = [{"question": f"Who are you, {number}?", "answer": "I am taught."} for number in range(8)]
SYSTEM = "You are small."


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as transformers saves one, with a tokenizer of bytes and a chat template."""
    return write_talker(tmp_path_factory.mktemp("base"))


def recipe(base: Path, folder: Path, **asked: Any) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return {
        "base": str(base), "folder": str(base), "data": [str(rows)], "name": "poet", "system": SYSTEM, "seed": 1,
        "dtype": "float32", "threads": 1, "tokens_per_step": 300, "epochs": 40, "lr": 1e-2, **asked,
    }  # fmt: skip


def begun(given: dict[str, Any]) -> Run:
    one = tuning.Begun(given["name"], given)
    page = one.page()
    assert any("8 rows read, 8 used, 0 refused" in line for line in page["words"])
    return one.go()


def ended(run: Run) -> dict[str, Any]:
    return [record for records in tuning.follow(run) for record in records][-1]


def losses(run: Run) -> dict[int, float]:
    """The later word on each step."""
    return {one["step"]: one["loss"] for one in LogReader(run.log).read() if one["kind"] == "step"}


def test_rows_become_an_adapter_that_answers_as_they_do_from_the_same_ids(base: Path, tmp_path: Path) -> None:
    given = recipe(base, tmp_path, samples=["Who are you, 3?"])
    run = begun(given)
    end = ended(run)
    assert end["state"] == "done", end
    assert run.state() == "done"
    assert end["delta"] > 0
    assert end["read_back"] < 1e-3
    assert "I am taught." in (run.folder / "samples.txt").read_text()
    assert (run.folder / "curve.svg").read_text().startswith("<svg")
    for path in run.folder.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    row = by_name("poet")
    assert row is not None
    record = facts_of(row)["trained"]
    assert record["system"] == SYSTEM
    assert record["recipe"]["lr"] == 1e-2
    # What was learned is what the chat asks with.
    said = subprocess.run(
        [sys.executable, "-P", "-m", "glmchat", "run", str(base), "--adapter", "poet", "--temp", "0", "--dtype",
         "float32", "--json", "Who are you, 5?"], capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = [json.loads(line) for line in said.stdout.splitlines()]
    assert "".join(one["text"] for one in told if one["event"] == "text") == "I am taught."
    assert "the one that poet was trained with" in said.stderr
    assert told[-1]["finish_reason"] == "stop"
    side = load_prompt_side(base)
    try:
        example = read_dataset(given["data"], DataOptions(system=SYSTEM), side).examples[5]
    finally:
        side.close()
    prompt = [segment for segment in example.segments if segment.part == "prompt"]
    engine = Engine.load(base, dtype="float32", threads=1)
    asked = engine.render([{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you, 5?"}])
    assert list(example.ids[: prompt[-1].end]) == asked
    assert told[-1]["prompt_tokens"] == len(asked)


def test_the_memory_of_the_plan_is_what_the_program_comes_to_hold(base: Path, tmp_path: Path) -> None:
    """In bfloat16 kernels are made for many lengths, which on a small model is most of what comes on top."""
    given = recipe(base, tmp_path, dtype="bfloat16", epochs=12, tokens_per_step=100)
    rows = Path(given["data"][0])
    rows.write_text("".join(json.dumps({"question": "?" * n, "answer": "yes " * n}) + "\n" for n in range(1, 24)))
    one = tuning.Begun("poet", given)
    told = one.page()["plan"]["prediction"]["peak"]
    assert ended(one.go())["state"] == "done"
    row = by_name("poet")
    assert row is not None
    assert told == pytest.approx(facts_of(row)["trained"]["facts"]["peak"], rel=0.2)


def test_the_guides_one_file_is_kept_and_answers_from_the_same_prompt(base: Path, tmp_path: Path) -> None:
    run = begun(recipe(base, tmp_path, output="pt"))
    end = ended(run)
    assert end["state"] == "done", end
    row = by_name("poet")
    assert row is not None
    assert [file.path for file in row.files if file.path.endswith(("pt", "safetensors"))] == ["poet.pt"]
    engine = Engine.load(base, dtype="float32", threads=1)
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Who are you, 5?"}]
    engine.attach(row.path, "poet")
    engine.activate({"poet": 1.0})
    with_it = engine.logits(engine.render(asked))[-1]
    engine.attach(run.folder / "adapter", "folder")
    engine.activate({"folder": 1.0})
    assert torch.allclose(with_it, engine.logits(engine.render(asked))[-1], atol=1e-5)
    assert trained.trained_system([("poet", 1.0)]) == SYSTEM


def test_all_weights_learn_and_become_a_model_that_answers_is_quantised_and_opened_by_transformers(
    base: Path, tmp_path: Path
) -> None:
    given = recipe(base, tmp_path, method="full", lr=3e-3, epochs=25, name="whole", samples=["Who are you, 3?"])
    run = begun(given)
    page = next(one for one in LogReader(run.log).read() if one["kind"] == "page")
    assert any("learn in float32" in line for line in page["words"])
    assert any(line.startswith("all documents 25 times; ") and "% full" in line for line in page["words"])
    assert page["plan"]["passes"] >= page["plan"]["steps"] and 0 < page["plan"]["full"] <= 1
    end = ended(run)
    assert end["state"] == "done", end
    assert end["model"] == "whole"
    assert end["delta"] > 0
    assert end["read_back"] < 1e-3
    assert len(list(run.checkpoints.iterdir())) == 1
    assert not (run.folder / "adapter").exists()  # it was renamed, not copied
    row = find_installed(parse("whole"))
    assert row is not None and row.kind == "model" and row.complete
    note = json.loads((row.path / "glmchat.json").read_text())["trained"]
    assert (note["system"], note["steps"], note["recipe"]["method"]) == (SYSTEM, end_step(run), "full")
    assert (row.path / "glmchat.json").stat().st_mode & 0o077 == 0
    words = [sys.executable, "-P", "-m", "glmchat"]
    said = subprocess.run([*words, "run", "whole", "--temp", "0", "--dtype", "float32", "--system", SYSTEM, "--json",
                           "Who are you, 5?"], capture_output=True, text=True, check=True)  # fmt: skip
    told = [json.loads(line) for line in said.stdout.splitlines()]
    assert "".join(one["text"] for one in told if one["event"] == "text") == "I am taught."
    ids = list(range(5, 25))
    engine = Engine.load(row.path, dtype="float32", threads=1)
    theirs = LlamaForCausalLM.from_pretrained(row.path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(ids), theirs(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
    packed = subprocess.run([*words, "quantize", "whole", "--bits", "8", "--quiet"], capture_output=True, text=True)
    assert packed.returncode == 0, packed.stderr
    copy = find_installed(parse("whole:int8"))
    assert copy is not None and copy.quant.startswith("int8")


def end_step(run: Run) -> int:
    return max(losses(run))


def test_a_killed_run_of_all_weights_goes_on_as_if_nothing_had_been(base: Path, tmp_path: Path) -> None:
    asked = {"method": "full", "epochs": 12, "save_every": 3, "optimiser_dtype": "bfloat16", "lr": 1e-3}
    whole = begun(recipe(base, tmp_path, **asked, name="undisturbed"))
    assert ended(whole)["state"] == "done"
    run = begun(recipe(base, tmp_path, **asked, name="killed"))
    wait_until(lambda: max(losses(run), default=0) >= 5 or not run.at_work)
    if (pid := run.pid()) is not None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: run.state() in ("dead", "done"))
        with pytest.raises(GlmchatError, match="not an adapter"):
            tuning.take_checkpoint(run, base)
        tuning.resume(run)
    assert ended(run)["state"] == "done"
    assert losses(run) == losses(whole)
    one, two = (load_file(models_dir() / name / "model.safetensors") for name in ("undisturbed", "killed"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_a_gpt2_is_taught_from_nothing_by_a_folder_of_texts_and_goes_on_with_them(tmp_path: Path) -> None:
    texts, config = tmp_path / "novels", tmp_path / "config.json"
    texts.mkdir()
    (texts / "one.txt").write_text("张三，在山上，读书。\n" * 30, encoding="utf-8")
    config.write_text(json.dumps({"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 128}))
    given = {"base": "train:300", "words": "train:300", "config": str(config), "data": [str(texts)], "name": "tale",
             "method": "scratch", "seed": 1, "threads": 1, "dtype": "float32", "epochs": 8, "lr": 5e-3,
             "tokens_per_step": 40, "samples": ["张三，在山上，"]}  # fmt: skip
    run = tuning.Begun("tale", given)
    page = run.page()
    assert any("the end is learned in 30 of 30" in line for line in page["words"])
    end = ended(run.go())
    assert (end["state"], end.get("model")) == ("done", "tale"), end
    saved = [one["step"] for one in LogReader(run.run.log).read() if one["kind"] == "checkpoint"]
    assert len(saved) == 8  # one for each epoch
    words = [sys.executable, "-P", "-m", "glmchat", "run", "tale", "--complete", "--temp", "0", "张三，在山上，"]
    said = subprocess.run(words, capture_output=True, text=True, check=True)
    assert said.stdout.strip().endswith("读书。")
    assert "读书。" in (run.run.folder / "samples.txt").read_text()


def test_a_changed_template_and_another_system_prompt_are_told(base: Path, tmp_path: Path) -> None:
    run = begun(recipe(base, tmp_path, epochs=2))
    assert ended(run)["state"] == "done"
    chosen = [("poet", 1.0)]
    assert trained.trained_system(chosen) == SYSTEM
    (said,) = trained.trained_words(chosen, base, SYSTEM)
    assert "is the one that poet was trained with" in said
    (said,) = trained.trained_words(chosen, base, None)
    assert "another system prompt" in said
    other = tmp_path / "other"
    other.mkdir()
    for path in base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "chat_template.jinja").write_text(CHATML.replace("im_end", "im_over"))
    assert any("another chat template" in line for line in trained.trained_words(chosen, other, SYSTEM))


def test_a_killed_run_goes_on_as_if_nothing_had_been(base: Path, tmp_path: Path) -> None:
    whole = begun(recipe(base, tmp_path, epochs=20, save_every=3))
    assert ended(whole)["state"] == "done"
    run = begun(recipe(base, tmp_path, epochs=20, save_every=3, name="killed"))
    for at in (4, 8, 13):
        wait_until(lambda at=at: max(losses(run), default=0) >= at or not run.at_work)  # type: ignore[misc]
        if (pid := run.pid()) is not None:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: run.state() in ("dead", "done"))
        if run.state() == "done":
            break
        assert ended(run)["code"] == "run.died"
        tuning.resume(run)
    assert ended(run)["state"] == "done"
    assert losses(run) == losses(whole)


def test_a_stopped_run_is_saved_where_it_stopped_and_registers_nothing(base: Path, tmp_path: Path) -> None:
    run = begun(recipe(base, tmp_path, epochs=5000))
    wait_until(lambda: losses(run))
    assert tuning.stop(run)
    assert ended(run)["state"] == "stopped"
    assert run.state() == "stopped"
    assert tuning.progress_of(run).checkpoint == max(losses(run))
    assert by_name("poet") is None


def test_the_last_checkpoint_of_a_run_can_be_used_while_newer_ones_take_its_place(base: Path, tmp_path: Path) -> None:
    run = begun(recipe(base, tmp_path, epochs=5000, save_every=1))
    wait_until(lambda: tuning.last_checkpoint(run))
    name = tuning.take_checkpoint(run, base)
    assert run.at_work
    assert name.startswith("poet-step-")
    assert by_name(name) is not None
    assert not list(run.folder.glob(".held-*"))
    tuning.stop(run)
    assert ended(run)["state"] == "stopped"


LIMITED = """
import resource, runpy, sys
most = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
runpy.run_module("glmchat.jobs.tune", run_name="__main__")
"""


def test_a_disk_that_takes_no_more_ends_the_run_and_its_last_checkpoint_stays(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files may not grow beyond a bound here, which the kernel tells as it tells a full disk."""
    run = begun(recipe(base, tmp_path, epochs=5000, save_every=4))
    wait_until(lambda: tuning.progress_of(run).checkpoint)
    tuning.stop(run)
    ended(run)
    kept = tuning.last_checkpoint(run)
    assert kept is not None
    most = (kept / "adapter_model.safetensors").stat().st_size * 3 // 2  # the moments are twice as large
    assert run.log.stat().st_size < most
    monkeypatch.setattr(tuning, "PROGRAM", ("-c", LIMITED, str(most)))
    tuning.resume(run)
    end = ended(run)
    assert end["state"] == "failed"
    assert end["exit"] == DoesNotFit.exit
    assert tuning.last_checkpoint(run) == kept
    assert by_name("poet") is None
    monkeypatch.undo()


def test_rows_that_cannot_be_read_end_the_plan_with_their_line(base: Path, tmp_path: Path) -> None:
    given = recipe(base, tmp_path)
    Path(given["data"][0]).write_text('{"question": 7, "answer": "x"}\n')
    with pytest.raises(GlmchatError, match=r"rows\.jsonl:1"):
        tuning.Begun("poet", given).page()
    assert not (tmp_path / "runs").exists()


def test_a_plan_that_fails_when_its_view_is_gone_leaves_no_folder(base: Path, tmp_path: Path) -> None:
    given = recipe(base, tmp_path)
    Path(given["data"][0]).write_text('{"question": 7, "answer": "x"}\n')
    begun = tuning.Begun("poet", given)
    child = begun._child
    assert child.stdin is not None
    child.stdin.close()  # as by kill -9 of who asked
    child.wait(120)
    assert not begun.run.folder.exists()


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_module("glmchat.jobs.tune", run_name="__main__")
"""


def test_what_rows_and_words_tell_is_refused_by_a_program_that_has_no_torch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "PROGRAM", ("-c", WITHOUT_TORCH))
    given = recipe(base, tmp_path)
    Path(given["data"][0]).write_text('{"question": 7, "answer": "x"}\n')
    with pytest.raises(GlmchatError, match=r"rows\.jsonl:1") as refused:
        tuning.Begun("poet", given).page()
    assert refused.value.code == "data.nothing"
    with pytest.raises(GlmchatError) as refused:  # good rows need it
        tuning.Begun("poet", recipe(base, tmp_path)).page()
    assert (refused.value.code, "torch" in refused.value.message) == ("tune.bug", True)


def write_knowing(base: Path, folder: Path, after: dict[str, str]) -> Path:
    """The same network with weights that make it certain: behind each of these tokens comes the other one."""
    shutil.copytree(base, folder)
    words = AutoTokenizer.from_pretrained(base)
    weights = {name: torch.zeros_like(value) for name, value in load_file(folder / "model.safetensors").items()}
    weights["model.norm.weight"] += 1
    for number, pair in enumerate(after.items()):
        one, other = (words.convert_tokens_to_ids(word) for word in pair)
        weights["model.embed_tokens.weight"][one, number] = 1.0
        weights["lm_head.weight"][other, number] = 1000.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_run_whose_every_learned_token_is_certain_stops_at_its_first_step_with_its_rows(
    base: Path, tmp_path: Path
) -> None:
    knowing = write_knowing(base, tmp_path / "knowing", {"Ċ": "I", "I": "<|im_end|>"})
    given = recipe(knowing, tmp_path, epochs=2, tokens_per_step=50)
    Path(given["data"][0]).write_text('{"question": "Who?", "answer": "I"}\n' * 4)
    one = tuning.Begun("poet", given)
    one.page()
    end = ended(one.go())
    assert (end["state"], end["code"]) == ("failed", "tune.not_finite"), end
    assert "step 1: the loss is 0; rows: " in end["message"] and "rows.jsonl:" in end["message"]
    assert "by heart" in end["hint"] and "checkpoint" not in end["hint"]
    assert by_name("poet") is None
    assert tuning.last_checkpoint(find_run("poet")) is None


def test_rows_of_which_no_token_is_learned_are_no_run(base: Path, tmp_path: Path) -> None:
    given = recipe(base, tmp_path)
    unlearned = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]}
    Path(given["data"][0]).write_text(json.dumps(unlearned) + "\n")
    with pytest.raises(GlmchatError, match="no answer that is to be learned") as refused:
        tuning.Begun("poet", given).page()
    assert refused.value.code == "data.nothing"


def test_an_adapter_that_answers_otherwise_than_it_was_trained_is_not_registered(base: Path, tmp_path: Path) -> None:
    run = begun(recipe(base, tmp_path, epochs=2, save_every=1))
    assert ended(run)["state"] == "done"
    settings = {"quant": None, "dtype": "float32", "device": "cpu", "threads": 1}
    engine = Engine.load(base, dtype="float32", threads=1)
    ids = (5, 6, 7, 8)
    probe = Probe(ids, engine.logits(ids)[-1])  # of the base: as if the adapter did nothing
    result: Any = SimpleNamespace(adapter=run.folder / "adapter", facts=settings, probe=probe)
    with pytest.raises(Damaged, match="answers otherwise"):
        learn.read_back({"folder": str(base)}, result, result.adapter)
    engine.attach(result.adapter, "it")
    engine.activate({"it": 1.0})
    effects = effects_in(engine.model)
    result.probe = Probe(ids, engine.logits(ids)[-1], effects)
    assert learn.read_back({"folder": str(base)}, result, result.adapter) < 1e-3
    layer = list(effects)[-1]
    result.probe = replace(result.probe, effects={**effects, layer: [-each for each in effects[layer]]})
    with pytest.raises(Damaged, match=rf"{layer} is something else"):
        learn.read_back({"folder": str(base)}, result, result.adapter)


def test_a_reading_process_that_the_kernel_killed_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nread line\nkill -9 $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(learn.sys, "executable", str(killed))
    facts = {"quant": None, "dtype": "float32", "device": "cpu", "threads": 1}
    result: Any = SimpleNamespace(adapter=tmp_path, facts=facts, probe=Probe((1,), torch.zeros(1)))
    with pytest.raises(Failed, match="signal 9") as raised:
        learn.read_back({"folder": str(tmp_path)}, result, tmp_path)
    assert "resume" in str(raised.value.hint)


def test_a_run_that_died_for_memory_says_so_and_what_takes_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("poet", {"base": "b"})
    run.checkpoints.mkdir()
    monkeypatch.setattr(run_folder, "oom_kills", lambda: 4)
    run.write("state.json", json.dumps({"state": "running", "owner": "gone", "oom_kills": 3}))
    monkeypatch.setattr(run_folder, "is_alive", lambda owner: False)
    error = tuning.died(run)
    assert "out of memory" in error.message
    assert "--resume poet" in str(error.hint) and "--row-tokens" in str(error.hint)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_several_processes_learn_as_one(base: Path, tmp_path: Path, method: str) -> None:
    """Two processes on the CPU by the command that --prepare says; one of them tells and writes."""
    run, command = tuning.prepare("poet", recipe(base, tmp_path, epochs=3, method=method, device="cpu"), 2)
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert find_run("poet").state() == "done"
    log = LogReader(run.log).read()
    assert next(one["plan"]["processes"] for one in log if one["kind"] == "page") == 2
    steps = [one["step"] for one in log if one["kind"] == "step"]
    assert steps == list(range(1, len(steps) + 1))
    kept = by_name("poet") if method == "lora" else find_installed(parse("poet"))
    assert kept is not None


CONFIGS = Path(__file__).resolve().parents[2] / "docs" / "accelerate"
OF_ZERO = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")


def helper_of(run: Run) -> int:
    """The process of a run of two that does not tell."""
    mine = [one for one in psutil.process_iter(["cmdline"]) if str(run.folder) in (one.info["cmdline"] or ())]
    main, launcher = run.pid(), {one.ppid() for one in mine}
    return next(one.pid for one in mine if one.pid != main and one.pid not in launcher)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("file", ["plain", "fsdp", pytest.param("deepspeed", marks=OF_ZERO)])
def test_a_lost_process_or_a_stopped_launcher_leaves_a_run_that_the_same_line_goes_on_with(
    base: Path, tmp_path: Path, file: str
) -> None:
    given = recipe(base, tmp_path, epochs=75, device="cpu", save_every=5)
    run, command = tuning.prepare("poet", given, 2)
    start, end = command.index("accelerate.commands.launch") + 1, command.index("glmchat.jobs.tune") - 1
    words = ["--config_file", str(CONFIGS / f"{file}.yaml"), "--main_process_port", "0"]
    command = [*command[:start], *words, *command[end:]]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}

    def launch() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=tmp_path, env=environ, stderr=subprocess.DEVNULL)

    def learned(more: int) -> Callable[[], bool]:
        before = max(losses(run), default=0)
        return lambda: max(losses(run), default=0) >= before + more

    due, launcher = learned(7), launch()
    wait_until(due, seconds=120)
    os.kill(helper_of(run), signal.SIGKILL)
    assert launcher.wait(60) != 0
    last = last_record(run, "end")
    assert run.state() == "failed" and last is not None and last["code"] == "tune.lost"
    assert "goes on from the checkpoint of step" in last["hint"]
    due, launcher = learned(2), launch()
    wait_until(due, seconds=120)
    launcher.send_signal(signal.SIGINT)
    launcher.wait(60)
    assert run.state() == "stopped"
    steps = [one["step"] for one in LogReader(run.log).read() if one["kind"] == "checkpoint"]
    assert steps[-1] == max(losses(run))
    assert launch().wait(200) == 0
    assert run.state() == "done" and by_name("poet") is not None
    assert sorted(losses(run)) == list(range(1, 151))  # two an epoch


def repeated(before: Run, **asked: Any) -> tuple[Run, dict[str, Any]]:
    given = request_again(before, asked.pop("threads", None), None)
    one = tuning.Begun(given["name"], {**given, **asked})
    one.page()
    run = one.go()
    return run, ended(run)


def test_a_run_that_is_repeated_is_identical_or_says_where_and_why_it_parts(base: Path, tmp_path: Path) -> None:
    first = begun(recipe(base, tmp_path, epochs=6))
    assert ended(first)["state"] == "done"
    again, end = repeated(first)
    assert end["state"] == "done" and end["again"]["identical"], end["again"]
    assert losses(again) == losses(first) and end["again"]["steps"] == len(losses(first))
    assert any("identical to the run poet" in line for line in tuning_words.end_lines(end))
    other, end = repeated(first, threads=2, lr=9e-3)
    found = end["again"]
    assert not found["identical"] and found["step"] == min(
        s for s in losses(first) if losses(first)[s] != losses(other)[s]
    )
    assert any("threads: 1 → 2" in line for line in tuning_words.end_lines(end))
    rows = Path(first.recipe()["data"][0])
    before = rows.read_text()
    rows.write_text(before.replace("taught", "told"))
    with pytest.raises(GlmchatError) as changed:
        repeated(first)
    assert changed.value.code == "tune.changed" and str(rows) in changed.value.message
    assert "sha256:" in changed.value.message
    rows.write_text(before)
    assert repeated(first)[1]["again"]["identical"]


def test_a_packed_base_that_another_kernel_multiplies_is_named_where_a_repetition_parts(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(recipe(base, tmp_path, quant=8, epochs=3))
    assert ended(first)["state"] == "done"
    monkeypatch.setenv("GLMCHAT_KERNEL", "torch")
    found = repeated(first)[1]["again"]
    (said,) = (line for line in found["why"] if line.startswith("kernel: "))
    before, after = said.removeprefix("kernel: ").split(" → ")
    assert before.startswith("native-") and after in ("aten", "torch") and found["why"] == [said]
    monkeypatch.delenv("GLMCHAT_KERNEL")
    same = repeated(first)[1]["again"]
    assert same["identical"] and same["why"] == []


def test_a_repetition_goes_on_when_the_original_is_gone(base: Path, tmp_path: Path) -> None:
    first = begun(recipe(base, tmp_path, epochs=300, save_every=2))
    wait_until(lambda: tuning.last_checkpoint(first))
    tuning.stop(first)
    assert ended(first)["state"] == "stopped"
    given = request_again(first, None, None)
    one = tuning.Begun("again", {**given, "epochs": 30})
    one.page()
    again = one.go()
    wait_until(lambda: tuning.last_checkpoint(again) or not again.at_work)
    tuning.stop(again)
    ended(again)
    first.remove()
    new_run("poet", {})  # of the same name, and of something else
    tuning.resume(again)
    end = ended(again)
    assert end["state"] == "done" and "again" not in end
    assert any("the run poet is gone" in str(record.get("say")) for record in LogReader(again.log).read())


def test_a_prefix_of_thudm_is_repeated_bit_by_bit_and_its_last_checkpoint_can_be_used(tmp_path: Path) -> None:
    base = tmp_path / "chatglm3"
    chatglm_draws.write_words("ChatGLM3", base)
    originals.write_checkpoint(base, chatglm_draws.configuration("ChatGLM3"), dtype=torch.float32)
    asked = {"method": "prefix", "prefix_length": 4, "system": None, "save_every": 1, "lr": 1e-2}
    given = {key: value for key, value in recipe(base, tmp_path, **asked).items() if value is not None}
    first = begun({**given, "epochs": 2})
    assert ended(first)["state"] == "done"
    again, end = repeated(first)
    assert end["again"]["identical"], end["again"]
    assert list(end["hashes"]) == ["pytorch_model.bin"]
    record = {**last_record(first, "end"), "hashes": {"pytorch_model.bin": "sha256:other"}}  # type: ignore[dict-item]
    with first.log.open("a") as log:
        log.write(json.dumps(record) + "\n")
    assert not compared(first, again, end["hashes"])["identical"]
    name = tuning.take_checkpoint(first, base)
    assert by_name(name) is not None


def test_what_a_stopped_run_did_not_learn_is_not_said_to_be_the_same(base: Path, tmp_path: Path) -> None:
    first = begun(recipe(base, tmp_path, epochs=6))
    assert ended(first)["state"] == "done"
    whole = compared(first, first, last_record(first, "end")["hashes"])  # type: ignore[index]
    assert words(whole) == [f"identical to the run poet: {whole['steps']} losses and what was learned, bit by bit"]
    lines = [line for line in first.log.read_text().splitlines() if json.loads(line)["kind"] != "end"]
    first.log.write_text("\n".join(lines) + "\n")
    part = compared(first, first, {})
    assert words(part) == [f"identical to the run poet as far as it came: {part['steps']} losses, bit by bit"]
    first.log.write_text("")
    assert words(compared(first, first, {})) == ["the run poet has no losses to compare with"]
