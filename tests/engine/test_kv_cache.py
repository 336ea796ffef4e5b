"""Keys and values of 8 bits: what is kept of them, what attention makes of it, what they take, and who refuses them.

Covers engine/kv_cache.py, engine/native/attention.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glmchat.core.errors import Usage
from glmchat.engine import Engine, Sampling
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models.layers import attend
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.native.attention import attend_stored, from_int8, to_int8

IDS = [(7 * i) % 250 + 4 for i in range(9)]


def rounded(rows: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 equally spaced numbers, the outermost of which is the largest of its row."""
    steps = rows.abs().amax(-1, keepdim=True) / 127
    return torch.where(steps > 0, (rows / steps).round() * steps, 0.0)


class Rounding(KVCache):
    """A float32 cache that keeps what one of 8 bits could."""

    def put(self, layer: int, start: int, key: torch.Tensor, value: torch.Tensor) -> None:
        super().put(layer, start, rounded(key), rounded(value))


@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=16, max_size=16))
def test_a_row_is_kept_to_half_of_the_127th_part_of_its_largest_number(numbers: list[float]) -> None:
    rows = torch.tensor([numbers])
    kept = from_int8(to_int8(rows))
    largest = float(rows.abs().max())
    assert float((kept - rows).abs().max()) <= largest / 253 + 1e-30
    assert torch.equal(from_int8(to_int8(kept)), kept) or largest < 1e-27
    assert abs(float(kept.abs().max()) - largest) <= 1e-6 * largest + 1e-30


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_holds_no_number_does_not_become_one(wrong: float) -> None:
    rows = torch.randn(1, 3, 32)
    rows[0, 1, 5] = wrong
    kept = from_int8(to_int8(rows))
    assert kept[0, [0, 2]].isfinite().all()
    assert not kept[0, 1, 5].isfinite()


def names() -> list[str]:
    return ["llama", "qwen2", "qwen3", "chatglm", "chatglm2", "glm4", "gpt2"]


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("name", names())
def test_every_family_attends_in_torch_to_what_the_cache_gives_back(
    name: str, prefix: bool, step_checks: ModuleType
) -> None:
    with torch.inference_mode():
        model = step_checks.random_model(step_checks.CONFIGS[name], 0)
        spec = model.spec
        if prefix:
            assert isinstance(model, PrefixedModel)
            noise = torch.Generator().manual_seed(5)
            model.set_prefix(torch.randn(spec.layers, 2, spec.kv_heads, 5, spec.head_dim, generator=noise) * 0.3)
        found = model.new_cache(48, torch.int8)
        wanted = Rounding(spec.layers, spec.kv_heads, spec.head_dim, 48 + found.length, torch.float32)
        if prefix:
            for layer, rows in enumerate(model.prefix_key_values):
                wanted.put(layer, 0, rows[0], rows[1])
        wanted.prefix = wanted.length = found.length
        assert sorted(step_checks.CONFIGS) == sorted(names())
        for some in (list(step_checks.PROMPT), [9], [44], [7]):
            rows = [model(torch.tensor(some), cache, last_only=True)[-1] for cache in (found, wanted)]
            # A last bit before keys and values are rounded may move one of them by a 127th.
            assert float((rows[0] - rows[1]).abs().max() / rows[1].abs().max()) < 1e-3
        assert not torch.equal(rows[0], model(torch.tensor([*step_checks.PROMPT, 9, 44, 7]))[-1])


def test_a_cache_of_8_bits_takes_about_a_quarter_and_so_the_memory_that_is_told(
    step_checks: ModuleType,
) -> None:
    for config in step_checks.CONFIGS.values():
        model = step_checks.random_model(config, 0)
        wide, narrow = (model.new_cache(48, dtype).nbytes for dtype in (torch.float32, torch.int8))
        assert model.spec.cache_bytes(48, 4, "int8") == model.spec.cache_bytes(48, 2, "int8") == narrow
        assert narrow / wide == pytest.approx((model.spec.head_dim + 4) / (4 * model.spec.head_dim))
        assert model.spec.cache_bytes(48, 4, "bfloat16") == model.new_cache(48, torch.bfloat16).nbytes


def test_it_is_refused_on_other_devices_and_where_transformers_keeps_the_cache(
    tmp_path: Path, builders: ModuleType
) -> None:
    folder = builders.write_folder(tmp_path)
    engine = Engine.load(folder, threads=1, cache_type="int8")
    assert engine.facts()["cache_type"] == "int8" and "cache_type" not in Engine.load(folder, threads=1).facts()
    list(engine.generate(IDS, Sampling(max_tokens=3)))
    assert engine.memory()["cache"] == engine.spec.cache_bytes(engine.context, 4, "int8")
    with pytest.raises(Usage) as refused:
        Engine.load(folder, threads=1, cache_type="int8", device="meta")
    assert refused.value.code == "cache_type.device"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "granite"}))
    with pytest.raises(Usage) as refused:
        Engine.load(folder, threads=1, cache_type="bfloat16")
    assert refused.value.code == "cache_type.family" and "--cache-type" in refused.value.hint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(4, 4, 64, 1), (32, 2, 128, 300), (9, 3, 64, 129), (40, 1, 256, 128), (6, 2, 20, 40)]
)
def test_one_row_is_attended_to_as_stored_and_says_what_torch_says_of_the_numbers(
    shape: tuple[int, int, int, int], dtype: torch.dtype, instructions: str
) -> None:
    """Heads of 20 numbers are none that C knows: torch widens them."""
    heads, kv_heads, width, length = shape
    noise = torch.Generator().manual_seed(length)
    for stored in (torch.int8, torch.bfloat16, torch.float32):
        cache = KVCache(1, kv_heads, width, length + 7, stored)
        cache.put(0, 0, *(torch.randn(kv_heads, length, width, generator=noise) for _ in range(2)))
        cache.length = length - 1
        query = torch.randn(1, heads, width, generator=noise).to(dtype)
        new = torch.randn(kv_heads, 1, width, generator=noise)
        rows = cache.append(0, new, new)
        wide = [(from_int8(one) if stored == torch.int8 else one).double() for one in rows]
        weights = (query[0].double().view(kv_heads, -1, width) @ wide[0].transpose(1, 2) * width**-0.5).softmax(-1)
        wanted = (weights @ wide[1]).reshape(1, -1)
        found = attend(query, *rows, None)
        assert found.dtype == dtype and found.shape == wanted.shape
        assert float((found.double() - wanted).abs().max()) < (1e-5 if dtype == torch.float32 else 0.02)
        if dtype == torch.float32 and stored != dtype and width != 20:  # it is C that has said so
            assert torch.equal(found, cast(torch.Tensor, attend_stored(query, *rows)))
            threads = torch.get_num_threads()
            torch.set_num_threads(3)
            assert torch.equal(found, attend(query, *rows, None))
            torch.set_num_threads(threads)
