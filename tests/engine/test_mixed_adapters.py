"""Answers with different adapters that are written at once: each is what it is alone, to the bit of every logit.

Covers engine/models/variant.py and engine/models/base.py where a model is put on and taken off.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import adapter_builders as adapters
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft import get_peft_model_state_dict as state_of
from torch import nn

from glmchat.engine import Chunk, Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences
from glmchat.engine.engine import load_tokenizer
from glmchat.engine.native.cpu import NativeCpu
from glmchat.engine.native.self_test import coarse_fault
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
    "large": {"target_modules": "all-linear", "r": 100},  # more than the network is wide
}
VIRTUAL = {"prefix": PrefixTuningConfig, "prompt": PromptTuningConfig}
Active = Mapping[str, float]
SETS: tuple[Active, ...] = (
    {},
    *({name: 1.0} for name in (*LORAS, *VIRTUAL)),
    {"small": 0.5},
    {"small": 1.0, "wide": -0.5},
    {"wide": -0.5, "small": 1.0},
    {"dora": 1.0, "words": 1.0, "prefix": 1.0},
    {"norms": 0.3, "prompt": 1.0},
)


GLM_LORAS: dict[str, dict[str, Any]] = {
    "small": {"target_modules": ["query_key_value"]},
    "wide": {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "r": 100},
    "dora": {"target_modules": ["dense_4h_to_h", "query_key_value"], "use_dora": True, "r": 3},
}
GLM_SETS: tuple[Active, ...] = (
    {},
    *({name: 1.0} for name in (*GLM_LORAS, "dense", "norms", "prefix")),
    {"dora": 0.5, "small": -1.0},
    {"small": -1.0, "dora": 0.5},
    {"wide": 1.0, "prefix": 1.0, "norms": 0.5},
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


def glm_layers(model: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    for place, module in model.named_modules():
        if place.endswith(f".{name}"):
            yield place, cast(nn.Linear, module)


@pytest.fixture(scope="module")
def glm_folders(
    tmp_path_factory: pytest.TempPathFactory, random_checkpoints: ModuleType, folders: Path
) -> Mapping[str, Path]:
    """The same for a tiny ChatGLM2 and ChatGLM3; the layers of their LoRAs are PEFT's."""
    found = {}
    for family in ("chatglm2-6b", "chatglm3-6b"):
        found[family] = root = tmp_path_factory.mktemp(family)
        sizes = {"hidden_size": 64, "kv_channels": 16, "ffn_hidden_size": 96, "padded_vocab_size": 272}
        random_checkpoints.write_checkpoint(root / "base", random_checkpoints.tiny(family, **sizes, seq_length=512))
        noise = torch.Generator().manual_seed(6)
        for number, (name, settings) in enumerate(GLM_LORAS.items()):
            model = Engine.load(root / "base", dtype="float32", threads=1).model
            chosen = {"r": 4, "lora_alpha": 8, **settings}
            inject_adapter_in_model(LoraConfig(**chosen), model)
            adapters.randomise(model, number, 0.1)
            tensors = {f"base_model.model.{key}": value.contiguous() for key, value in state_of(model).items()}
            adapters.write_lora(root / name, tensors, **chosen)
        model = Engine.load(root / "base", dtype="float32", threads=1).model
        for name, saved in (("dense", "dense"), ("norms", "post_attention_layernorm")):
            lora = {}
            for place, module in glm_layers(model, "dense_h_to_4h"):
                lora[f"base_model.model.{place}.lora_A.weight"] = torch.randn(4, module.in_features, generator=noise)
                lora[f"base_model.model.{place}.lora_B.weight"] = torch.randn(module.out_features, 4, generator=noise)
            trained = {
                f"base_model.model.{place}.weight": module.weight
                + torch.randn(module.weight.shape, generator=noise) / 9
                for place, module in glm_layers(model, saved)
            }
            settings = {"target_modules": ["dense_h_to_4h"], "modules_to_save": [saved]}
            adapters.write_lora(root / name, {**lora, **trained}, **settings)
        (root / "prefix").mkdir()
        rows = torch.randn(7, model.spec.prefix_width, generator=noise)
        torch.save({"transformer.prefix_encoder.embedding.weight": rows}, root / "prefix" / "pytorch_model.bin")
    return found


class Company:
    """An engine whose answers are noted: of each seed, all logits that its tokens were chosen from.

    way: bits of weights, or "coarse" for 4 bits multiplied by activations of 8.
    """

    def __init__(self, folders: Path, way: int | str | None, most: int) -> None:
        settings = {"quant": 4, "products": "int8"} if way == "coarse" else {"quant": way}
        self.engine = Engine.load(folders / "base", threads=1, parallel=most, **settings)
        for folder in sorted(folders.iterdir()):
            if folder.name != "base":
                self.engine.attach(folder, folder.name)
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


WAYS = [None, 4, 8, pytest.param("coarse", marks=pytest.mark.skipif(bool(coarse_fault()), reason=str(coarse_fault())))]


@pytest.mark.parametrize("by", ["c", "torch"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(2))
def test_an_answer_is_the_same_alone_and_beside_answers_with_other_adapters(
    seed: int, way: int | str | None, by: str, folders: Path
) -> None:
    check_answers(Company(folders, way, most=7), seed, by, SETS)


@pytest.mark.parametrize("by", ["c", "torch"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["chatglm2-6b", "chatglm3-6b"])
def test_so_it_is_with_a_chatglm(
    family: str, way: int | str | None, by: str, glm_folders: Mapping[str, Path], folders: Path
) -> None:
    company = Company(glm_folders[family], way, most=7)
    company.engine._tokenizer = load_tokenizer(folders / "base")
    check_answers(company, 3, by, GLM_SETS)


def check_answers(company: Company, seed: int, by: str, sets: Sequence[Active]) -> None:
    """Random joins, leaves and stops, with adapters activated in between."""
    chance, engine = random.Random(seed), company.engine
    engine.model.compile_steps = by == "c"
    count = 30
    asked = [
        (prompt(n, chance.randint(1, 60)), sampled(n, chance.randint(2, 25)), chance.choice(sets)) for n in range(count)
    ]
    wanted = [company.alone(*one) for one in asked]
    company.begin_anew()
    waiting, writing, left = list(range(count)), dict[int, Any](), set[int]()
    while waiting or writing:
        while waiting and len(writing) < 7 and chance.random() < 0.6:
            number = waiting.pop(chance.randrange(len(waiting)))
            writing[number] = company.begin(*asked[number])
        if chance.random() < 0.05:
            engine.activate(chance.choice(sets))  # nobody asks for it
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
@pytest.mark.parametrize("way", WAYS[1::2])
def test_a_row_of_a_step_has_the_bits_that_it_has_alone_whatever_adapters_stand_beside_it(
    way: int | str, threads: int, folders: Path, instructions: str
) -> None:
    """The logits, and the keys and values that the token leaves."""
    chance, company = random.Random(threads), Company(folders, way, most=16)
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


@pytest.mark.parametrize("quant", [None, 4, 8])
def test_trained_matrices_stand_in_for_packed_ones_in_the_type_of_the_activations(
    quant: int | None, folders: Path
) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        engine = Engine.load(folders / "base", quant=quant, dtype=dtype, threads=1)
        engine.attach(folders / "dense", "dense")
        engine.activate({"dense": 1.0})
        assert engine.logits(prompt(1, 9)).isfinite().all()
        found.append(engine.model.get_parameter("model.layers.1.self_attn.v_proj.weight"))
    assert [one.dtype for one in found] == [torch.float32, torch.bfloat16]
    assert torch.equal(found[0].bfloat16(), found[1])
