"""Learning in the base's own weights: transformers' Trainer step by step, and a folder that everybody opens.

Covers tuning/methods/full.py, tuning/weights.py, tuning/optimiser.py, tuning/products.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, in_transformers, learn, losses, plain, trainer_losses
from safetensors.torch import load_file, save_file
from tiny_checkpoints import build, originals
from torch.nn import functional

from glmchat.core.errors import DoesNotFit, Failed, Usage
from glmchat.engine.engine import Engine
from glmchat.engine.families import family_of
from glmchat.engine.formats.weights import load_bin
from glmchat.tuning import predict, state
from glmchat.tuning.forward import flatten, load_base
from glmchat.tuning.methods.full import learning_of
from glmchat.tuning.optimiser import HalfAdamW, rounded
from glmchat.tuning.planning import opening
from glmchat.tuning.trainer import _Run


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Both sides sum in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def whole(**changes: Any) -> Any:
    return plain(**{"method": "full", "keep": 1, **changes})


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """By the names of the files, whichever kind they are of."""
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    files = files or [load_bin(file) for file in sorted(folder.glob("*.bin"))]
    return {name: value for file in files for name, value in file.items()}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "glm4-hf"])
def test_ten_steps_are_those_of_the_trainer_and_so_is_what_they_leave(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents("llama", 20)
    settings = whole(epochs=2, rows_per_step=4, learning_rate=1e-3)
    result, events = learn(tmp_path / "run", folder, data, settings)
    theirs = in_transformers(folder)
    expected = trainer_losses(theirs, data, settings, tmp_path / "out")
    assert len(expected) == 10
    torch.testing.assert_close(torch.tensor(losses(events)), torch.tensor(expected), atol=1e-5, rtol=0)
    opened = in_transformers(result.adapter).eval()
    ids = torch.tensor(data[0].ids)[None]
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits, atol=1e-3, rtol=0)
    before = dict(in_transformers(folder).named_parameters())
    moved = (
        sum(float((p.detach() - before[n].detach()).double().square().sum()) for n, p in opened.named_parameters())
        ** 0.5
    )
    assert result.change == pytest.approx(moved, rel=1e-3)
    learned = sum(p.numel() for p in opened.parameters())
    assert (result.learning, result.numbers) == (learned, learned)


@pytest.mark.parametrize("family", ["chatglm", "chatglm-early", "chatglm2", "chatglm3", "glm4"])
def test_a_chatglm_learns_as_in_a_plain_loop_and_lies_in_its_original_names(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 8)
    settings = whole(epochs=2, rows_per_step=8, learning_rate=1e-3, schedule="constant", clip=0.0)
    result, events = learn(tmp_path / "run", folder, data, settings)
    _, model, _ = load_base(folder, plain(), "cpu")  # frozen, and its own forward: one document after the other
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = torch.nn.Parameter(value.detach().clone())
    optimiser, found = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0), []
    for _ in range(2):
        total = torch.zeros(())
        for one in data:
            flat = flatten([one])
            logits = model(torch.tensor(one.ids))[flat.rows]
            total = total + torch.nn.functional.cross_entropy(logits, flat.targets, reduction="sum")
        loss = total / sum(len(flatten([one]).rows) for one in data)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        optimiser.step()
        found.append(float(loss.detach()))
    assert losses(events) == pytest.approx(found, rel=5e-6)  # the losses of 130,000 words are near 15
    was, now = stored(folder), stored(result.adapter)
    assert was.keys() == now.keys()
    assert all(was[name].shape == now[name].shape and was[name].dtype == now[name].dtype for name in was)
    engine = Engine.load(result.adapter, dtype="float32", threads=1)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(data[0].ids))
    torch.testing.assert_close(engine.logits(data[0].ids), expected, atol=1e-3, rtol=1e-3)
    for file in folder.iterdir():  # words and template come along
        if not file.name.endswith((".safetensors", ".json", ".bin", ".py")):
            assert (result.adapter / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2", "fallback"])
def test_token_accuracy_is_the_share_of_hits_among_the_logits_of_transformers(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the training of CPM computes it: argmax of logits[:-1] against labels[1:], over labels that count."""
    from glmchat.tuning import products

    monkeypatch.setattr(products, "logit_rows", lambda vocabulary: 16)  # several chunks
    folder, data = build(family, tmp_path / "base"), documents("llama", 8)
    settings = whole(steps=30, rows_per_step=8, learning_rate=3e-3, schedule="constant")
    result, events = learn(tmp_path / "run", folder, data, settings, evaluation=data)
    steps = [event["token_accuracy"] for event in events if event["kind"] == "step"]
    judged = next(event["token_accuracy"] for event in reversed(events) if event["kind"] == "evaluation")
    for found, place in ((steps[0], folder), (judged, result.adapter)):
        model, hits, counted = in_transformers(place).eval(), 0, 0
        for one in data:
            with torch.no_grad():
                guessed = model(input_ids=torch.tensor(one.ids)[None]).logits[0, :-1].argmax(-1)
            labels = torch.tensor(one.labels)[1:]
            hits += int((guessed == labels)[labels != -100].sum())
            counted += int((labels != -100).sum())
        assert found == pytest.approx(hits / counted, abs=1e-12)
    assert judged > 0.05


