"""What is not finite, or never learns, stops the run with the step, the rows and the layer; nothing is registered."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from learning import documents, learn, losses, plain
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build
from torch import nn

from glmchat.core.errors import Failed, Usage
from glmchat.tuning import faults, state
from glmchat.tuning.examples import Example


def test_infinity_in_one_row_is_told_with_its_line_its_step_and_the_layer(tmp_path: Path) -> None:
    folder = tiny_checkpoints.llamas.write_folder(tmp_path / "base", tie_word_embeddings=False)
    data = documents("llama", 6)
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][250] = float("inf")  # a word that only one row has
    save_file(weights, file)
    bad = Example((*data[3].ids, 250, 7), (*data[3].learned, True, True), (), data[3].place)
    settings = plain(rows_per_step=2, shuffle=False, epochs=1, save_every=1)
    with pytest.raises(Failed) as raised:
        learn(tmp_path / "run", folder, [*data[:3], bad, *data[4:]], settings)
    said = raised.value.message
    assert "step 2" in said and "data.json:4" in said and "data.json:3" not in said and "embed_tokens" in said
    assert not (tmp_path / "run" / "adapter").exists()
    saved = state.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 1


def test_a_tensor_without_a_gradient_is_named() -> None:
    reached, forgotten = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    reached.grad = torch.ones(2)
    faults.require_gradients({"a.lora_B.weight": reached})
    with pytest.raises(Failed, match="other"):
        faults.require_gradients({"a.lora_B.weight": reached, "other.lora_A.weight": forgotten})
    forgotten.grad = torch.zeros(2)
    faults.require_gradients({"other.lora_A.weight": forgotten})  # B is zero at the beginning, and so is A's gradient
    with pytest.raises(Failed, match="other"):
        faults.require_gradients({"other.lora_B.weight": forgotten})


@pytest.mark.parametrize("family", ["llama", "chatglm2", "gguf", "fallback"])
@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_every_tensor_moves(tmp_path: Path, family: str, checkpointing: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 6)
    before, _ = learn(tmp_path / "still", folder, data, plain(steps=1, learning_rate=1e-30))
    after, events = learn(tmp_path / "run", folder, data, plain(steps=3, rows_per_step=2, checkpointing=checkpointing))
    first, last = (load_file(result.adapter / "adapter_model.safetensors") for result in (before, after))
    assert first.keys() == last.keys() and len(losses(events)) == 3
    assert [name for name in first if torch.equal(first[name], last[name])] == []


def test_rows_that_teach_nothing_are_refused(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 2)
    silent = [Example(each.ids, (False,) * len(each.ids), (), each.place) for each in data]
    with pytest.raises(Usage):
        learn(tmp_path / "run", folder, silent, plain(steps=1))


def test_a_row_longer_than_the_model_reads_is_refused_with_its_line(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 2)
    long = Example((5,) * 5000, (True,) * 5000, (), data[1].place)
    with pytest.raises(Usage, match=r"data\.json:2"):
        learn(tmp_path / "run", folder, [data[0], long], plain(steps=1))
