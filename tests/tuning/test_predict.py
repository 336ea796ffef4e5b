"""Memory is told before the first step, and what does not fit is refused with the setting that would."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import documents, learn, pairs, plain
from tiny_checkpoints import NAMES, build

from glmchat.core.errors import DoesNotFit
from glmchat.tuning import predict
from glmchat.tuning.forward import flatten, load_base
from glmchat.tuning.methods import method_of


@pytest.mark.parametrize("family", [name for name in NAMES if name != "fallback"])
@pytest.mark.parametrize(("count", "learns"), [(1, "lora"), (5, "lora"), (3, "dpo")])
def test_what_two_short_documents_keep_tells_what_long_ones_will(
    tmp_path: Path, family: str, count: int, learns: str
) -> None:
    """Of a pair both sides are kept, and nothing of what the base says of them."""
    checkpoint, model, _ = load_base(build(family, tmp_path / "m"), plain(), "cpu")
    method = method_of(checkpoint, model, plain(rank=8, alpha=16.0, method=learns))
    start = documents(family, 1)[0].ids[:9]
    growth = predict.measure(method, start)
    data = (pairs if learns == "dpo" else documents)(family, count, longest=120)
    lengths = [length for each in data for length in each.lengths]
    held = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    real = predict._kept(method, flatten(data), held)
    assert growth.kept(lengths, by_layer=False) == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize(
    ("family", "asked"),
    [("chatglm", {"method": "prefix"}), ("chatglm2", {"method": "prefix", "prefix_projection": True}),
     ("llama", {"method": "prefix"}), ("llama", {"method": "prompt"})],
)  # fmt: skip
def test_a_prefix_is_counted_once_and_for_each_document(
    tmp_path: Path, family: str, asked: dict[str, Any], count: int
) -> None:
    settings = plain(prefix_length=100, **asked)
    checkpoint, model, _ = load_base(build(family, tmp_path / "m"), settings, "cpu")
    method = method_of(checkpoint, model, settings)
    growth = predict.measure(method, documents(family, 1)[0].ids[:9])
    data = documents(family, count, longest=120)
    own = (*model.parameters(), *model.buffers(), *method.parameters.values())
    held = {tensor.untyped_storage().data_ptr() for tensor in own}
    real = predict._kept(method, flatten(data), held)
    assert growth.kept([len(each.ids) for each in data], by_layer=False) == pytest.approx(real, rel=0.15)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing tells which pages are in memory")
def test_what_a_mapped_file_has_and_nobody_read_is_counted_to_the_page(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    file = tmp_path / "weights"
    with file.open("wb") as opened:
        opened.truncate(
            4000 * page
        )  # a hole: nothing of it is in the page cache, so nothing comes in beside what is read
    mapped = torch.from_file(str(file), shared=True, size=4000 * page, dtype=torch.uint8)
    read = torch.ones(4 * page, dtype=torch.uint8)
    assert predict.unread_bytes([read]) == 0
    assert predict.unread_bytes([mapped, mapped[: 10 * page], read]) == 4000 * page
    mapped[7 * page] = 1
    left = predict.unread_bytes([mapped])
    assert 4000 * page - left >= page and left % page == 0
    mapped.fill_(1)
    assert predict.unread_bytes([mapped, read]) == 0


def test_a_run_that_does_not_fit_names_what_would_and_that_does(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "base")
    data = documents("llama", 40, longest=120)
    settings = plain(rows_per_step=40, row_tokens=4096, epochs=1)
    _, events = learn(tmp_path / "fits", folder, data, settings)
    resident = events[0]["prediction"]["resident"]
    peak = events[0]["prediction"]["peak"]
    allowed = resident + (peak - resident) // 3
    with pytest.raises(DoesNotFit) as raised:
        learn(tmp_path / "not", folder, data, plain(rows_per_step=40, row_tokens=4096, epochs=1, memory=allowed // 2))
    assert "--quant" in raised.value.hint and not (tmp_path / "not").exists()


def test_the_way_out_is_a_length_that_fits() -> None:
    growth = predict.Growth(10_000.0, 0.0, 100, 10, 64, 300, 1000)
    allowed = predict.resident_bytes("cpu") + growth.kept([500], by_layer=True) + 2 * growth.passing([500])
    with pytest.raises(DoesNotFit) as raised:
        predict.choose(growth, [500] * 20, "auto", allowed, "cpu")
    found = re.search(r"--row-tokens (\d+)", raised.value.hint)
    assert found is not None
    fits = predict.choose(growth, [int(found[1])], "auto", allowed, "cpu")
    assert fits.peak <= allowed


def test_layers_are_computed_twice_only_where_memory_asks_for_it() -> None:
    growth = predict.Growth(1e6, 0.0, 1000, 10, 64, 300, 1000)
    worst = [1000]
    roomy, tight = 1 << 50, predict.predict(growth, worst, by_layer=True, device="cpu").peak + (32 << 20)
    assert not predict.choose(growth, worst, "auto", roomy, "cpu").by_layer
    assert predict.choose(growth, worst, "auto", tight, "cpu").by_layer
    assert predict.choose(growth, worst, "on", roomy, "cpu").by_layer
    with pytest.raises(DoesNotFit, match="learning needs") as raised:
        predict.choose(growth, worst, "off", tight, "cpu")
    assert "--checkpointing on" in raised.value.hint


def test_the_time_is_that_of_real_passes(tmp_path: Path) -> None:
    _, events = learn(
        tmp_path / "run", build("llama", tmp_path / "base"), documents("llama", 9), plain(rows_per_step=3)
    )
    plan = events[0]
    assert plan["kind"] == "plan" and plan["steps"] == 9 and plan["prediction"]["seconds"] > 0
    assert plan["prediction"]["tokens_per_second"] > 0
    assert torch.get_num_threads() == 1
