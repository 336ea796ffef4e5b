"""Every family on a pretend card: what it computes, that nothing lies on the other side, and what a token costs.

The card (tests/fake_card.py) computes on the CPU, refuses what a real one refuses, and counts waits and crossings.
"""

from __future__ import annotations

import json
from pathlib import Path

import adapter_builders as adapters
import fake_card
import pytest
import torch
from tiny_checkpoints import NAMES, build, prompt_of

from glmchat.core.errors import DoesNotFit
from glmchat.engine import Engine, Sampling, kv_cache
from glmchat.engine.decoding import sequences
from glmchat.engine.gpu.choose import TOP
from glmchat.engine.gpu.step import CardSteps, chain_of
from glmchat.engine.quantize import linear
from glmchat.engine.quantize.kernels import Reference

GREEDY = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
WAYS = {"as it is": None, "int8": 8, "int4": 4}


def crossings(log: list[tuple[str, int]]) -> tuple[int, int]:
    """Copies to the card, and whatever brings something back or makes the host wait for it."""
    return sum(what == "to card" for what, _ in log), sum(what != "to card" for what, _ in log)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_what_the_processor_says(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both multiply by the definition: the processor's own kernel keeps the minimum of a group in 16 bits.
    monkeypatch.setattr(linear, "choose", lambda shape, device: Reference())
    if name == "gguf" and way != "as it is":
        pytest.skip("the file has 4 bits already")
    folder = build(name, tmp_path / name)
    ids = prompt_of(name)
    here = Engine.load(folder, quant=WAYS[way], dtype="float32", device="cpu", threads=1)
    there = Engine.load(folder, quant=WAYS[way], dtype="float32", device=fake_card.NAME)
    assert {tensor.device.type for tensor in there.model.state_dict().values()} == {fake_card.NAME}
    ours, right = there.logits(ids), here.logits(ids)
    error = float((ours - right).abs().max() / right.abs().max())
    assert error < 1e-4
    assert list(there.generate(ids, GREEDY)) == list(here.generate(ids, GREEDY))


@pytest.mark.parametrize("name", NAMES)
def test_a_decoded_token_crosses_once_in_each_direction(name: str, tmp_path: Path) -> None:
    engine = Engine.load(build(name, tmp_path / name), dtype="float32", device=fake_card.NAME)
    steps = engine.generate(prompt_of(name), Sampling(temperature=0, max_tokens=8, ignore_eos=True))
    next(steps)
    next(steps)
    for _ in range(3):
        with fake_card.record() as log:
            next(steps)
        to_card, to_host = crossings(log)
        assert to_card <= 1, log
        assert to_host <= 1, log
    steps.close()


SAMPLED = Sampling(temperature=0.9, top_k=20, top_p=0.9, repetition_penalty=1.2, seed=3, max_tokens=8, ignore_eos=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_sampled_token_is_the_processors_and_crosses_once_in_each_direction(name: str, tmp_path: Path) -> None:
    folder, ids = build(name, tmp_path / name), prompt_of(name)
    here = Engine.load(folder, dtype="float32", device="cpu", threads=1)
    there = Engine.load(folder, dtype="float32", device=fake_card.NAME)
    steps = there.generate(ids, SAMPLED)
    said = [next(steps), next(steps)]
    for _ in range(6):
        with fake_card.record() as log:
            said.append(next(steps))
        to_card, to_host = crossings(log)
        assert to_card <= 1, log
        assert to_host <= (1 if there.spec.vocab_size > TOP else 2), log  # a small vocabulary comes whole, once more
    assert said == list(here.generate(ids, SAMPLED))


@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "llama", "gpt2"])
def test_a_cache_grows_and_a_prompt_is_read_in_pieces_without_a_difference(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ids = build(name, tmp_path / name), [*prompt_of(name)]
    here = Engine.load(folder, dtype="float32", device="cpu", threads=1)
    right = list(here.generate(ids, GREEDY))
    monkeypatch.setattr(kv_cache, "FIRST", 4)
    monkeypatch.setattr(sequences, "CARD_CHUNK", 3)
    there = Engine.load(folder, dtype="float32", device=fake_card.NAME)
    assert list(there.generate(ids, GREEDY)) == right
    cache = there.sequence.cache
    assert len(ids) + 5 <= cache.capacity < cache.limit
    assert {keys.shape[1] for keys in cache.keys} == {cache.capacity}
    assert cache.capacity.bit_count() == 1
    longer = [*ids, *right, *right]
    if there.spec.causal:
        assert list(there.generate(longer, GREEDY)) == list(here.generate(longer, GREEDY))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_two_cards_share_the_layers_and_say_what_the_processor_says(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "choose", lambda shape, device: Reference())
    if name == "gguf" and way != "as it is":
        pytest.skip("the file has 4 bits already")
    folder = build(name, tmp_path / name)
    ids = prompt_of(name)
    here = Engine.load(folder, quant=WAYS[way], dtype="float32", device="cpu", threads=1)
    there = Engine.load(folder, quant=WAYS[way], dtype="float32", device=f"{fake_card.NAME}:0,{fake_card.NAME}:1")
    places = {str(tensor.device) for tensor in there.model.state_dict().values()}
    assert places == set(there.plan.devices) and there.facts()["device"] == there.plan.name
    ours, right = there.logits(ids), here.logits(ids)
    assert float((ours - right).abs().max() / right.abs().max()) < 1e-4
    assert list(there.generate(ids, GREEDY)) == list(here.generate(ids, GREEDY))


@pytest.mark.parametrize("name", ["chatglm-early", "chatglm", "chatglm2", "chatglm3", "glm4", "gpt2"])
def test_on_two_cards_each_has_a_step_that_touches_nothing_of_the_other(name: str, tmp_path: Path) -> None:
    engine = Engine.load(build(name, tmp_path / name), dtype="float32", device=f"{fake_card.NAME}:0,{fake_card.NAME}:1")
    model, parts = engine.model, engine.model.parts()
    assert parts is not None
    cache = model.new_cache(64)
    assert CardSteps(parts, model.spec).takes(cache)
    chain = chain_of(parts, model.spec, cache)
    assert {str(step.device) for step in chain} == set(engine.plan.devices)
    for step in chain:
        for launch in step.launches():
            places = {given.device for given in launch.arguments if isinstance(given, torch.Tensor)}
            assert places == {step.device}, launch.kernel
        assert (step.incoming.device, step.outgoing.device) == (step.device, step.device)
    count = sum(len(step.launches()) for step in chain)
    assert count == 6 * model.spec.layers + 4


class Much(torch.nn.Module):
    """Adds as much to every sum as a layer of a network with large activations does."""

    def __init__(self, width: int, size: float) -> None:
        super().__init__()
        self.width, self.size = width, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_full((*x.shape[:-1], self.width), self.size)


def test_what_a_layer_carries_on_stays_in_float32_where_float16_would_overflow(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    engine = Engine.load(folder, dtype="float16", device=fake_card.NAME)
    assert engine.model.wide_residual and engine.dtype == torch.float16
    largest = torch.finfo(torch.float16).max
    embedding = engine.model.get_parameter("model.embed_tokens.weight")
    with torch.no_grad():
        embedding.mul_(0.9 * largest / float(embedding.abs().max()))
    head = torch.nn.Linear(engine.spec.hidden_size, engine.spec.vocab_size, bias=False)
    engine.model.swap("lm_head", head.to(fake_card.DEVICE, torch.float16))
    for layer in range(engine.spec.layers):
        engine.model.swap(f"model.layers.{layer}.mlp.down_proj", Much(engine.spec.hidden_size, 0.2 * largest))
    assert torch.isfinite(engine.logits(prompt_of("llama"))).all()
    engine.model.wide_residual = False
    assert not torch.isfinite(engine.logits(prompt_of("llama"))).all()


def test_packed_weights_are_not_moved_behind_their_layouts_back(tmp_path: Path) -> None:
    engine = Engine.load(build("gguf", tmp_path / "gguf"), dtype="float32", device="cpu", threads=1)
    with pytest.raises(RuntimeError, match="pack them on the device"):
        engine.model.to(fake_card.DEVICE)
    assert torch.isfinite(engine.logits(prompt_of("gguf"))).all()


def long_prompt(name: str, length: int) -> list[int]:
    ids = prompt_of(name)
    return [*(20 + number % 150 for number in range(length - len(ids))), *ids]


@pytest.mark.parametrize("name", ["chatglm3", "llama", "gpt2"])
def test_a_prompt_that_does_not_fit_the_card_is_read_in_smaller_pieces(name: str, tmp_path: Path) -> None:
    folder, ids = build(name, tmp_path / name), long_prompt(name, 110)
    here = Engine.load(folder, dtype="float32", device="cpu", threads=1)
    there = Engine.load(folder, dtype="float32", device=fake_card.NAME)
    there.sequence.cache  # noqa: B018 - what a loaded engine has; the piece of the prompt is what does not fit
    with pytest.MonkeyPatch.context() as patch, fake_card.short_of_memory(4 * 60 * 300):
        patch.setattr(sequences, "LEAST", 16)
        assert list(there.generate(ids, GREEDY)) == list(here.generate(ids, GREEDY))
    starts = [one.start for one in there.sequence.passes.done if one.kind == "prefill"]
    assert len(starts) > 1 and starts[0] == 0


def test_caches_of_other_adapters_go_before_a_piece_of_a_prompt_shrinks(tmp_path: Path) -> None:
    there = Engine.load(build("llama", tmp_path / "llama"), dtype="float32", device=fake_card.NAME)
    ids = long_prompt("llama", 60)
    list(there.generate(ids, GREEDY))
    there.sequences.switch("another", there.model.plain)
    list(there.generate(ids, GREEDY))
    there.sequences.switch((), there.model.plain)
    kept, bytes_of_both = there.sequence, there.sequences.cache_bytes
    assert kept._fewer(2048, torch.OutOfMemoryError("CUDA out of memory")) == 2048
    assert there.sequences.cache_bytes == kept.nbytes == bytes_of_both // 2
    assert kept._fewer(2048, torch.OutOfMemoryError("CUDA out of memory")) == 1024


@pytest.mark.parametrize("name", ["chatglm", "llama"])
def test_where_not_even_a_small_piece_fits_one_line_says_the_bytes_and_what_helps(name: str, tmp_path: Path) -> None:
    there = Engine.load(build(name, tmp_path / name), dtype="float32", device=fake_card.NAME)
    ids = long_prompt(name, 100)
    there.sequence.cache  # noqa: B018
    with (
        fake_card.short_of_memory(100),
        pytest.raises(DoesNotFit, match=r"memory of fakegpu is full: .*B more") as told,
    ):
        list(there.generate(ids, GREEDY))
    assert told.value.exit == 4 and "--context" in told.value.hint
    assert list(there.generate(ids, GREEDY))  # and the engine lives on


def test_a_card_that_fills_up_while_a_model_loads_is_told_with_bytes(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    with fake_card.short_of_memory(100), pytest.raises(DoesNotFit, match="is full") as told:
        Engine.load(folder, dtype="float32", device=fake_card.NAME)
    assert told.value.exit == 4 and told.value.hint


def test_an_adapter_lies_where_its_layers_lie(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "llama")
    adapters.write_peft(folder, tmp_path / "lora", target_modules="all-linear")
    here = Engine.load(folder, dtype="float32", device="cpu", threads=1)
    there = Engine.load(folder, dtype="float32", device=f"{fake_card.NAME}:0,{fake_card.NAME}:1")
    ids = prompt_of("llama")
    before = list(there.generate(ids, GREEDY))
    for engine in (here, there):
        engine.attach(tmp_path / "lora", "lora")
        engine.activate({"lora": 1.0})
    ours, right = there.logits(ids), here.logits(ids)
    assert float((ours - right).abs().max() / right.abs().max()) < 1e-4
    assert list(there.generate(ids, GREEDY)) == list(here.generate(ids, GREEDY))
    there.activate({})
    assert list(there.generate(ids, GREEDY)) == before
