"""What is not finite, or never learns, stops the run with the step, the rows and the layer; nothing is registered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from hypothesis import given
from hypothesis import strategies as st
from learning import documents, learn, losses, plain
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build
from torch import nn

from glmchat.core.errors import Failed, Usage
from glmchat.tuning import faults, state
from glmchat.tuning.examples import Example
from glmchat.tuning.trainer import _Run


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
    assert "the checkpoint of step 1 is whole" in raised.value.hint


def test_a_tensor_without_a_gradient_is_named() -> None:
    def rests(name: str) -> bool:
        return ".lora_A" in name

    reached, forgotten = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    reached.grad = torch.ones(2)
    faults.require_gradients({"a.lora_B.weight": reached}, rests)
    with pytest.raises(Failed, match="other"):
        faults.require_gradients({"a.lora_B.weight": reached, "other.lora_A.weight": forgotten}, rests)
    forgotten.grad = torch.zeros(2)
    faults.require_gradients(
        {"other.lora_A.weight": forgotten}, rests
    )  # B is zero at the beginning, and so is A's gradient
    with pytest.raises(Failed, match="other"):
        faults.require_gradients({"other.lora_B.weight": forgotten}, rests)


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


@given(
    st.lists(st.floats(0.0, 20.0), min_size=1, max_size=120),
    st.integers(0, 100),
)
def test_losses_that_stay_near_what_they_were_never_stop_a_run_whatever_odd_steps_are_among_them(
    spread: list[float], at: int
) -> None:
    """All are within 3 nats of each other, but for less than half of any 8 in a row."""
    low = spread[0]
    losses = [low + value % 2.9 for value in spread]
    for odd in range(at % 3, len(losses), 3):
        losses[odd] = 1e6
    guard = faults.Guard()
    for step, loss in enumerate(losses, 1):
        guard.hear(step, loss, None)


@given(st.lists(st.floats(0.01, 12.0), min_size=8, max_size=40), st.floats(1.01, 50.0))
def test_a_loss_that_explodes_stops_the_run_within_as_many_steps_as_are_looked_at(
    calm: list[float], factor: float
) -> None:
    guard, stopped = faults.Guard(), None
    high = factor * (max(calm) * 2 + 3)
    for step, loss in enumerate([*calm, *[high] * 8], 1):
        try:
            guard.hear(step, loss, 4)
        except Failed as error:
            stopped, said = step, error
            break
    if stopped is not None and stopped <= len(calm):
        return  # it had exploded by itself
    assert stopped is not None and stopped <= len(calm) + 8
    assert said.code == "tune.diverged" and f"step {stopped}" in said.message and "step 4" in said.hint


@given(st.lists(st.floats(0.01, 9.0), min_size=1, max_size=60), st.integers(0, 60))
def test_a_guard_that_was_put_down_and_taken_up_hears_as_one_that_never_stopped(losses: list[float], cut: int) -> None:
    def heard(guards: list[faults.Guard]) -> int | None:
        for step, loss in enumerate(losses, 1):
            try:
                guards[-1].hear(step, loss, None)
            except Failed:
                return step
            if step == cut and len(guards) == 1 and guards[0] is not whole:
                guards.append(faults.Guard(json.loads(json.dumps(guards[0].to_json()))))
        return None

    whole = faults.Guard()
    assert heard([whole]) == heard([faults.Guard()])


def test_a_run_whose_loss_explodes_ends_with_the_step_and_keeps_the_checkpoint_from_before(tmp_path: Path) -> None:
    """The rows are learned, and then a learning rate that nobody should use throws it all away."""
    folder, data = build("llama", tmp_path / "base"), documents("llama", 8)
    calm = plain(rows_per_step=4, epochs=60, learning_rate=1e-2, save_every=10, schedule="constant", keep=2)
    run = _Run(folder, data, calm, tmp_path / "run", print, (), ())
    hear = run.guard.hear

    def spoil(step: int, loss: float, saved: int | None) -> None:
        if step == 85:
            with torch.no_grad():
                for value in run.method.parameters.values():
                    value.mul_(-300.0)
        hear(step, loss, saved)

    run.guard.hear = spoil  # type: ignore[method-assign]
    with pytest.raises(Failed) as raised:
        run.go(lambda: False)
    assert raised.value.code == "tune.diverged" and "step 80" in raised.value.hint
    step = int(raised.value.message.split()[1].rstrip(":"))
    assert 86 <= step <= 94 and not (tmp_path / "run" / "adapter").exists()
    saved = state.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None and saved.step == 80
