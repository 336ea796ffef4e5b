"""Preferences against trl's own trainer: the same loss, rewards, accuracy and margins, step by step.

Covers tuning/methods/dpo.py, tuning/methods/__init__.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import learn, losses, pairs, plain
from safetensors.torch import load_file
from tiny_checkpoints import NAMES, build

from glmchat.core.errors import Failed, Usage
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import flatten, load_base
from glmchat.tuning.methods import method_of
from glmchat.tuning.order import order_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.trainer import _Run

MEASURES = ("reward_chosen", "reward_rejected", "accuracy", "margin")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Both sides sum in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of_trl(folder: Path, data: Sequence[Example], settings: Settings, out: Path, first: Path) -> list[dict[str, float]]:
    """trl's DPOTrainer with PEFT over the same pairs in the same order, from the same A."""
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    rows = []
    for epoch in range(1, settings.epochs + 1):
        for number in order_of(len(data), settings.seed, epoch):
            (better, counts), (worse, _) = data[number].documents()
            start = counts.index(True)
            rows.append({"prompt_ids": better[:start], "chosen_ids": better[start:], "rejected_ids": worse[start:]})

    class Ready(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
            return dataset

    found: list[dict[str, float]] = []

    class Hears(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
                found.append({ours: logs[name] for ours, name in zip(("loss", *MEASURES), names, strict=True)})

    targets = list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets
    shape = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets, task_type="CAUSAL_LM")
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    arguments = DPOConfig(
        output_dir=str(out),
        beta=settings.beta,
        loss_type=[settings.loss],
        per_device_train_batch_size=settings.rows_per_step,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        weight_decay=settings.weight_decay,
        adam_epsilon=settings.eps,
        max_grad_norm=settings.clip,
        optim="adamw_torch",
        logging_steps=1,
        logging_nan_inf_filter=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Ready(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=words,
        peft_config=shape,
        callbacks=[Hears()],
    )
    own = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(first).items():
            if ".lora_A" in name:
                own[name.replace(".weight", ".default.weight")].copy_(value)
    trainer.train()
    return found


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_ten_steps_are_those_of_trl(tmp_path: Path, loss: Any) -> None:
    pytest.importorskip("trl", reason="trl comes with the packages for developers")
    folder, data = build("llama", tmp_path / "base"), pairs("llama", 20)
    targets = ("q_proj", "v_proj", "down_proj")
    settings = plain(method="dpo", loss=loss, beta=0.3, epochs=2, rows_per_step=4, learning_rate=3e-3, targets=targets)
    learn(tmp_path / "first", folder, data, replace(settings, epochs=0, steps=1, learning_rate=1e-30))
    _, events = learn(tmp_path / "ours", folder, data, settings)
    first = tmp_path / "first" / "adapter" / "adapter_model.safetensors"
    theirs = of_trl(folder, data, settings, tmp_path / "out", first)
    steps = [event for event in events if event["kind"] == "step"]
    assert len(theirs) == len(steps) == 10
    for step, expected in zip(steps, theirs, strict=True):
        assert {name: step[name] for name in expected} == pytest.approx(expected, abs=1e-4), step["step"]
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.05


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_first_loss_is_that_of_a_coin_and_nothing_is_preferred_yet(tmp_path: Path, family: str, loss: Any) -> None:
    folder, beta = build(family, tmp_path / "base"), 0.25
    settings = plain(method="dpo", loss=loss, beta=beta, steps=1, rows_per_step=6)
    _, events = learn(tmp_path / "run", folder, pairs(family, 6), settings)
    expected = math.log(2) if loss == "sigmoid" else 1 / (4 * beta**2)
    assert losses(events) == pytest.approx([expected], abs=1e-6)
    step = next(event for event in events if event["kind"] == "step")
    assert [step[name] for name in MEASURES] == pytest.approx([0.0] * 4, abs=1e-6)


@pytest.mark.parametrize("quant", [None, 8, 4])
def test_pairs_are_told_apart_soon_and_by_the_same_measures_where_they_are_held_out(
    tmp_path: Path, quant: int | None
) -> None:
    """Also on packed bases; judged by the very pairs that were learned, so the last evaluation is known."""
    folder, data = build("llama", tmp_path / "base"), pairs("llama", 8)
    settings = plain(method="dpo", epochs=30, rows_per_step=8, learning_rate=3e-3, quant=quant)
    result, events = learn(tmp_path / "run", folder, data, settings, evaluation=data)
    steps = [event for event in events if event["kind"] == "step"]
    assert steps[-1]["accuracy"] == 1.0 and steps[-1]["margin"] > 0.5 and steps[-1]["loss"] < 0.5
    judged = [event for event in events if event["kind"] == "evaluation"][-1]
    assert judged["accuracy"] == 1.0 and judged["margin"] >= steps[-1]["margin"] and "perplexity" not in judged
    assert judged["margin"] == pytest.approx(judged["reward_chosen"] - judged["reward_rejected"], abs=1e-5)
    assert result.evaluation == judged["loss"]


def test_how_a_step_is_cut_into_passes_changes_nothing(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), pairs("llama", 16)
    found = []
    for row_tokens, checkpointing in ((4096, "off"), (100, "on"), (1, "off")):
        settings = plain(
            method="dpo", epochs=3, rows_per_step=16, row_tokens=row_tokens, learning_rate=3e-3,
            checkpointing=checkpointing,
        )  # fmt: skip
        _, events = learn(tmp_path / f"{row_tokens}", folder, data, settings)
        found.append([[e[name] for name in ("loss", *MEASURES)] for e in events if e["kind"] == "step"])
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(found[0]), atol=1e-5, rtol=1e-5)


def test_the_reference_is_the_base_and_leaves_no_gradient(tmp_path: Path) -> None:
    """The rewards of a moved adapter are beta times what transformers with PEFT gives, with the adapter and without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, data = build("llama", tmp_path / "base"), pairs("llama", 5)
    settings = plain(method="dpo", beta=0.4, epochs=4, rows_per_step=5, learning_rate=1e-2)
    result, events = learn(tmp_path / "run", folder, data, settings, evaluation=data)
    judged = [event for event in events if event["kind"] == "evaluation"][-1]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), result.adapter)

    def log_p(ids: Sequence[int], learned: Sequence[bool]) -> float:
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        return float(sum(logits[at - 1, ids[at]] for at, counts in enumerate(learned) if counts))

    rewards: list[list[float]] = [[], []]
    with torch.no_grad():
        for example in data:
            for side, document in zip(rewards, example.documents(), strict=True):
                moved = log_p(*document)
                with model.disable_adapter():
                    side.append(0.4 * (moved - log_p(*document)))
    means = [sum(side) / len(side) for side in rewards]
    assert [judged["reward_chosen"], judged["reward_rejected"]] == pytest.approx(means, abs=1e-4)
    accuracy = sum(a > b for a, b in zip(*rewards, strict=True)) / len(data)
    assert judged["accuracy"] == pytest.approx(accuracy)


def test_a_run_that_breaks_stops_and_a_square_that_begins_high_is_no_break(tmp_path: Path) -> None:
    """The guard hears losses of pairs too; those of IPO begin at 1 / (4 beta^2) and may come back there."""
    folder, data = build("llama", tmp_path / "base"), pairs("llama", 4)
    settings = plain(method="dpo", loss="ipo", beta=0.1, epochs=12, rows_per_step=1, learning_rate=3e-2)
    _, events = learn(tmp_path / "ipo", folder, data, settings)
    assert losses(events)[0] == pytest.approx(25.0) and len(losses(events)) == 48
    run = _Run(folder, data, plain(method="dpo", epochs=8, rows_per_step=4, beta=20.0), tmp_path / "run", print, (), ())
    hear = run.guard.hear

    def spoil(step: int, loss: float, saved: int | None) -> None:
        with torch.no_grad():
            for value in run.method.parameters.values():
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(step)) * 3)
        hear(step, loss if step > 2 else math.log(2), saved)

    run.guard.hear = spoil  # type: ignore[method-assign]
    run.guard._lowest = math.log(2)
    with pytest.raises(Failed) as raised:
        run.go(lambda: False)
    assert raised.value.code == "tune.diverged" and not (tmp_path / "run" / "adapter").exists()


def test_single_answers_and_pairs_are_not_learned_by_each_others_method(tmp_path: Path) -> None:
    from learning import documents

    folder = build("llama", tmp_path / "base")
    for method, data in (("dpo", documents("llama", 2)), ("lora", pairs("llama", 2))):
        with pytest.raises(Usage) as refused:
            learn(tmp_path / method, folder, data, plain(method=method, steps=1))
        assert refused.value.code == "tune.rows" and "data.json:1" in refused.value.message


def test_a_pair_that_is_not_finite_is_named_with_its_layer(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), pairs("llama", 6)
    settings = plain(method="dpo", epochs=1, rows_per_step=6)
    checkpoint, model, _ = load_base(folder, settings, "cpu")
    method = method_of(checkpoint, model, settings)
    bad = data[3].ids[-1]
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[bad] = math.inf
    assert not bool(method.loss(flatten([data[3]])).isfinite())
    from glmchat.tuning.faults import bad_step
    from glmchat.tuning.order import steps_of

    step = steps_of([len(each.ids) for each in data], settings)[0]
    failed = bad_step(method, data, step, math.nan)
    assert isinstance(failed, Failed) and data[3].place.file in failed.message
    assert f":{data[3].place.line}" in failed.message and "embed_tokens" in failed.message
