"""Where a model goes: the planner on machines that exist on paper, from one card that is too old to two that share."""

from __future__ import annotations

from pathlib import Path

import pytest
from pretend_machine import GB, become, card

from glmchat.checkpoints.device_plan import CONTEXT, CardNeed, DevicePlan, plan_device, split_layers
from glmchat.core.cards import installed_torch, look
from glmchat.core.errors import DoesNotFit, Usage

SMALL = CardNeed(first=GB // 2, layer=GB // 10, layers=28, last=GB // 2, scratch=GB // 4)  # 4.55 GB
LARGE = CardNeed(first=GB, layer=GB, layers=40, last=GB, scratch=GB // 2)  # 43 GB


def plan(asked: str, need: CardNeed | None = SMALL) -> DevicePlan:
    return plan_device(asked, need, look(), installed_torch(), "tiny")


def test_auto_takes_the_card_with_most_free_memory_and_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("A", free=5), card("B", free=22.5, number=1), card("C", free=6, number=2))
    assert plan("auto") == DevicePlan(("cuda:1",), reason="B, 22.5 GB free")
    assert plan("cuda").name == "cuda:1"
    assert plan("cuda:0").name == "cuda:0"
    assert plan("cpu").name == "cpu"


def test_a_card_that_is_too_old_is_passed_over_for_one_that_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = card("Tesla V100", (7, 0), 32)
    become(monkeypatch, tmp_path, old, card("T4", (7, 5), 16, number=1))
    assert plan("auto").name == "cuda:1"
    with pytest.raises(Usage, match=r"Tesla V100 has compute capability 7\.0") as refused:
        plan("cuda:0")
    assert "cu126" in refused.value.hint
    become(monkeypatch, tmp_path, old)
    alone = plan("auto")
    assert alone.name == "cpu" and "compute capability 7.0" in alone.reason
    with pytest.raises(Usage, match="compute capability"):
        plan("cuda")


def test_a_driver_that_is_too_old_means_the_cpu_with_the_reason_and_a_refusal_where_a_card_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(), driver="535.183.01", cuda=12020)
    found = plan("auto")
    assert found.name == "cpu" and "535.183.01" in found.reason
    for asked in ("cuda", "cuda:0", "cuda:0,cuda:1"):
        with pytest.raises(Usage, match=r"535\.183\.01") as refused:
            plan(asked)
        assert "580" in refused.value.hint and "cu126" in refused.value.hint


def test_a_full_card_means_the_cpu_with_the_numbers_and_exit_4_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card(free=1.5))
    found = plan("auto")
    assert found.name == "cpu" and "4.5 GB" in found.reason and "1.5 GB free" in found.reason
    with pytest.raises(DoesNotFit, match=r"tiny needs 4\.5 GB on a card, but cuda:0") as refused:
        plan("cuda:0")
    assert refused.value.exit == 4 and refused.value.hint


def test_two_cards_share_what_is_too_large_for_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path, card(free=23.5), card(free=23.5, number=1))
    for asked in ("auto", "cuda", "cuda:0,cuda:1"):
        found = plan(asked, LARGE)
        assert found.devices == ("cuda:0", "cuda:1") and found.layers == (20, 20)
        assert [found.of_layer(layer) for layer in (0, 19, 20, 39)] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    with pytest.raises(DoesNotFit):
        plan("cuda:1", LARGE)
    become(monkeypatch, tmp_path, card(free=20), card(free=16, number=1))
    assert plan("auto", LARGE).name == "cpu"
    with pytest.raises(DoesNotFit):
        plan("cuda:0,cuda:1", LARGE)


def test_who_names_two_cards_gets_both_though_one_would_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path, card(free=20), card(free=10, number=1))
    found = plan("cuda:1,cuda:0")
    assert found.devices == ("cuda:1", "cuda:0") and sum(found.layers) == 28 and found.layers[0] < found.layers[1]
    assert "cuda:1 9, cuda:0 19" in found.reason


def test_an_instance_of_a_card_that_is_cut_up_counts_with_its_own_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, card("NVIDIA A100", (8, 0), 80, mig=[(5, 4), (40, 39)]))
    assert plan("auto").name == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-00000000-1")
    assert plan("auto").name == "cuda:0"


@pytest.mark.parametrize("visible", ["", "-1", "none", "GPU-nobody"])
def test_hidden_cards_are_not_used_and_the_reason_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, visible: str
) -> None:
    become(monkeypatch, tmp_path, card(), visible=visible)
    found = plan("auto")
    assert found.name == "cpu" and "CUDA_VISIBLE_DEVICES" in found.reason


def test_the_second_card_alone_is_the_first_that_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path, card("A"), card("B", number=1), visible="1")
    assert plan("auto") == DevicePlan(("cuda:0",), reason="B, 24.0 GB free")
    with pytest.raises(Usage, match="no device cuda:1"):
        plan("cuda:1")


def test_without_a_card_auto_is_the_cpu_and_cuda_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path)
    assert plan("auto").name == "cpu"
    with pytest.raises(Usage, match="cannot be used: no NVIDIA driver"):
        plan("cuda")


def test_a_model_of_unknown_size_goes_to_the_most_free_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    become(monkeypatch, tmp_path, card(free=2), card(free=3, number=1))
    assert plan("auto", None).name == "cuda:1"


@pytest.mark.parametrize("free", [(24, 24), (8, 24), (24, 8), (11, 12, 13), (3, 40), (40, 3), (2, 30, 2), (80, 80, 80)])
def test_a_split_fills_no_card_beyond_what_is_free_and_leaves_no_layer_out(free: tuple[int, ...]) -> None:
    need = CardNeed(first=GB, layer=GB // 2, layers=40, last=2 * GB, scratch=GB // 2)
    counts = split_layers(need, [size * GB for size in free])
    assert counts is not None and sum(counts) == 40
    holders = [index for index, count in enumerate(counts) if count]
    for index in holders:
        taken = counts[index] * need.layer + need.scratch + CONTEXT
        taken += need.first if index == holders[0] else 0
        taken += need.last if index == holders[-1] else 0
        assert taken <= free[index] * GB
    assert all(free[index] < 5 for index in set(range(len(free))) - set(holders))
