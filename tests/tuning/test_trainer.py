"""A run against transformers' Trainer with PEFT: the same losses, step by step, and an adapter that PEFT reads.

Covers tuning/trainer.py, tuning/setup.py, tuning/planning.py, tuning/order.py, tuning/settings.py,
tuning/methods/base.py, tuning/methods/lora.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, losses, peft_losses, plain
from safetensors.torch import load_file
from tiny_checkpoints import build

from glmchat.engine.engine import Engine
from glmchat.tuning.examples import Example
from glmchat.tuning.lora import write_bare
from glmchat.tuning.trainer import _Run


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Both sides sum in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "qwen2", "glm4-hf", "gpt2-hf"])
def test_fifty_steps_are_those_of_peft_and_trainer(tmp_path: Path, family: str) -> None:
    folder = build(family.removesuffix("-hf") if family == "gpt2-hf" else family, tmp_path / "base")
    data = documents("llama", 40)
    targets = ("c_attn", "c_fc") if family == "gpt2-hf" else ("q_proj", "v_proj", "down_proj")
    settings = plain(epochs=5, rows_per_step=4, learning_rate=3e-3, targets=targets)
    learn(tmp_path / "first", folder, data, plain(steps=1, learning_rate=1e-30, targets=targets))
    ours, events = learn(tmp_path / "ours", folder, data, settings)
    first = tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    theirs = peft_losses(folder, data, settings, tmp_path / "out", first)
    assert len(theirs) == len(losses(events)) == 50
    torch.testing.assert_close(torch.tensor(losses(events)), torch.tensor(theirs), atol=1e-4, rtol=0)
    assert theirs[-1] < theirs[0] - 0.05 and ours.step == 50


@pytest.mark.parametrize("silent", [False, True])
def test_how_a_step_is_cut_into_passes_changes_nothing(tmp_path: Path, silent: bool) -> None:
    """16 rows of unequal length in one pass, in some, and one by one; also where a pass has no label at all."""
    folder, data = build("llama", tmp_path / "base"), documents("llama", 16)
    if silent:
        longest = max(data, key=lambda each: len(each.ids))  # comes first, and alone
        data[data.index(longest)] = Example(longest.ids, (False,) * len(longest.ids), (), longest.place)
    found = []
    for row_tokens in (4096, 70, 1):
        settings = plain(rows_per_step=16, epochs=3, row_tokens=row_tokens, learning_rate=1e-3)
        result, events = learn(tmp_path / str(row_tokens), folder, data, settings)
        found.append((losses(events), load_file(result.adapter / "adapter_model.safetensors")))
    for values, tensors in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-6)
        for name, expected in found[0][1].items():
            torch.testing.assert_close(tensors[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [{}, {"rslora": True}, {"dora": True}, {"targets": r".*\.0\..*(v_proj|c_attn)"}])
@pytest.mark.parametrize("family", ["llama", "glm4-hf", "gpt2", "fallback"])
def test_the_folder_gives_peft_the_logits_of_what_learned(tmp_path: Path, family: str, shape: dict[str, Any]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if family == "fallback" and "targets" in shape:
        shape = {"targets": ("query_key_value",)}
    folder, data = build(family, tmp_path / "base"), documents(family, 6)
    run = _Run(
        folder, data, plain(steps=4, rows_per_step=3, learning_rate=1e-2, **shape), tmp_path / "run", print, (), ()
    )
    result = run.go(lambda: False)
    assert result.change > 0
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=0)
    ids = torch.tensor(data[0].ids)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(base, result.adapter).eval()(input_ids=ids[None]).logits[0]
        ours = run.model.eval()(ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("shape", [{"alpha": 16.0}, {"alpha": 3.0, "rslora": True}])
def test_the_one_file_gives_the_code_of_the_guide_the_logits_of_what_learned(
    tmp_path: Path, shape: dict[str, Any]
) -> None:
    """The guide makes its LoRA of alpha 32 anew and puts the numbers in, not strictly."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, data = build("llama", tmp_path / "base"), documents("llama", 6)
    given = plain(steps=4, rows_per_step=3, learning_rate=1e-2, targets=("q_proj", "v_proj"), **shape)
    run = _Run(folder, data, given, tmp_path / "run", print, (), ())
    write_bare(tmp_path / "adapter.pt", run.go(lambda: False).adapter)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=0)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(base, lora).eval()
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert {name for name, value in theirs.named_parameters() if value.requires_grad} == set(saved)
    assert theirs.load_state_dict(saved, strict=False).unexpected_keys == []
    ids = torch.tensor(data[0].ids)
    with torch.no_grad():
        ours, wanted = run.model.eval()(ids), theirs(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "chatglm3", "gguf", "qwen3"])
def test_the_folder_gives_the_engine_the_logits_of_what_learned(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 6)
    run = _Run(folder, data, plain(steps=4, rows_per_step=3, learning_rate=1e-2), tmp_path / "run", print, (), ())
    result = run.go(lambda: False)
    bare = tmp_path / "adapter.pt"
    write_bare(bare, result.adapter)
    ids = torch.tensor(data[0].ids)
    with torch.no_grad():
        ours = run.model.eval()(ids)
    engine = Engine.load(folder, dtype="float32", threads=1)
    plainly = engine.logits(data[0].ids)
    for name, place in (("folder", result.adapter), ("bare", bare)):
        engine.attach(place, name=name)
        engine.activate({name: 1.0})
        theirs = engine.logits(data[0].ids)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))
        assert not torch.allclose(theirs, plainly, atol=1e-4)
