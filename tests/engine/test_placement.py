"""Where a model goes and in which type, as the engine decides it: its own torch is asked, and the driver's cards.

Covers engine/native/cards.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretend_machine import become, card, torch_sees_them
from tiny_checkpoints import build

from glmchat.checkpoints.device_plan import DevicePlan, evenly
from glmchat.core.cards import Obstacle
from glmchat.core.errors import Usage
from glmchat.engine import Engine, Sampling
from glmchat.engine.families import identify
from glmchat.engine.native import cards
from glmchat.engine.native.cards import choose_devices, device_of, half_precision, needs_wide_residual
from glmchat.engine.native.self_test import coarse_fault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build("chatglm3", tmp_path / "chatglm3")


def test_what_is_always_there_is_accepted(folder: Path) -> None:
    assert choose_devices("cpu", folder) == DevicePlan(("cpu",))
    assert choose_devices("auto", folder).name.startswith(("cpu", "cuda"))


@pytest.mark.parametrize("device", ["cuda:99", "cuda", "mps", "cuda:0,cuda:1"])
def test_a_missing_device_is_a_usage_error_with_the_way_out(
    device: str, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path)
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("mps is here")
    with pytest.raises(Usage) as refused:
        choose_devices(device, folder)
    assert device in refused.value.message and refused.value.hint and refused.value.exit == 2


def test_auto_on_a_machine_whose_torch_cannot_use_its_card_is_the_cpu_and_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch was built with CUDA")
    become(monkeypatch, tmp_path, card())
    plan = choose_devices("auto", folder)
    assert plan.name == "cpu" and "without CUDA" in plan.reason
    engine = Engine.load(folder, device="auto", dtype="float32", threads=1)
    assert engine.facts()["device"] == "cpu" and "without CUDA" in engine.facts()["device_reason"]


def test_a_card_takes_the_16_bits_of_the_checkpoint_and_an_old_one_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert half_precision({"torch_dtype": "float16"}, "cuda:0") == torch.float16
    assert half_precision({"dtype": "bfloat16"}, "cuda:0") == torch.bfloat16
    assert half_precision({}, "cuda:0") == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert half_precision({"torch_dtype": "bfloat16"}, "cuda:0") == torch.float16
    assert needs_wide_residual({"torch_dtype": "bfloat16"}, torch.float16, "cuda:0")
    assert not needs_wide_residual({"torch_dtype": "float16"}, torch.float16, "cuda:0")
    assert not needs_wide_residual({"torch_dtype": "bfloat16"}, torch.float16, "cpu")


def test_what_torch_has_code_for_is_read_from_its_own_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    codes = ["sm_75", "sm_80", "sm_90a", "sm_100f", "sm_120", "compute_120"]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: codes)
    build_of = cards.torch_build()
    assert build_of.cuda == (13, 0)
    assert build_of.architectures == ((7, 5), (8, 0), (9, 0), (10, 0), (12, 0))


@pytest.mark.parametrize("name", ["chatglm", "chatglm3", "llama", "gpt2"])
def test_every_parameter_has_a_device_and_layers_keep_together(name: str, tmp_path: Path) -> None:
    checkpoint = identify(build(name, tmp_path / name))
    spec = checkpoint.spec
    plan = evenly(("a", "b"), spec.layers)
    assert spec.layout is not None
    layout = spec.layout(spec)
    for parameter in spec.shapes():
        place = device_of(parameter, spec, plan)
        if parameter.startswith(f"{layout.stack}."):
            number = int(parameter.removeprefix(f"{layout.stack}.").split(".")[0])
            assert place == plan.of_layer(number)
    assert device_of(layout.ends[0], spec, plan) == "a"
    last = [name for name in layout.rest if name not in layout.ends and ("norm" in name or "ln_f" in name)]
    assert last and {device_of(name, spec, plan) for name in (*last, *layout.ends[1:])} == {"b"}


@pytest.mark.parametrize("visible", ["", "0", "-1", "nonsense", "GPU-nobody", None])
def test_without_a_card_a_model_answers_on_the_cpu_and_says_so_whatever_the_variable_says(
    visible: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    become(monkeypatch, tmp_path, visible=visible)
    engine = Engine.load(folder, device="auto", dtype="float32", threads=1)
    assert engine.facts()["device"] == "cpu" and engine.facts()["device_reason"] == "no NVIDIA driver responds"
    assert len(list(engine.generate([5, 9, 17], Sampling(temperature=0, max_tokens=2, ignore_eos=True)))) == 2


@pytest.fixture
def with_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cards, "compiler_obstacle", lambda: None)
    yield
    cards.start_fault.cache_clear()


def test_the_engine_plans_with_what_its_own_torch_has_code_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_a_compiler: None
) -> None:
    become(monkeypatch, tmp_path, card("A", (7, 0)), card("B", (8, 9), free=20, number=1), card("C", number=2))
    torch_sees_them(monkeypatch)
    assert choose_devices("auto", folder) == DevicePlan(("cuda:2",), reason="C, 24.0 GB free")
    assert choose_devices("cuda:1", folder).name == "cuda:1"
    with pytest.raises(Usage, match="A has compute capability"):
        choose_devices("cuda:0", folder)
    several = choose_devices("cuda:1,cuda:2", folder)
    assert several.devices == ("cuda:1", "cuda:2") and sum(several.layers) == identify(folder).spec.layers


def test_a_card_is_the_same_card_by_its_uuid_where_torch_counts_in_another_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_a_compiler: None
) -> None:
    become(monkeypatch, tmp_path, card("T4", (7, 5), 16, 12), card("H100", (9, 0), 80, 70, number=1))
    torch_sees_them(monkeypatch, fastest_first=True)
    plan = choose_devices("auto", folder)
    assert plan == DevicePlan(("cuda:0",), reason="H100, 70.0 GB free")


def test_a_cuda_that_does_not_start_is_told_in_its_own_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_a_compiler: None
) -> None:
    become(monkeypatch, tmp_path, card())
    torch_sees_them(monkeypatch, fault="CUDA unknown error - this may be due to an incorrectly set up environment")
    plan = choose_devices("auto", folder)
    assert plan.name == "cpu" and "CUDA unknown error" in plan.reason
    with pytest.raises(Usage, match="CUDA unknown error") as refused:
        choose_devices("cuda", folder)
    assert "nvidia-smi" in refused.value.hint


def test_a_machine_without_a_compiler_says_that_beside_its_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_a_compiler: None
) -> None:
    become(monkeypatch, tmp_path, card())
    torch_sees_them(monkeypatch)
    monkeypatch.setattr(cards, "compiler_obstacle", lambda: Obstacle("there is no C compiler", "install gcc"))
    plan = choose_devices("auto", folder)
    assert plan.name == "cuda:0" and plan.reason.endswith("there is no C compiler; install gcc")


def test_activations_of_8_bits_are_refused_where_nothing_has_weights_of_4(folder: Path) -> None:
    with pytest.raises(Usage) as refused:
        Engine.load(folder, products="int8", threads=1)
    assert refused.value.code in ("products.none", "products.fault") and refused.value.hint


@pytest.mark.skipif(coarse_fault() is not None, reason=f"no products of 8 bits here: {coarse_fault()}")
def test_an_answer_in_8_bits_says_so_and_is_said_again(folder: Path) -> None:
    engine = Engine.load(folder, quant=4, products="int8", threads=1)
    facts = engine.facts()
    assert facts["products"] == "int8" and "-int8" in facts["kernel"] and "step" in facts["kernel"]
    assert "products" not in Engine.load(folder, quant=4, threads=1).facts()
    said = list(engine.generate(list(range(5, 30)), Sampling(temperature=0, max_tokens=8, ignore_eos=True)))
    assert said == list(engine.generate(list(range(5, 30)), Sampling(temperature=0, max_tokens=8, ignore_eos=True)))
