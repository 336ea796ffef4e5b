"""Cached decoding against one uncached pass, at every split; and a stop in the middle of a prefill.

Covers engine/kv_cache.py.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glmchat.checkpoints.families import parse
from glmchat.engine import Engine, Sampling
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models import chatglm
from glmchat.engine.models.prefix import PrefixedModel

V1 = {"vocab_size": 300, "bos_token_id": 204, "eos_token_id": 205, "mask_token_id": 200, "gmask_token_id": 201}
FIRST = {"hidden_size": 16, "inner_hidden_size": 64, "num_layers": 4, "num_attention_heads": 2}
TEXT = [11, 12, 13, 14, 15]
AFTER = [21, 22, 23, 24, 25, 26, 27]
MASK, GMASK, SOP = 200, 201, 204


def cases() -> list[Any]:
    prefixed = {"pre_seq_len": 4}
    v1 = [
        pytest.param("chatglm-6b", V1, [*TEXT, GMASK, SOP], id="6b-gmask"),
        pytest.param("chatglm-6b", V1, [11, MASK, 12, 13, SOP], id="6b-mask"),
        pytest.param("chatglm-6b", V1, [11, GMASK, 12, MASK, SOP], id="6b-both-masks"),
        pytest.param("chatglm-6b", V1 | {"position_encoding_2d": False}, [*TEXT, GMASK, SOP], id="6b-one-position"),
        pytest.param(
            "chatglm-6b", V1 | {"position_encoding_2d": False}, [11, MASK, 12, SOP], id="6b-one-position-mask"
        ),
        pytest.param("chatglm-6b", V1 | prefixed, [*TEXT, GMASK, SOP], id="6b-prefix"),
        pytest.param(
            "chatglm-6b", V1 | prefixed | {"prefix_projection": True}, [*TEXT, GMASK, SOP], id="6b-prefix-projected"
        ),
    ]
    small = {"padded_vocab_size": 300}
    v2 = [
        pytest.param("chatglm2-6b", small, TEXT, id="2"),
        pytest.param("chatglm2-6b", small | {"rope_ratio": 16}, TEXT, id="2-32k"),
        pytest.param("chatglm3-6b", small | {"rope_ratio": 50}, TEXT, id="3-32k"),
        pytest.param("glm-4-9b-chat", {"padded_vocab_size": 151552, "num_layers": 2}, TEXT, id="glm-4"),
        pytest.param("chatglm2-6b", small | prefixed, TEXT, id="2-prefix"),
        pytest.param("chatglm2-6b", small | prefixed | {"prefix_projection": True}, TEXT, id="2-prefix-projected"),
        pytest.param("cpm-gpt2", {"vocab_size": 300}, TEXT, id="gpt2"),
    ]
    return v1 + v2


def load(folder: Path, random_checkpoints: ModuleType, name: str, changes: dict[str, Any]) -> Engine:
    random_checkpoints.write_checkpoint(folder, random_checkpoints.tiny(name, **changes), dtype=torch.float32)
    return Engine.load(folder, dtype="float32", threads=1)


# Of logits up to 5: float32 sums in another order, which depends on the processor (1.1e-5 on an AMD EPYC).
SUMS = 3e-5


@pytest.mark.parametrize(("name", "changes", "prompt"), cases())
def test_cached_decoding_equals_an_uncached_pass_at_every_split(
    name: str, changes: dict[str, Any], prompt: list[int], tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    every_split(load(tmp_path, random_checkpoints, name, changes), prompt)


def every_split(engine: Engine, prompt: list[int]) -> None:
    ids = torch.tensor(prompt + AFTER)
    whole = engine.logits(ids.tolist())
    for split in range(len(prompt), len(ids)):
        for step in (1, 2, len(ids)):  # behind the split one by one, in pairs, all at once
            with torch.inference_mode():
                cache = engine.model.new_cache(len(ids), torch.float32)
                rows = [engine.model(ids[:split], cache)]
                rows += [engine.model(ids[at : at + step], cache) for at in range(split, len(ids), step)]
            assert (torch.cat(rows) - whole).abs().max() < SUMS, (split, step)


@pytest.mark.parametrize(
    ("name", "changes", "prompt"),
    [
        pytest.param("chatglm-6b", V1, [*TEXT, GMASK, SOP], id="6b"),
        pytest.param("chatglm3-6b", {"padded_vocab_size": 300}, TEXT, id="3"),
        pytest.param("cpm-gpt2", {"vocab_size": 300}, TEXT, id="gpt2"),
        pytest.param("llama", {}, TEXT, id="llama"),
    ],
)
@pytest.mark.parametrize("shifts", [False, True], ids=["in place", "taking positions"])
def test_it_does_so_behind_a_prefix_that_was_attached(
    name: str,
    changes: dict[str, Any],
    prompt: list[int],
    shifts: bool,
    tmp_path: Path,
    random_checkpoints: ModuleType,
    builders: ModuleType,
) -> None:
    if name == "llama":
        engine = Engine.load(builders.write_folder(tmp_path), dtype="float32", threads=1)
    else:
        engine = load(tmp_path, random_checkpoints, name, changes)
    spec, model = engine.spec, cast(PrefixedModel, engine.model)
    bare = engine.logits(prompt)
    noise = torch.Generator().manual_seed(1)
    rows = torch.randn(spec.layers, 2, spec.kv_heads, 5, spec.head_dim, generator=noise)
    model.set_prefix(rows, shifts=shifts and name in ("cpm-gpt2", "llama"))  # ChatGLM's own never do
    assert (engine.logits(prompt) - bare).abs().max() > 1e-2
    every_split(engine, prompt)


def first_generation(folder: Path, random_checkpoints: ModuleType) -> Engine:
    return load(folder, random_checkpoints, "chatglm-6b-early", FIRST)


def test_the_first_generation_with_mask_is_no_exception(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    engine = first_generation(tmp_path, random_checkpoints)
    ids = torch.tensor([11, 150000, 12, 13, 150004, *AFTER])
    whole = engine.logits(ids.tolist())
    for split in range(5, len(ids)):
        with torch.inference_mode():
            cache = engine.model.new_cache(len(ids), torch.float32)
            rows = [engine.model(ids[:split], cache)]
            rows += [engine.model(ids[at : at + 1], cache) for at in range(split, len(ids))]
        assert (torch.cat(rows) - whole).abs().max() < SUMS, split


def test_the_first_generation_with_gmask_freezes_its_position_only_while_it_decodes(
    tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    spec = first_generation(tmp_path, random_checkpoints).spec
    layout = chatglm.read_layout(torch.tensor([11, 150001, 150004, 12]), spec)
    assert layout.positions(0, 4).tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert layout.positions(4, 1).tolist() == [[1], [3]]


def test_a_gmask_in_the_config_of_the_old_vocabulary_means_later_code(random_checkpoints: ModuleType) -> None:
    """A fine-tuned 150528-row checkpoint whose config.json names the ids was made with the later positions."""
    config = random_checkpoints.tiny("chatglm-6b-early", mask_token_id=150000, gmask_token_id=150001)
    layout = chatglm.read_layout(torch.tensor([11, 150001, 150004, 12]), parse(config))
    assert layout.positions(0, 4).tolist() == [[0, 1, 1, 1], [0, 0, 1, 2]]


class Halt(Exception):
    pass


@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm3-6b", "cpm-gpt2"])
def test_a_stop_between_layers_leaves_the_cache_as_it_was(
    name: str, tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    changes = {"chatglm-6b": V1, "chatglm3-6b": {"padded_vocab_size": 300}, "cpm-gpt2": {"vocab_size": 300}}[name]
    engine = load(tmp_path, random_checkpoints, name, changes)
    prompt = torch.tensor([*TEXT, GMASK, SOP])
    calls = 0

    def halt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise Halt

    with torch.inference_mode():
        cache = engine.model.new_cache(32, torch.float32)
        expected = engine.model(prompt, cache, last_only=True)
        length = cache.length
        with pytest.raises(Halt):
            engine.model(torch.tensor([21]), cache, between_layers=halt)
        assert cache.length == length
        cache = engine.model.new_cache(32, torch.float32)
        calls = 0
        with pytest.raises(Halt):
            engine.model(prompt, cache, between_layers=halt)
        assert cache.length == 0
        again = engine.model(prompt, cache, last_only=True)
    assert torch.equal(expected, again)
    assert again.shape == (1, 300)


@pytest.mark.parametrize("quant", [None, 4, 8])
@pytest.mark.parametrize("name", ["chatglm-6b", "chatglm-6b-prefix", "chatglm2-6b", "cpm-gpt2"])
def test_loading_chooses_threads_and_precision_by_itself(
    name: str, quant: int | None, tmp_path: Path, random_checkpoints: ModuleType
) -> None:
    """As a person loads it: nothing is given, so the engine measures decoding steps before there is any prompt."""
    wide = {"hidden_size": 64, "inner_hidden_size": 128, "num_layers": 3, "num_attention_heads": 2}
    changes: dict[str, Any] = {
        "chatglm-6b": V1 | wide,
        "chatglm-6b-prefix": V1 | wide | {"pre_seq_len": 4},
        "chatglm2-6b": {"padded_vocab_size": 300, "hidden_size": 64},
        "cpm-gpt2": {"vocab_size": 300, "n_embd": 64},
    }[name]
    folder = tmp_path / "model"
    config = random_checkpoints.tiny(name.removesuffix("-prefix"), **changes)
    random_checkpoints.write_checkpoint(folder, config)
    engine = Engine.load(folder, quant=quant)
    said = list(engine.generate([*TEXT, GMASK, SOP], Sampling(temperature=0, max_tokens=3, ignore_eos=True)))
    assert len(said) == 3
    exact = Engine.load(folder, quant=quant, dtype="float32", threads=1).logits([*TEXT, GMASK, SOP])
    assert (engine.logits([*TEXT, GMASK, SOP]) - exact).norm() < 0.05 * exact.norm()


def test_a_grown_prompt_of_chatglm_6b_is_read_afresh(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    engine = load(tmp_path, random_checkpoints, "chatglm-6b", V1)
    greedy = Sampling(temperature=0, max_tokens=6, ignore_eos=True)
    first = [*TEXT, GMASK, SOP]
    grown = [*TEXT, *list(engine.generate(first, greedy)), 31, GMASK, SOP]
    warm = list(engine.generate(grown, greedy))
    fresh = list(Engine.load(tmp_path, dtype="float32", threads=1).generate(grown, greedy))
    assert warm == fresh


class LargestResult(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest tensor that an operator made, views of the cache left out."""

    def __init__(self, cache: KVCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = 0
        self._cached = {t.untyped_storage().data_ptr() for t in (*cache.keys, *cache.values)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in self._cached:
            self.values = max(self.values, result.numel())
        return result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_new_token_never_expands_the_keys(dtype: str, tmp_path: Path, random_checkpoints: ModuleType) -> None:
    """Two key heads serve four query heads; a long cache is read where it lies, in every step."""
    engine = load(tmp_path, random_checkpoints, "chatglm3-6b", {"padded_vocab_size": 300})
    engine = Engine.load(tmp_path, dtype=dtype, threads=1)
    length, spec = 4096, engine.spec
    with torch.inference_mode():
        cache = engine.model.new_cache(length + 1, engine.dtype)
        cache.advance(length)
        with LargestResult(cache) as made:
            engine.model(torch.tensor([21]), cache)
    assert made.values < spec.kv_heads * length * spec.head_dim  # not even one layer's keys were copied


def test_a_prompt_without_its_mask_or_sop_is_refused(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    from glmchat.core.errors import Usage

    engine = load(tmp_path, random_checkpoints, "chatglm-6b", V1)
    for ids in ([11, 12], [11, GMASK], [11, SOP]):
        with pytest.raises(Usage, match="needs \\[gMASK\\]"):
            engine.logits(ids)


def test_gpt2_past_its_last_position_is_refused(tmp_path: Path, random_checkpoints: ModuleType) -> None:
    from glmchat.core.errors import DoesNotFit

    engine = load(tmp_path, random_checkpoints, "cpm-gpt2", {"vocab_size": 300})
    with pytest.raises(DoesNotFit, match="128"):
        engine.logits(list(range(129)))