@pytest.mark.parametrize("method", ["lora", "prefix", "full"])
def test_every_method_that_learns_tokens_tells_their_accuracy(tmp_path: Path, method: str) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 4)
    settings = plain(method=method, steps=2, rows_per_step=4, prefix_length=4)
    _, events = learn(tmp_path / "run", folder, data, settings, evaluation=data)
    told = [event for event in events if event["kind"] in ("step", "evaluation")]
    assert len(told) == 3 and all(0 <= event["token_accuracy"] <= 1 for event in told)


def test_a_model_that_transformers_computes_is_written_by_it(tmp_path: Path) -> None:
    folder, data = build("fallback", tmp_path / "base"), documents("llama", 8)
    settings = whole(epochs=1, rows_per_step=4, learning_rate=1e-3)
    result, events = learn(tmp_path / "run", folder, data, settings)
    theirs = in_transformers(folder)
    expected = trainer_losses(theirs, data, settings, tmp_path / "out")
    assert losses(events) == pytest.approx(expected, abs=1e-5)
    assert stored(folder).keys() == stored(result.adapter).keys()
    assert json.loads((folder / "config.json").read_text()) == json.loads((result.adapter / "config.json").read_text())


@pytest.mark.parametrize("family", ["llama", "chatglm2", "gpt2", "fallback"])
def test_the_last_layers_learn_and_every_other_tensor_stays_bit_for_bit(tmp_path: Path, family: str) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 6)
    result, _ = learn(tmp_path / "run", folder, data, whole(steps=2, rows_per_step=3, last_layers=1))
    was, now = stored(folder), stored(result.adapter)
    changed = {name for name in now if not torch.equal(was[name], now[name])}
    last = max(int(part) for name in now for part in name.split(".") if part.isdigit())
    assert changed == {name for name in now if f".{last}." in name and now[name].is_floating_point()
                       and not name.endswith((".attention.bias", "inv_freq", "masked_bias"))}  # fmt: skip
    with pytest.raises(Usage, match="layers"):
        learn(tmp_path / "more", folder, data, whole(steps=1, last_layers=99))


def test_a_bfloat16_base_learns_in_float32_and_is_left_in_bfloat16(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 12)
    file = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    given = {"steps": 12, "rows_per_step": 4, "learning_rate": 1e-5, "schedule": "constant", "save_every": 12}
    result, events = learn(tmp_path / "run", folder, data, whole(**given, dtype="bfloat16"))
    _, exact = learn(tmp_path / "exact", folder, data, whole(**given))
    assert losses(events) == pytest.approx(losses(exact), rel=2e-2)
    assert {value.dtype for value in stored(result.adapter).values()} == {torch.bfloat16}
    masters = load_file(tmp_path / "run" / "checkpoints" / "step-00000012" / "weights.safetensors")
    assert {value.dtype for value in masters.values()} == {torch.float32}
    before = stored(folder)
    # Each of 12 steps of 1e-5 is less than bfloat16 tells apart near 0.2; together they are not lost.
    large = [(masters[n] - before[n].float())[before[n].abs() > 0.1] for n in masters if n in before]
    steps = torch.cat(large).abs()
    assert float((steps > 3e-5).float().mean()) > 0.5
    assert result.change > 0


def test_moments_of_half_the_bytes_learn_nearly_as_well(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 12)
    given = {"steps": 40, "rows_per_step": 4, "learning_rate": 1e-3, "save_every": 20}
    _, exact = learn(tmp_path / "exact", folder, data, whole(**given))
    result, half = learn(tmp_path / "half", folder, data, whole(**given, moments="bfloat16"))
    assert losses(half)[-1] == pytest.approx(losses(exact)[-1], rel=0.03)
    assert losses(half)[-1] < losses(half)[0] - 0.5
    kept = load_file(tmp_path / "half" / "checkpoints" / "step-00000040" / "optimiser.safetensors")
    assert {v.dtype for n, v in kept.items() if not n.endswith(".step")} == {torch.bfloat16}
    again, rest = learn(tmp_path / "again", folder, data, whole(**given, moments="bfloat16"),
                        stop=iter([False] * 20 + [True]).__next__)  # fmt: skip
    assert again.stopped
    _, rest = learn(tmp_path / "again", folder, data, whole(**given, moments="bfloat16"))
    assert losses(rest) == losses(half)[20:]
    assert all(torch.equal(v, stored(result.adapter)[n]) for n, v in stored(tmp_path / "again" / "adapter").items())


