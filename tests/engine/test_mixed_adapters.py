"""Answers with different adapters that are written at once: each is what it is alone, to the bit of every logit.

Covers engine/models/variant.py and engine/models/base.py where a model is put on and taken off.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from glmchat.engine import Chunk, Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.sampling import Sampler

NATIVE = NativeCpu().unavailable() is None
LORAS: dict[str, dict[str, Any]] = {
    "small": {},
    "wide": {"target_modules": "all-linear", "r": 8},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "biased": {"lora_bias": True, "target_modules": ["v_proj", "o_proj"], "r": 3},
    "words": {"target_modules": ["embed_tokens", "up_proj"]},
    "norms": {"target_modules": ["k_proj"], "modules_to_save": ["post_attention_layernorm"]},
    "head": {"target_modules": ["gate_proj"], "modules_to_save": ["lm_head"]},
    "dense": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
}
VIRTUAL = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
Active = Mapping[str, float]
SETS: tuple[Active, ...] = (
    {},
    *({name: 1.0} for name in (*LORAS, *VIRTUAL)),
    {"small": 0.5},
    {"small": 1.0, "wide": -0.5},
    {"dora": 1.0, "words": 1.0, "prefix": 1.0},
    {"norms": 0.3, "prompt": 1.0},
)


def write_virtual(base: Path, folder: Path, kind: str) -> None:
    model = get_peft_model(adapters.theirs(base), VIRTUAL[kind](task_type="CAUSAL_LM", num_virtual_tokens=5))
    adapters.randomise(model, 7)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    """A tiny Llama in `base`, and its adapters beside it."""
    root = tmp_path_factory.mktemp("mixed")
    sizes = {"max_position_embeddings": 512, "tie_word_embeddings": False, "attention_bias": True}
    builders.write_folder(root / "base", **sizes)
    for number, (name, settings) in enumerate(LORAS.items()):
        adapters.write_peft(root / "base", root / name, seed=number, **settings)
    for name in VIRTUAL:
        write_virtual(root / "base", root / name, name)
    return root


class Company:
    """An engine whose answers are noted: of each seed, all logits that its tokens were chosen from."""

    def __init__(self, folders: Path, quant: int | None, most: int) -> None:
        self.engine = Engine.load(folders / "base", quant=quant, threads=1, parallel=most)
        for name in (*LORAS, *VIRTUAL):
            self.engine.attach(folders / name, name)
        self.logits: dict[int, list[torch.Tensor]] = {}
        make = self.engine.sampler

        def noted(sampling: Sampling, seed: int, ids: Sequence[int]) -> Sampler:
            choose, seen = make(sampling, seed, ids), self.logits.setdefault(seed, [])

            def choice(row: torch.Tensor) -> int:
                seen.append(row.detach().clone())
                return choose(row)

            return choice

        self.engine.sampler = noted  # type: ignore[method-assign]

    def begin(self, ids: Sequence[int], sampling: Sampling, active: Active) -> Iterator[Chunk | None]:
        self.engine.activate(active)
        steps = self.engine.stream_tokens(ids, sampling)
        next(steps)
        return steps

    def begin_anew(self) -> None:
        engine = self.engine
        engine.activate({})
        engine.sequences = Sequences(engine.model, engine.context, engine.device, engine.sequences.most)

    def alone(self, ids: Sequence[int], sampling: Sampling, active: Active) -> list[torch.Tensor]:
        self.begin_anew()
        list(self.begin(ids, sampling, active))
        assert sampling.seed is not None
        return self.logits.pop(sampling.seed)


def prompt(number: int, length: int) -> list[int]:
    return [number + 4, *((7 * i + 13 * number) % 250 + 4 for i in range(length - 1))]


def sampled(number: int, tokens: int) -> Sampling:
    return Sampling(temperature=1.0, seed=number, max_tokens=tokens, ignore_eos=True)


@pytest.mark.parametrize("by", ["c", "torch"])
@pytest.mark.parametrize("quant", [None, 4, 8])
@pytest.mark.parametrize("seed", range(2))
def test_an_answer_is_the_same_alone_and_beside_answers_with_other_adapters(
    seed: int, quant: int | None, by: str, folders: Path
) -> None:
    chance, company = random.Random(seed), Company(folders, quant, most=7)
    engine = company.engine
    engine.model.compile_steps = by == "c"
    count = 30
    asked = [
        (prompt(n, chance.randint(1, 60)), sampled(n, chance.randint(2, 25)), chance.choice(SETS)) for n in range(count)
    ]
    wanted = [company.alone(*one) for one in asked]
    company.begin_anew()
    waiting, writing, left = list(range(count)), dict[int, Any](), set[int]()
    while waiting or writing:
        while waiting and len(writing) < 7 and chance.random() < 0.6:
            number = waiting.pop(chance.randrange(len(waiting)))
            writing[number] = company.begin(*asked[number])
        if chance.random() < 0.05:
            engine.activate(chance.choice(SETS))  # nobody asks for it
        if chance.random() < 0.9:
            engine.step()
        for number, steps in list(writing.items()):
            if len(writing) > 1 and chance.random() < 0.02:
                steps.close()
                left.add(number)
                del writing[number]
            elif next(steps, "over") == "over":
                del writing[number]
    for number, rows in enumerate(wanted):
        seen = company.logits[number]
        assert len(seen) == len(rows) or number in left
        assert all(torch.equal(one, other) for one, other in zip(seen, rows, strict=False)), (number, asked[number][2])
    assert engine.model.not_compiled == "" or by == "torch"


@pytest.mark.skipif(not NATIVE, reason=f"the C kernel is not here: {NativeCpu().unavailable()}")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_step_has_the_bits_that_it_has_alone_whatever_adapters_stand_beside_it(
    threads: int, folders: Path, instructions: str
) -> None:
    """The logits, and the keys and values that the token leaves."""
    chance, company = random.Random(threads), Company(folders, 4, most=16)
    model, before = company.engine.model, torch.get_num_threads()
    torch.set_num_threads(threads)
    variants, steps = [], []
    for active in SETS:
        company.engine.activate(active)
        variants.append(company.engine.sequences.current.variant)
        steps.append(model.step())
    together = [number for number, step in enumerate(steps) if step.base == steps[0].base]
    assert len(together) == len(SETS) - 2, "only other matrices are multiplied apart"
    try:
        for _ in range(20):
            rows = [chance.choice(together) for _ in range(chance.randint(1, 16))]
            caches, alone = [], []
            for number in rows:
                model.wear(variants[number])
                cache, other = model.new_cache(300), model.new_cache(300)
                length = chance.choice([1, 5, 127, 128, 200])
                noise = torch.Generator().manual_seed(number)
                for tensors in zip(cache.keys, cache.values, strict=True):
                    for tensor in tensors:
                        tensor[:, :length] = torch.randn(tensor[:, :length].shape, generator=noise)
                for one, two in zip((cache.keys, cache.values), (other.keys, other.values), strict=True):
                    for source, target in zip(one, two, strict=True):
                        target[:, :length] = source[:, :length]
                cache.length = other.length = length
                caches.append(cache)
                alone.append(other)
            tokens = [chance.randrange(4, 250) for _ in rows]
            positions = [model.position(cache) for cache in caches]
            found = steps[rows[0]].rows(tokens, caches, positions, [steps[number] for number in rows])
            for row, (number, token, cache, other) in enumerate(zip(rows, tokens, caches, alone, strict=True)):
                assert torch.equal(found[row], steps[number](token, other, model.position(other)))
                for mine, theirs in zip((*cache.keys, *cache.values), (*other.keys, *other.values), strict=True):
                    assert torch.equal(mine[:, : cache.length + 1], theirs[:, : cache.length + 1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not NATIVE, reason=f"the C kernel is not here: {NativeCpu().unavailable()}")
def test_rows_of_different_weights_are_refused(folders: Path) -> None:
    company = Company(folders, 4, most=2)
    step = company.engine.model.step()
    company.engine.activate({"head": 1.0})
    other, caches = company.engine.model.step(), [company.engine.model.new_cache(8) for _ in range(2)]
    with pytest.raises(ValueError, match="different weights"):
        step.rows([5, 6], caches, [0, 0], [step, other])


def test_adapters_that_are_active_again_are_not_made_again(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    company = Company(folders, 4, most=3)
    running = [company.begin(prompt(n, 9), sampled(n, 50), active) for n, active in enumerate(SETS[:3])]
    version, steps = company.engine.model.version, {}
    for active in SETS[:3]:
        company.engine.activate(active)
        steps[str(active)] = company.engine.model.step()
    monkeypatch.setattr(type(company.engine.model), "parts", lambda self: pytest.fail("a step is built anew"))
    for active in (*SETS[:3], *SETS[:3]):
        company.engine.activate(active)
        assert company.engine.model.step() is steps[str(active)]
        company.engine.step()
        for one in running:
            next(one)
    assert company.engine.model.version > version


@pytest.mark.parametrize("replaced", [True, False])
def test_an_answer_goes_on_with_the_adapter_that_is_replaced_or_gone_meanwhile(replaced: bool, folders: Path) -> None:
    company = Company(folders, 4, most=3)
    engine, active = company.engine, {"small": 1.0}
    wanted = company.alone(prompt(1, 20), sampled(1, 20), active)
    other = company.alone(prompt(2, 20), sampled(2, 20), {"dora": 1.0})
    company.begin_anew()
    running = company.begin(prompt(1, 20), sampled(1, 20), active)
    beside = company.begin(prompt(3, 5), sampled(3, 50), {})
    for _ in range(4):
        engine.step()
        next(running)
        next(beside)
    engine.detach("small")
    if replaced:
        engine.attach(folders / "dora", "small")
        again = company.begin(prompt(2, 20), sampled(2, 20), active)
        for _ in again:
            engine.step()
            next(beside)
        assert all(torch.equal(*rows) for rows in zip(company.logits[2], other, strict=True))
    for _ in running:
        engine.step()
        next(beside)
    assert all(torch.equal(*rows) for rows in zip(company.logits[1], wanted, strict=True))
    held = [slot.variant for slot in engine.sequences.slots if slot.nbytes]
    assert len(held) == 1 + replaced, "what the old one had computed is forgotten with its last answer"


def test_a_model_wears_what_is_active_whoever_computed_last(folders: Path) -> None:
    company = Company(folders, 4, most=3)
    engine, ids = company.engine, prompt(1, 30)
    wanted = {}
    for active in SETS[:4]:
        engine.activate(active)
        wanted[str(active)] = engine.logits(ids)
    running = [company.begin(prompt(n, 9), sampled(n, 90), active) for n, active in enumerate(SETS[:3])]
    for active in SETS[:4]:
        engine.activate(active)
        for one in running:
            next(one)
        assert torch.equal(engine.logits(ids), wanted[str(active)])
