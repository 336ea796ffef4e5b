"""The list of launches that is a token on a card: how long it is, and that nothing but numbers changes in it.

Covers engine/gpu/step.py. No kernel runs here: what they compute is compared in test_gpu_kernels.py.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmchat.engine.families import family_of
from glmchat.engine.gpu import step as card
from glmchat.engine.gpu.choose import Choice
from glmchat.engine.gpu.step import CardStep, CardSteps, Launch
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models import chatglm2
from glmchat.engine.models.base import LanguageModel

_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_GLM = {**_ENDS, "model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32}
_GLM2 = {**_GLM, "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696,
         "kv_channels": 128, "rmsnorm": True, "post_layer_norm": True, "add_qkv_bias": True}  # fmt: skip
_LLAMA = {**_ENDS, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "ChatGLM-6B": ({**_GLM, "num_layers": 28, "inner_hidden_size": 16384, "position_encoding_2d": True,
                    "vocab_size": 130528, "bos_token_id": 130004, "mask_token_id": 130000,
                    "gmask_token_id": 130001}, 172),
    "ChatGLM2-6B": ({**_GLM2, "num_layers": 28, "padded_vocab_size": 65024}, 172),
    "ChatGLM3-6B": ({**_GLM2, "num_layers": 28, "padded_vocab_size": 65024, "seq_length": 8192}, 172),
    "GLM-4-9B": ({**_GLM2, "num_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500}, 244),
    "GLM-4-9B-0414": ({**_LLAMA, "model_type": "glm4", "num_hidden_layers": 40, "num_key_value_heads": 2,
                       "intermediate_size": 13696, "head_dim": 128, "partial_rotary_factor": 0.5,
                       "attention_bias": True, "vocab_size": 151552, "pad_token_id": 0}, 324),
    "Llama-3-8B": ({**_LLAMA, "model_type": "llama", "num_hidden_layers": 32, "intermediate_size": 14336,
                    "vocab_size": 128256}, 196),
    "Qwen3-8B": ({**_LLAMA, "model_type": "qwen3", "num_hidden_layers": 36, "intermediate_size": 12288,
                  "head_dim": 128, "vocab_size": 151936}, 220),
    "CPM (GPT-2)": ({**_ENDS, "model_type": "gpt2", "n_layer": 32, "n_head": 32, "n_embd": 2560,
                     "n_positions": 1024, "vocab_size": 30000}, 196),
}  # fmt: skip


def cache_of(model: LanguageModel, limit: int, device: str) -> KVCache:
    return KVCache(model.spec.layers, model.spec.kv_heads, model.spec.head_dim, limit, torch.float32, device)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_is_so_many_nodes_of_a_graph(name: str) -> None:
    config, nodes = MODELS[name]
    family, spec = family_of(config)
    with torch.device("meta"):
        model = family.build(spec).requires_grad_(False).half()
    model.prepare(torch.float16, "meta")
    parts = model.parts()
    assert parts is not None
    step = CardStep(parts, spec, cache_of(model, 2048, "meta"))
    assert len(step.launches()) == nodes
    used = {launch.kernel for launch in step.launches()}
    assert used - {"add_normed"} == {"embed", "product", "attend", "merge", "candidates", "choose_best"}
    assert ("add_normed" in used) == (config["model_type"] == "glm4")


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Whatever torch is asked to do meanwhile."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The launches of the test instead of their work."""
    launched: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: launched.append(launch.addresses()))
    return launched


