"""Each way to learn on a pretend card (tests/fake_card.py): what it learns, and what a step makes the host wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import fake_card
import pytest
import torch
from learning import documents, learn, losses, pairs, plain
from tiny_checkpoints import build

from glmchat.engine.quantize import linear
from glmchat.engine.quantize.kernels import Reference
from glmchat.tuning.trainer import train

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "lora on int8": ("llama", {"quant": 8}),
    "lora on int4": ("llama", {"quant": 4}),
    "lora on a gguf": ("gguf", {}),
    "lora, layers computed twice": ("llama", {"checkpointing": "on"}),
    "dora with dropout": ("llama", {"dora": True, "dropout": 0.1}),
    "lora by transformers": ("fallback", {}),
    "lora of the first generation": ("chatglm-early", {"quant": 4}),
    "prefix": ("llama", {"method": "prefix", "prefix_length": 4}),
    "prefix of a chatglm": ("chatglm", {"method": "prefix", "prefix_length": 4}),
    "prefix on int4": ("chatglm2", {"method": "prefix", "prefix_length": 4, "quant": 4}),
    "prefix by a projection": ("chatglm3", {"method": "prefix", "prefix_length": 4, "prefix_projection": True}),
    "prompt": ("qwen2", {"method": "prompt", "prefix_length": 4}),
    "full": ("llama", {"method": "full"}),
    "full of a chatglm": ("chatglm", {"method": "full"}),
    "last layers": ("glm4", {"method": "full", "last_layers": 1}),
    "scratch": ("gpt2", {"method": "scratch"}),
    "dpo": ("llama", {"method": "dpo"}),
    "ipo": ("gpt2", {"method": "dpo", "loss": "ipo"}),
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> str:
    """Both sides multiply by the definition: the processor's own kernel keeps the minimum of a group in 16 bits."""
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: fake_card.DEVICE))
    monkeypatch.setattr(linear, "choose", lambda shape, device: Reference())
    return fake_card.NAME


@pytest.mark.parametrize("way", WAYS)
def test_a_card_learns_what_the_processor_learns(way: str, tmp_path: Path, card: str) -> None:
    family, options = WAYS[way]
    model = build(family, tmp_path / family)
    rows = (pairs if options.get("method") == "dpo" else documents)(family, 4)
    found = []
    for device in ("cpu", card):
        settings = plain(device=device, steps=3, tokens_per_step=60, save_every=2, **options)
        found.append(learn(tmp_path / device, model, rows, settings, evaluation=rows[:1]))
    (here, ours), (there, cards) = found
    assert losses(cards) == pytest.approx(losses(ours), abs=2e-5, rel=1e-5)
    assert there.evaluation == pytest.approx(here.evaluation, rel=1e-5)
    assert here.probe is not None and there.probe is not None
    torch.testing.assert_close(there.probe.logits, here.probe.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("way", ["lora", "lora on int4", "prefix of a chatglm", "full", "dpo"])
def test_a_step_on_a_card_waits_three_times_whatever_learns(way: str, tmp_path: Path, card: str) -> None:
    """For the loss, what is told beside it, and the length of the gradient; not once for each tensor."""
    family, options = WAYS[way]
    model = build(family, tmp_path / family)
    rows = (pairs if options.get("method") == "dpo" else documents)(family, 4)
    settings = plain(device=card, steps=4, tokens_per_step=60, **options)
    marks: list[int] = []
    with fake_card.record() as log:
        train(
            model,
            rows,
            settings,
            tmp_path / "run",
            lambda event: marks.append(len(log)) if event["kind"] == "step" else None,
            lambda: False,
        )
    step = log[marks[1] : marks[2]]
    read = sum(what == "tolist" for what, _ in step)  # ChatGLM-6B looks for its mask: once for each document
    assert read <= len(rows) and bool(read) == (family == "chatglm")
    assert sum(what not in ("to card", "tolist") for what, _ in step) == 3