def test_rounding_is_right_on_average_and_keeps_what_needs_none() -> None:
    noise = torch.Generator().manual_seed(1)
    value = torch.full((200_000,), 1.001)  # between 1 and 1.0078125
    assert float(rounded(value.clone(), noise).float().mean()) == pytest.approx(1.001, abs=1e-4)
    exact = torch.tensor([0.0, 1.0, -2.5, 1e-30]).bfloat16()
    assert torch.equal(rounded(exact.float(), noise), exact)
    learned = torch.nn.Parameter(torch.ones(1000))
    optimiser = HalfAdamW([learned], lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(400):  # plain rounding would let it stand still below
        learned.grad = torch.ones(1000)
        optimiser.step()
    second = optimiser.state[learned]["exp_avg_sq"].float().mean()
    assert float(second) == pytest.approx(1 - 0.999**400, rel=0.02)


def test_a_head_that_learns_gives_the_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    from glmchat.tuning import products

    monkeypatch.setattr(products, "_CHUNK_BYTES", 16 * 4 * 300)  # several chunks
    noise = torch.Generator().manual_seed(4)
    x, targets = torch.randn(50, 24, generator=noise), torch.randint(0, 300, (50,), generator=noise)
    head = torch.nn.Linear(24, 300, bias=False)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for compute in (products.head_loss, lambda x, t, h: functional.cross_entropy(h(x), t, reduction="sum")):
        given = x.clone().requires_grad_()
        head.weight.grad = None
        torch.autograd.backward(compute(given, targets, head) * 0.5)
        assert given.grad is not None and head.weight.grad is not None
        found.append((given.grad, head.weight.grad.clone()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "numbers"), [("chatglm-6b-early", 6_255_206_400), ("chatglm3-6b", 6_243_584_000)])
def test_what_learns_of_the_published_models_is_counted_without_their_weights(name: str, numbers: int) -> None:
    """FACTS 4.11: a head that is the embedding counts once."""
    family, spec = family_of(originals.CONFIGS[name])
    with torch.device("meta"):
        model = family.build(spec)
    assert sum(value.numel() for value in learning_of(model, 0).values()) == numbers
    layer = sum(p.numel() for n, p in model.named_parameters() if ".layers.27." in n)
    assert sum(value.numel() for value in learning_of(model, 1).values()) == layer


def test_a_packed_base_is_refused_and_so_is_one_learning_in_float16(tmp_path: Path) -> None:
    data = documents("llama", 4)
    with pytest.raises(Usage, match="packed"):
        learn(tmp_path / "run", build("gguf", tmp_path / "gguf"), data, whole(steps=1))
    folder = build("llama", tmp_path / "base")
    with pytest.raises(Usage, match="packed"):
        learn(tmp_path / "four", folder, data, whole(steps=1, quant=8))
    with pytest.raises(Usage, match="float16"):
        learn(tmp_path / "half", folder, data, whole(steps=1, dtype="float16"))


def test_a_disk_that_cannot_take_the_checkpoints_is_told_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 4)
    run = _Run(folder, data, whole(steps=1), tmp_path / "run", print, (), ())
    learning, numbers = run.method.count()
    assert run.method.disk(1) == 2 * 12 * learning + 4 * numbers
    room = type("Room", (), {"free": run.method.disk(1) - 1})
    monkeypatch.setattr(state.shutil, "disk_usage", lambda path: room)
    with pytest.raises(DoesNotFit, match="disk"):
        run.go(lambda: False)


def test_memory_of_weights_gradients_and_moments_is_told(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 4)
    for moments, each in (("float32", 12), ("bfloat16", 8)):
        run = _Run(folder, data, whole(steps=1, moments=moments), tmp_path / moments, print, (), ())
        growth = predict.measure(run.method, opening(run))
        assert growth.learning == each * run.method.count()[0]


def test_a_number_too_large_for_the_type_of_the_base_is_not_written(tmp_path: Path) -> None:
    folder, data = build("llama", tmp_path / "base"), documents("llama", 4)
    file = folder / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    run = _Run(folder, data, whole(steps=1), tmp_path / "run", print, (), ())
    with torch.no_grad():
        next(iter(run.method.parameters.values())).fill_(1e6)
    (tmp_path / "out").mkdir()
    with pytest.raises(Failed, match="float16 cannot hold"):
        run.method.write(tmp_path / "out")