@pytest.mark.parametrize("family", ["llama:4", "qwen3:8", "chatglm", "chatglm2:4", "glm4", "gpt2"])
def test_two_tokens_are_the_same_launches_without_an_allocation_or_a_wait(
    family: str, run: list[tuple[Any, ...]], step_checks: ModuleType
) -> None:
    name, _, bits = family.partition(":")
    with torch.inference_mode():
        model = step_checks.random_model(step_checks.CONFIGS[name], int(bits or 0))
        cache = cache_of(model, 48, "cpu")
        parts = model.parts()
        assert parts is not None
        step, choice, seen = CardStep(parts, model.spec, cache), Choice(0.8, 1.1, [], ()), []
        for token, position in ((9, 0), (44, 1), (7, 2)):
            run.clear()
            with Operations() as operations:
                row = step(token, cache, position, 0)
            listed = [*run]
            choice.candidates(row)
            cache.advance(1)
            seen.append((listed, operations.names))
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert len(seen[0][0]) == (8 if name == "glm4" else 6) * model.spec.layers + 4
    for _, names in seen:  # the state is written, and the row is a view
        assert set(names) <= {"aten::select.int", "aten::fill_.Tensor", "aten::copy_", "aten::view", "aten::lift_fresh"}


def test_what_is_chosen_by_goes_up_with_the_first_token_and_never_again(
    run: list[tuple[Any, ...]], step_checks: ModuleType
) -> None:
    with torch.inference_mode():
        model = step_checks.random_model(step_checks.CONFIGS["llama"], 4)
        cache = cache_of(model, 48, "cpu")
        parts = model.parts()
        assert parts is not None
        step = CardStep(parts, model.spec, cache)
        first, second = Choice(0.8, 1.1, [3], (5,)), Choice(1.0, 1.0, [], ())
        repeated = []
        for choice in (first, first, second, second, first):
            row = step(9, cache, 0, 0)
            run.clear()
            choice.candidates(row)
            repeated.append([launch[0] for launch in run])
    again = ["candidates", "choose_best"]
    assert repeated == [again, [], again, [], again]


def test_a_cache_that_has_grown_and_a_layer_that_was_swapped_get_a_step_of_their_own(
    run: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch, step_checks: ModuleType
) -> None:
    made: list[KVCache] = []

    class Counted(CardStep):
        def __init__(self, parts: Any, spec: Any, cache: KVCache, **more: Any) -> None:
            super().__init__(parts, spec, cache, **more)
            made.append(cache)

    monkeypatch.setattr(card, "CardStep", Counted)
    with torch.inference_mode():
        model = step_checks.random_model(step_checks.CONFIGS["chatglm2"], 4)
        assert isinstance(model, chatglm2.ChatGLM2)
        model.make_step = CardSteps
        cache = cache_of(model, 64, "cpu")
        cache.capacity = 4  # as on a card, where it begins small
        cache.keys, cache.values = ([tensor[:, :4].clone() for tensor in kind] for kind in (cache.keys, cache.values))

        def advance() -> None:
            step = model.compiled(cache)
            assert step is not None
            step(9, cache, *model.positions(cache))
            cache.advance(1)

        for _ in range(4):
            advance()
        assert made.count(cache) == 1
        for _ in range(4):
            advance()
        assert (made.count(cache), cache.capacity) == (2, 8)
        model.swap("transformer.output_layer", model.transformer.output_layer)
        advance()
        assert (made.count(cache), cache.capacity) == (3, 16)


def test_matrices_of_one_input_lie_in_memory_once(run: list[tuple[Any, ...]], step_checks: ModuleType) -> None:
    with torch.inference_mode():
        for bits in (0, 4):
            model = step_checks.random_model(step_checks.CONFIGS["qwen2"], bits)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            parts = model.parts()
            assert parts is not None
            steps = [CardStep(parts, model.spec, cache_of(model, 48, "cpu")) for _ in range(2)]
            words = [
                {launch.arguments[1].data_ptr() for launch in step.launches() if launch.kernel == "product"}
                for step in steps
            ]
            assert words[0] == words[1]
            state = model.state_dict()
            assert all(torch.equal(state[name], before[name]) for name in before)
            layer = parts.layers[0]
            own = {t.untyped_storage().data_ptr() for module in layer.qkv for t in module.state_dict().values()}
            assert own & {launch.arguments[1].untyped_storage().data_ptr() for launch in steps[0].launches()}
