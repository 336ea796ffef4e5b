"""One token in C against the same token in torch: every family, type, length, thread count and instruction set.

Covers engine/native/self_test.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch

from glmchat.engine import Engine, Sampling
from glmchat.engine.decoding.sequences import Sequences
from glmchat.engine.native import self_test, step
from glmchat.engine.native.attention import from_int8, to_int8
from glmchat.engine.native.cpu import NativeCpu, native_library
from glmchat.engine.placement import multiply_coarsely, multiply_exactly
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.linear import QuantLinear

NATIVE = NativeCpu().unavailable() is None
pytestmark = pytest.mark.skipif(not NATIVE, reason=f"the C kernel is not here: {NativeCpu().unavailable()}")

# Both sides round activations to 16 bits; a last bit of a norm or a softmax may move a number to the next step, which
# is 2^-16 of a group's largest. A stage left out, or a head mixed up, is off by tens of percent.
TOLERANCE = 1e-3
QUERIES = "model.layers.1.self_attn.q_proj"
SIZES = {"max_position_embeddings": 512}
LLAMAS: dict[str, dict[str, Any]] = {
    "tied": {},
    "with biases, untied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "one key head": {"num_key_value_heads": 1, "head_dim": 32},
    "every head its own keys": {"num_key_value_heads": 4, "head_dim": 48},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    "glm": {"model_type": "glm", "head_dim": 32},
    "glm4": {"model_type": "glm4", "head_dim": 32, "tie_word_embeddings": False},
}
GLM = {"hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "kv_channels": 32, "ffn_hidden_size": 96,
       "padded_vocab_size": 300, "seq_length": 512}  # fmt: skip


def ids(count: int) -> list[int]:
    return [(7 * i) % 250 + 4 for i in range(count)]


def llama(folder: Path, builders: ModuleType, quant: int | None, **changes: Any) -> Engine:
    engine = Engine.load(builders.write_folder(folder, **SIZES, **changes), quant=quant, threads=1)
    engine.use_dtype(torch.float32)
    return engine


def decoded(engine: Engine, compiled: bool, prompt: int, count: int = 4) -> torch.Tensor:
    """Logits behind each of `count` tokens that follow a prompt."""
    engine.model.compile_steps = compiled
    engine.sequence.forget()
    engine.sequence.prefill(ids(prompt))
    return torch.stack([engine.advance(token) for token in ids(prompt + count)[prompt:]])


def difference(engine: Engine, prompt: int = 9) -> float:
    found, wanted = (decoded(engine, compiled, prompt) for compiled in (True, False))
    assert engine.model.not_compiled == ""
    assert not torch.equal(found, wanted)  # that would be torch twice
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("quant", [None, 4, 8])
@pytest.mark.parametrize("case", LLAMAS)
def test_a_llama_says_in_c_what_it_says_in_torch(
    case: str, quant: int | None, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    assert difference(llama(tmp_path, builders, quant, **LLAMAS[case])) < TOLERANCE


@pytest.mark.parametrize("quant", [None, 4])
@pytest.mark.parametrize("changes", [{}, {"add_bias_linear": True}, {"pre_seq_len": 5}, {"rope_ratio": 50.0}])
def test_so_does_a_chatglm(
    changes: dict[str, Any], quant: int | None, tmp_path: Path, random_checkpoints: ModuleType, instructions: str
) -> None:
    config = random_checkpoints.tiny("chatglm3-6b", **{**GLM, **changes})
    random_checkpoints.write_checkpoint(tmp_path, config, dtype=torch.float32)
    engine = Engine.load(tmp_path, quant=quant, threads=1)
    engine.use_dtype(torch.float32)
    assert difference(engine) < TOLERANCE


LENGTHS = (1, 5, 127, 128, 129, 40, 300, 2, 64, 7, 256, 31, 90, 3, 200, 11)


def together(engine: Engine, count: int, lengths: Sequence[int] = LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of `count` sequences of these lengths that advance in one step three times, and of each of them alone."""
    model, found, alone = engine.model, [], []
    with torch.inference_mode():
        caches = [[model.new_cache(512, model.cache_dtype) for _ in range(2)] for _ in range(count)]
        for number, pair in enumerate(caches):
            for cache in pair:
                model(torch.tensor(ids(lengths[number])), cache, last_only=True)
        compiled = model.step()
        for turn in range(3):
            tokens = [(31 * number + turn) % 250 + 4 for number in range(count)]
            shared = [first for first, _ in caches]
            found.append(compiled.rows(tokens, shared, [model.position(cache) for cache in shared]))
            alone.append(
                torch.stack(
                    [compiled(t, own, *model.positions(own)) for t, (_, own) in zip(tokens, caches, strict=True)]
                )
            )
            for cache in (cache for pair in caches for cache in pair):
                cache.advance(1)
    for one, other in caches:
        for left, right in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True):
            assert torch.equal(left[:, : one.length], right[:, : other.length])
    return torch.stack(found), torch.stack(alone)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 13, 16])
