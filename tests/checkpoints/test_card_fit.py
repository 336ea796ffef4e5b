"""What is counted for a card and what for the machine beside it, on machines that exist on paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pretend_machine import GB, become, card
from tiny_checkpoints import NAMES, build

from glmchat.checkpoints import card_fit, fit
from glmchat.checkpoints.card_fit import card_memory, card_need, check, demand, device_plan, host_memory
from glmchat.core.errors import DoesNotFit, Usage
from glmchat.engine.families import identify
from glmchat.engine.loading import load_model


@pytest.fixture
def chatglm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The measures of ChatGLM-6B, 12.3 GB in 16 bits, without its weights: a sparse file of their size."""
    config = {"model_type": "chatglm", "num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32,
              "vocab_size": 130528, "bos_token_id": 130004,
              "inner_hidden_size": 16384, "max_sequence_length": 2048, "torch_dtype": "float16"}  # fmt: skip
    folder = tmp_path / "chatglm-6b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with (folder / "pytorch_model.bin").open("wb") as file:
        file.truncate(12_346_621_952)
    monkeypatch.setattr(fit, "has_bf16", lambda: True)
    monkeypatch.setattr(fit, "check_folder", lambda folder: None)  # whose vocabulary would be asked for too
    return folder


def with_memory(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    for module in (fit, card_fit):
        monkeypatch.setattr(module, "available_memory", lambda: int(free * GB))


def test_a_small_card_beside_much_memory_is_passed_over_and_refused_by_name_with_what_fits(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("RTX 3070", total=8, free=7.5))
    with_memory(monkeypatch, 64)
    plan = check("chatglm-6b", chatglm, device="auto")
    assert plan.name == "cpu" and "RTX 3070" in plan.reason and "7.5 GB free" in plan.reason
    with pytest.raises(DoesNotFit, match=r"chatglm-6b needs 1\d\.\d GB on a card, but cuda:0 \(RTX 3070\)") as refused:
        check("chatglm-6b", chatglm, device="cuda")
    assert refused.value.exit == 4 and "--quant 4" in refused.value.hint
    assert check("chatglm-6b", chatglm, 4, device="auto").name == "cuda:0"


def test_a_type_of_cache_that_a_card_has_not_is_refused_before_anything_is_loaded(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("NVIDIA H100", (9, 0), total=80))
    with_memory(monkeypatch, 64)
    for device in ("auto", "cuda"):
        with pytest.raises(Usage) as refused:
            check("chatglm-6b", chatglm, device=device, cache_type="int8")
        assert refused.value.code == "cache_type.device" and "--device cpu" in refused.value.hint
    assert check("chatglm-6b", chatglm, device="cpu", cache_type="int8").name == "cpu"


def test_a_large_card_beside_little_memory_takes_it(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("NVIDIA H100", (9, 0), total=80))
    with_memory(monkeypatch, 10)
    assert check("chatglm-6b", chatglm, device="auto").name == "cuda:0"
    with pytest.raises(DoesNotFit, match=r"needs 1\d\.\d GB, but only 10\.0 GB"):
        check("chatglm-6b", chatglm, device="cpu")
    with_memory(monkeypatch, 1)
    with pytest.raises(DoesNotFit, match=r"but only 1\.0 GB are free"):
        check("chatglm-6b", chatglm, device="auto")


def test_where_neither_card_nor_memory_has_room_the_nearest_thing_that_fits_is_named(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(total=4))
    with_memory(monkeypatch, 6)
    with pytest.raises(DoesNotFit) as refused:
        check("chatglm-6b", chatglm, device="auto")
    assert "--quant 4" in refused.value.hint


def test_two_cards_share_it_where_neither_is_large_enough(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(total=12, free=11), card(total=12, free=8, number=1))
    with_memory(monkeypatch, 8)
    plan = check("chatglm-6b", chatglm, device="auto")
    assert plan.devices == ("cuda:0", "cuda:1") and sum(plan.layers) == 28 and plan.layers[0] > plan.layers[1]


def test_a_refusal_of_a_device_comes_before_anything_is_loaded(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(), driver="550.54.15", cuda=12040)
    with_memory(monkeypatch, 64)
    with pytest.raises(Usage, match="550"):
        check("chatglm-6b", chatglm, device="cuda:0")
    assert "550" in check("chatglm-6b", chatglm, device="auto").reason


@pytest.mark.parametrize("name", [name for name in NAMES if name != "fallback"])
def test_the_weights_on_a_card_are_as_many_bytes_as_the_loaded_model_holds(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name)
    memory = card_memory(folder)
    assert memory is not None
    model = load_model(identify(folder), dtype=torch.bfloat16)
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    assert memory.weights == pytest.approx(sum(tensors.values()), rel=0.03)


@pytest.mark.parametrize("name", ["chatglm", "chatglm3", "llama", "gpt2"])
def test_what_layers_take_adds_up_to_what_one_card_takes(name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path / name)
    memory, need = card_memory(folder, context=64), card_need(folder, context=64)
    assert memory is not None and need is not None
    assert 0 <= memory.total - need.total <= need.layers  # what the division leaves


def test_what_only_transformers_knows_is_not_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build("fallback", tmp_path / "fallback")
    need = card_need(folder)
    assert need is not None and need.layers == 1
    become(monkeypatch, tmp_path, card(), card(number=1))
    assert len(device_plan("cuda:0,cuda:1", folder).devices) == 1


def test_the_table_has_the_freest_card_first_and_then_the_processor(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(free=5), card(free=9, number=1))
    with_memory(monkeypatch, 64)
    rows = card_fit.fit_table(chatglm)
    assert {row.device for row in rows} == {"cuda:1", "cpu"} and rows[0].device == "cuda:1"
    fitting = {(row.device, row.quant): row.fits for row in rows}
    assert fitting["cuda:1", "float16"] is False and fitting["cuda:1", "int4"] and fitting["cpu", "float16"]
    become(monkeypatch, tmp_path)
    assert {row.device for row in card_fit.fit_table(chatglm)} == {"cpu"}


def test_what_several_engines_need_is_asked_of_the_place_where_each_would_be(
    chatglm: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("A", total=24, free=20))
    with_memory(monkeypatch, 64)
    device, needed, free = demand(chatglm, None, None, None, "auto")
    assert device == "cuda:0" and free == 20 * GB and needed is not None and 12 * GB < needed < 16 * GB
    device, needed, free = demand(chatglm, None, None, None, "cpu")
    assert device == "cpu" and free == 64 * GB
    assert host_memory(chatglm) < 6 * GB


def test_the_card_that_counts_is_the_freest_that_torch_can_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path, card("A", (7, 0), 80), card("B", free=20, number=1))
    freest = card_fit.freest_card()
    assert freest is not None and freest.name == "B"  # A is too old for this torch
    become(monkeypatch, tmp_path)
    assert card_fit.freest_card() is None
