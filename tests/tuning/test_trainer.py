"""A run against transformers' Trainer with PEFT: the same losses, step by step, and an adapter that PEFT reads.

Covers tuning/trainer.py, tuning/order.py, tuning/settings.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, losses, plain
from tiny_checkpoints import build

from glmchat.tuning.examples import Example
from glmchat.tuning.order import order_of
from glmchat.tuning.settings import Settings


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Both sides sum in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def peft_losses(folder: Path, data: Sequence[Example], settings: Settings, out: Path, first: Path) -> list[float]:
    """transformers' Trainer with PEFT over the same rows in the same order, from the same A."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=0)
    for layer in base.modules():  # GPT-2 has dropout of its own
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        elif hasattr(layer, "attn_dropout") or hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.0
    shape = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.targets) if isinstance(settings.targets, tuple) else settings.targets,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, shape)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(first).items():
            if ".lora_A" in name:
                own[name.replace(".weight", ".default.weight")].copy_(value)

    rows = []
    for epoch in range(1, settings.epochs + 1):
        rows += [data[number] for number in order_of(len(data), settings.seed, epoch)]

    def collate(batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["ids"]) for row in batch)
        fill = [longest - len(row["ids"]) for row in batch]
        return {
            "input_ids": torch.tensor([[*row["ids"], *[0] * n] for row, n in zip(batch, fill, strict=True)]),
            "attention_mask": torch.tensor(
                [[1] * len(row["ids"]) + [0] * n for row, n in zip(batch, fill, strict=True)]
            ),
            "labels": torch.tensor([[*row["labels"], *[-100] * n] for row, n in zip(batch, fill, strict=True)]),
        }

    found: list[float] = []

    class Hears(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
            if logs and "loss" in logs:
                found.append(logs["loss"])

    arguments = TrainingArguments(
        output_dir=str(out),
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
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    given = [{"ids": list(row.ids), "labels": row.labels} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=given, data_collator=collate, callbacks=[Hears()]).train()
    return found


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