@pytest.mark.parametrize("quant", [None, 4, 8])
def test_a_row_has_the_same_bits_alone_and_in_company(
    quant: int | None, count: int, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    found, alone = together(llama(tmp_path, builders, quant, **LLAMAS["qwen3"]), count)
    assert torch.equal(found, alone)


@pytest.mark.parametrize("count", [2, 3, 5, 9, 16])
def test_so_it_has_with_activations_of_8_bits(
    count: int, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    engine = llama(tmp_path, builders, 4, **LLAMAS["qwen3"])
    exact = together(engine, count)[0]
    multiply_coarsely(engine.model)
    found, alone = together(engine, count)
    assert torch.equal(found, alone)
    assert 1e-4 < float((found - exact).abs().max() / exact.abs().max()) < 0.1
    assert difference(engine) < 0.02  # a last bit of a norm moves a number by a step of 8 bits


@pytest.mark.parametrize("case", ["with biases, untied", "glm4"])
def test_so_it_has_whatever_stands_in_its_layers(
    case: str, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    engine = llama(tmp_path, builders, 4, intermediate_size=544, **LLAMAS[case])
    engine.use_dtype(torch.bfloat16)
    for count in (3, 12):
        found, alone = together(engine, count)
        assert torch.equal(found, alone)


def test_so_it_has_under_an_adapter(tmp_path: Path, builders: ModuleType, instructions: str) -> None:
    engine = llama(tmp_path / "base", builders, 4)
    adapters.write_peft(tmp_path / "base", tmp_path / "adapter", r=4, target_modules="all-linear")
    engine.attach(tmp_path / "adapter", "a")
    engine.activate({"a": 1.0})
    for count in (4, 16):
        found, alone = together(engine, count)
        assert torch.equal(found, alone)


def test_a_step_for_which_there_was_no_memory_leaves_room_for_the_next(tmp_path: Path, builders: ModuleType) -> None:
    model = llama(tmp_path, builders, 4).model
    compiled = model.step()
    caches = [model.new_cache(40_000, model.dtype) for _ in range(2)]
    compiled.rows([5, 6], caches, [0, 0])
    caches[0].length = 30_000
    empty = torch.empty

    def none_left(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") == torch.uint8:
            raise MemoryError
        return empty(*shape, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch, "empty", none_left)
        compiled.rows([5, 6], caches, [0, 0])
    assert compiled._room.numel() >= native_library().glm_step_room(compiled._address, *compiled._room_for)
    compiled.rows([5, 6], caches, [0, 0])
    assert compiled._room_for[2] > 30_000 // 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prompt", [1, 30, 31, 127, 128, 300])
def test_a_long_context_is_attended_to_in_whole(
    prompt: int, dtype: torch.dtype, tmp_path: Path, builders: ModuleType
) -> None:
    engine = llama(tmp_path, builders, 4)
    engine.use_dtype(dtype)
    # torch rounds everything between the products to 8 bits there, C only keys and values.
    assert difference(engine, prompt) < (TOLERANCE if dtype == torch.float32 else 0.05)


def test_matrices_of_different_groups_do_not_share_their_activations(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    for layer, names in (
        ("model.layers.1", ("self_attn.k_proj", "mlp.up_proj")),
        ("model.layers.2", ("mlp.gate_proj",)),
    ):
        for name in names:
            old = engine.model.get_submodule(f"{layer}.{name}")
            assert isinstance(old, QuantLinear)
            codes = quantise_int8(old.dequantise(), fast=True)
            engine.model.swap(f"{layer}.{name}", QuantLinear.from_int8(codes.q, codes.scale))
    assert difference(engine) < TOLERANCE


def test_the_number_of_threads_changes_no_bit(tmp_path: Path, builders: ModuleType, instructions: str) -> None:
    engine = llama(tmp_path, builders, 4, intermediate_size=544)
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(decoded(engine, True, 140))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_cache_that_is_cut_back_decodes_the_same_again(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    once = decoded(engine, True, 150, 6)
    engine.sequence.cut(150)
    assert torch.equal(torch.stack([engine.advance(token) for token in ids(156)[150:]]), once)


def test_a_replay_decodes_in_c_too(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    said = list(engine.generate(ids(20), Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
    passes = engine.sequence.passes
    held = [*ids(20), *said[:-1]]
    once = engine.advance(said[-1])
    again = engine.rebuild([*held, said[-1]], [*passes.done])
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="queries-and-values"),
        pytest.param({"target_modules": "all-linear", "r": 8}, id="all-linear"),
        pytest.param({"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, id="dora"),
        pytest.param({"lora_bias": True, "target_modules": ["v_proj", "o_proj"]}, id="with a bias"),
        pytest.param({"target_modules": ["embed_tokens", "up_proj"]}, id="embedding"),
        pytest.param({"bias": "all", "target_modules": ["v_proj", "o_proj"]}, id="nothing but a bias in some layers"),
    ],
)
@pytest.mark.parametrize("quant", [None, 4])
def test_adapters_speak_in_c_and_off_is_the_base_bit_for_bit(
    settings: dict[str, Any], quant: int | None, tmp_path: Path, builders: ModuleType
) -> None:
    engine = llama(tmp_path / "base", builders, quant, attention_bias="bias" in settings)
    before = decoded(engine, True, 9)
    adapters.write_peft(tmp_path / "base", tmp_path / "lora", **settings)
    engine.attach(tmp_path / "lora", "it")
    engine.activate({"it": 1.0})
    assert difference(engine) < TOLERANCE
    assert float((decoded(engine, True, 9) - before).abs().max()) > 0.01
    engine.detach("it")
    assert torch.equal(decoded(engine, True, 9), before)
    assert engine.model.not_compiled == ""


def test_a_module_that_c_does_not_know_is_left_to_torch_and_called(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    before = decoded(engine, True, 9)
    old = engine.model.get_submodule(QUERIES)

    class Doubled(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = old(x) * 2
            return found

    engine.model.swap(QUERIES, Doubled())
    changed = decoded(engine, True, 9)
    assert engine.model.not_compiled == "a layer is a Doubled"
    assert torch.equal(changed, decoded(engine, False, 9))
    engine.model.swap(QUERIES, old)
    assert torch.equal(decoded(engine, True, 9), before)


def test_a_layer_that_is_swapped_while_the_step_is_built_is_in_the_next_step(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama(tmp_path, builders, 4)
    old = engine.model.get_submodule(QUERIES)
    assert isinstance(old, QuantLinear)
    codes = quantise_int8(old.dequantise() * 2, fast=True)
    read = engine.model.parts

    def swapped_meanwhile() -> step.Parts | None:
        parts = read()
        monkeypatch.setattr(engine.model, "parts", read)
        engine.model.swap(QUERIES, QuantLinear.from_int8(codes.q, codes.scale))
        return parts

    engine.model.changed()
    monkeypatch.setattr(engine.model, "parts", swapped_meanwhile)
    engine.model.step()
    assert engine.model.get_submodule(QUERIES) is not old
    assert difference(engine) < TOLERANCE


def test_a_swap_from_another_thread_waits_for_the_step_that_is_built_and_is_in_the_next(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama(tmp_path, builders, 4)
    old = engine.model.get_submodule(QUERIES)
    assert isinstance(old, QuantLinear)
    codes = quantise_int8(old.dequantise() * 2, fast=True)
    other = Thread(target=engine.model.swap, args=(QUERIES, QuantLinear.from_int8(codes.q, codes.scale)))
    read = engine.model.parts
    during: list[bool] = []

    def swapped_beside() -> step.Parts | None:
        monkeypatch.setattr(engine.model, "parts", read)
        parts = read()
        other.start()
        other.join(0.2)
        during.append(engine.model.get_submodule(QUERIES) is old)  # no half-swapped model is ever read
        return parts

    engine.model.changed()
    monkeypatch.setattr(engine.model, "parts", swapped_beside)
    engine.model.step()
    other.join(10)
    assert during == [True]
    assert engine.model.get_submodule(QUERIES) is not old
    assert difference(engine) < TOLERANCE


def test_every_change_of_a_model_is_another_version_and_another_step(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    model = engine.model
    seen, steps = [model.version], [model.step()]
    adapters.write_peft(tmp_path, tmp_path / "lora")
    engine.attach(tmp_path / "lora", "it")

    changes: tuple[Callable[[], object], ...] = (
        lambda: engine.activate({"it": 1.0}),
        lambda: engine.detach("it"),
        lambda: engine.use_dtype(torch.bfloat16),
        lambda: multiply_exactly(model),
        lambda: model.swap("lm_head", torch.nn.Linear(engine.spec.hidden_size, engine.spec.vocab_size)),
    )
    for change in changes:
        change()
        seen.append(model.version)
        steps.append(model.step())
    assert seen == sorted(set(seen))
    assert steps[2] is steps[0], "without the adapter the model is what it was"
    others = [one for number, one in enumerate(steps) if one is not None and number != 2]
    assert len({id(one) for one in others}) == len(others)


def test_facts_build_no_step_and_name_the_one_of_the_last_answer(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = llama(tmp_path, builders, 4)
    builds: list[str] = []
    read = engine.model.parts

    def counted() -> step.Parts | None:
        builds.append("one")
        return read()

    monkeypatch.setattr(engine.model, "parts", counted)
    engine.model.changed()
    assert engine.facts()["kernel"].endswith("+step")
    assert builds == []

    engine.model.swap(QUERIES, torch.nn.Sequential(engine.model.get_submodule(QUERIES)))  # nothing that C knows
    first = next(engine.stream_ids(ids(5), Sampling(temperature=0, max_tokens=3, ignore_eos=True)))
    assert first.token_ids
    assert builds == ["one"]
    assert not engine.facts()["kernel"].endswith("+step")


def test_float32_by_name_is_multiplied_exactly_by_torch(tmp_path: Path, builders: ModuleType) -> None:
    engine = Engine.load(builders.write_folder(tmp_path, **SIZES), quant=4, dtype="float32", threads=1)
    assert torch.equal(decoded(engine, True, 9), decoded(engine, False, 9))
    assert engine.model.not_compiled == "float32 is multiplied exactly"


def test_numbers_that_are_none_stay_none(tmp_path: Path, builders: ModuleType) -> None:
    engine = llama(tmp_path, builders, 4)
    engine.model.get_parameter("model.layers.0.input_layernorm.weight").data[3] = float("nan")
    engine.use_dtype(torch.float32)
    assert bool(decoded(engine, True, 9).isnan().all())


def test_a_step_that_computes_wrongly_is_passed_over_and_named(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.CompiledStep.__call__
    monkeypatch.setattr(step.CompiledStep, "__call__", lambda self, *given: right(self, *given) * 1.01)
    self_test.step_fault.cache_clear()
    try:
        engine = llama(tmp_path, builders, 4)
        wanted = decoded(engine, False, 9)
        assert torch.equal(decoded(engine, True, 9), wanted)
        assert "differs from torch" in engine.model.not_compiled
    finally:
        self_test.step_fault.cache_clear()


def test_a_step_whose_rows_mind_their_company_is_not_used(
    tmp_path: Path, builders: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = step.CompiledStep.rows

    def wrong(self: step.CompiledStep, tokens: Sequence[int], *given: Any) -> torch.Tensor:
        return right(self, tokens, *given) + (1e-6 if len(tokens) > 3 else 0)

    monkeypatch.setattr(step.CompiledStep, "rows", wrong)
    self_test.step_fault.cache_clear()
    try:
        model = llama(tmp_path, builders, 4).model
        assert model.step() is None and model.not_compiled == "16 rows of a step of llama are not what each is alone"
    finally:
        self_test.step_fault.cache_clear()


# A last bit before keys and values are rounded may move one of them by a 127th of the largest beside it.
NARROW = 0.02


def narrow(engine: Engine, cache_type: str = "int8") -> Engine:
    engine.model.cache_type = cache_type
    engine.sequences = Sequences(engine.model, engine.context, engine.device, engine.sequences.most)
    return engine


@pytest.mark.parametrize("wrong", [None, float("nan"), float("inf")])
def test_c_keeps_the_bits_that_torch_keeps(
    wrong: float | None, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    """What the first layer stores does not depend on what is stored: so a float32 cache says what was rounded."""
    for number, case in enumerate(("one key head", "every head its own keys", "qwen3")):
        model = llama(tmp_path / str(number), builders, None, **LLAMAS[case]).model
        if wrong is not None:
            with torch.no_grad():
                model.get_parameter("model.layers.0.self_attn.v_proj.weight")[3].fill_(wrong)
                model.get_parameter("model.layers.0.self_attn.k_proj.weight")[0].fill_(0.0)
                model.changed()
        wide, narrow = (model.new_cache(8, dtype) for dtype in (torch.float32, torch.int8))
        for token in (5, 250):
            for cache in (wide, narrow):
                model.step()(token, cache, cache.length)
                cache.advance(1)
        for kept, found in zip((wide.keys[0], wide.values[0]), (narrow.keys[0], narrow.values[0]), strict=True):
            wanted = from_int8(to_int8(kept[:, :2]))
            if wrong is None:
                assert torch.equal(found[:, :2], to_int8(kept[:, :2]))
            assert torch.equal(wanted.isfinite(), from_int8(found[:, :2]).isfinite()) or wrong == float("inf")
            assert torch.equal(wanted.isfinite().all(-1), from_int8(found[:, :2]).isfinite().all(-1))


@pytest.mark.parametrize("cache_type", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", LLAMAS)
def test_a_llama_with_a_narrow_cache_says_in_c_what_it_says_in_torch(
    case: str, cache_type: str, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    assert difference(narrow(llama(tmp_path, builders, 4, **LLAMAS[case]), cache_type)) < NARROW


@pytest.mark.parametrize("changes", [{}, {"pre_seq_len": 5}])
def test_so_does_a_chatglm_with_and_without_a_prefix_in_8_bits(
    changes: dict[str, Any], tmp_path: Path, random_checkpoints: ModuleType, instructions: str
) -> None:
    config = random_checkpoints.tiny("chatglm3-6b", **{**GLM, **changes})
    random_checkpoints.write_checkpoint(tmp_path, config, dtype=torch.float32)
    engine = Engine.load(tmp_path, quant=4, threads=1)
    engine.use_dtype(torch.float32)
    assert difference(narrow(engine)) < NARROW


@pytest.mark.parametrize("length", [1, 31, 127, 128, 300])
def test_a_long_context_of_8_bits_is_attended_to_in_whole(length: int, tmp_path: Path, builders: ModuleType) -> None:
    assert difference(narrow(llama(tmp_path, builders, 4)), length) < NARROW


@pytest.mark.parametrize("count", [2, 5, 16])
def test_a_row_has_the_same_bits_beside_others_whose_caches_are_narrow(
    count: int, tmp_path: Path, builders: ModuleType, instructions: str
) -> None:
    engine = llama(tmp_path / "base", builders, 4, **LLAMAS["qwen3"])
    wide = together(engine, count)[0]
    found, single = together(narrow(engine), count)
    assert torch.equal(found, single)
    assert 1e-5 < float((found - wide).abs().max() / wide.abs().max()) < 0.1
    adapters.write_peft(tmp_path / "base", tmp_path / "adapter", r=4, target_modules="all-linear")
    engine.attach(tmp_path / "adapter", "a")
    engine.activate({"a": 1.0})
    assert torch.equal(*together(engine, count))
