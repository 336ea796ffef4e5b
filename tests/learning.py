"""Documents of random tokens for tiny models, and a run over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tiny_checkpoints import prompt_of

from glmchat.tuning.examples import Example, Place, Segment
from glmchat.tuning.order import order_of
from glmchat.tuning.settings import Settings
from glmchat.tuning.trainer import Result, train

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference" / "chatglm"


def documents(family: str, count: int, *, longest: int = 24, seed: int = 3, words: int = 200) -> list[Example]:
    """The family's own beginning, then an answer of random words that is learned."""
    noise = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        start = prompt_of(family)
        length = int(torch.randint(2, longest - len(start), (1,), generator=noise))
        answer = torch.randint(5, words, (length,), generator=noise).tolist()
        parts = (Segment("prompt", 0, len(start)), Segment("answer", len(start), len(start) + length))
        learned = (False,) * len(start) + (True,) * length
        made.append(Example((*start, *answer), learned, parts, Place("data.json", number + 1)))
    return made


def pairs(family: str, count: int, *, longest: int = 24, seed: int = 3) -> list[Example]:
    """Two answers each behind the family's own beginning, the better one first."""
    better, worse = (documents(family, count, longest=longest, seed=one) for one in (seed, seed + 1))
    made = []
    for first, other in zip(better, worse, strict=True):
        start = len(first.ids)
        moved = (Segment(part.part, start + part.start, start + part.end) for part in other.segments)
        made.append(
            Example(
                (*first.ids, *other.ids),
                (*first.learned, *other.learned),
                (*first.segments, *moved),
                first.place,
                start,
            )
        )
    return made


def rows_of(options: dict[str, Any], count: int) -> list[Example]:
    """What the method of a run learns from."""
    return pairs("llama", count) if options.get("method") == "dpo" else documents("llama", count)


def recorded_rows(tensors: dict[str, torch.Tensor]) -> list[Example]:
    """What the original ChatGLM code recorded of its training, without the padding."""
    rows: list[Example] = []
    for ids, labels in zip(tensors["train.input_ids"].tolist(), tensors["train.labels"].tolist(), strict=True):
        end = max(at for at, label in enumerate(labels) if label != -100) + 1
        learned = tuple(label != -100 for label in labels[:end])
        rows.append(Example(tuple(ids[:end]), learned, (), Place("recorded", len(rows) + 1)))
    return rows


def plain(**changes: Any) -> Settings:
    """Exact arithmetic, nothing random but the first numbers of A."""
    given = {"dtype": "float32", "threads": 1, "rank": 4, "alpha": 8.0, "warmup": 0.0, "schedule": "linear"}
    return Settings(**{**given, **changes})


def learn(
    folder: Path,
    model: Path,
    data: Sequence[Example],
    settings: Settings,
    stop: Callable[[], bool] = lambda: False,
    **more: Any,
) -> tuple[Result, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    result = train(model, data, settings, folder, events.append, stop, **more)
    return result, events


def losses(events: Sequence[dict[str, Any]]) -> list[float]:
    return [event["loss"] for event in events if event["kind"] == "step"]


def in_transformers(folder: Path) -> Any:
    """The model as transformers has it, in float32; GPT-2 has dropout of its own, which is off."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=0)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
        elif isinstance(getattr(layer, "attention_dropout", None), float):
            layer.attention_dropout = 0.0
    return model


def trainer_losses(model: Any, data: Sequence[Example], settings: Settings, out: Path) -> list[float]:
    """Of transformers' Trainer over the rows in the order of a run; the model has learned them afterwards."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

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


def peft_losses(folder: Path, data: Sequence[Example], settings: Settings, out: Path, first: Path) -> list[float]:
    """transformers' Trainer with PEFT over the same rows in the same order, from the same A."""
    from peft import LoraConfig, get_peft_model

    base = in_transformers(folder)
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

    return trainer_losses(model, data, settings, out)
