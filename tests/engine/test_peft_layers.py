"""Adapters of every kind of PEFT, on a model through transformers, give PEFT's own logits, and leave no trace.

Covers checkpoints/peft_kinds.py, engine/models/transformers.py, checkpoints/families.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from safetensors.torch import load_file, save_file

from glmchat.checkpoints.peft_kinds import KINDS
from glmchat.core.errors import Damaged, GlmchatError, Usage
from glmchat.core.messages import Sampling
from glmchat.engine import Engine

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapters.write_neox(tmp_path_factory.mktemp("base") / "neox-7M")


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return Engine.load(base, threads=1, dtype="float32")


@pytest.fixture(scope="module")
def bare(engine: Engine) -> torch.Tensor:
    """Logits of the model before anything was ever attached."""
    return engine.logits(IDS)


@pytest.fixture(autouse=True)
def detached(engine: Engine, bare: torch.Tensor) -> Any:
    """Every test leaves the model as it was, bit for bit, also the one that failed to attach something."""
    yield
    engine.activate({})
    assert torch.equal(engine.logits(IDS), bare)
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_every_kind_in_the_table_has_settings_to_be_tested_with() -> None:
    assert {name.lower() for name in adapters.PEFT_SETTINGS} == set(KINDS)


@pytest.mark.parametrize("peft_type", [*adapters.PEFT_SETTINGS, *adapters.VIRTUAL_TOKENS])
def test_every_kind_gives_pefts_logits_and_detaching_gives_the_base_again(
    base: Path, engine: Engine, bare: torch.Tensor, tmp_path: Path, peft_type: str
) -> None:
    reference = adapters.peft_logits(adapters.write_kind(base, tmp_path / "one", peft_type), IDS)[-len(IDS) :]
    engine.attach(tmp_path / "one", "a.b")
    assert torch.equal(engine.logits(IDS), bare), "attached is not active"
    engine.activate({"a.b": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4
    assert differs(reference, bare) > 0.004
    engine.activate({})
    assert torch.equal(engine.logits(IDS), bare)
    engine.activate({"a.b": 1.0})
    engine.detach("a.b")
    assert torch.equal(engine.logits(IDS), bare)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}])
def test_a_lora_needs_no_peft_here_and_gives_its_logits(
    base: Path, engine: Engine, tmp_path: Path, settings: dict[str, Any]
) -> None:
    reference = adapters.peft_logits(adapters.write_kind(base, tmp_path / "one", "LORA", **settings), IDS)
    engine.attach(tmp_path / "one", "one")
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4
    engine.detach("one")


@pytest.mark.parametrize(
    ("peft_type", "linear"),
    [
        ("LOHA", "hada_w1_a"), ("LOKR", "lokr_w1"), ("ADALORA", "lora_E"), ("VERA", "vera_lambda_b"),
        ("FOURIERFT", "spectrum"), ("WAVEFT", "spectrum"), ("GRALORA", "gralora_B"), ("RANDLORA", "randlora_lambda"),
    ],
)  # fmt: skip
def test_a_weight_multiplies_what_an_additive_kind_adds(
    base: Path, engine: Engine, tmp_path: Path, peft_type: str, linear: str
) -> None:
    model = adapters.write_kind(base, tmp_path / "one", peft_type)
    for name, parameter in model.named_parameters():
        if linear in name:
            parameter.data *= 0.5
    engine.attach(tmp_path / "one", "one")
    engine.activate({"one": 0.5})
    assert differs(engine.logits(IDS), adapters.peft_logits(model, IDS)) < 1e-4
    full = adapters.write_kind(base, tmp_path / "one", peft_type)
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(full, IDS)) < 1e-4


@pytest.mark.parametrize("peft_type", sorted(k.upper() for k, kind in KINDS.items() if kind.weighed is None))
def test_a_kind_that_is_there_or_not_takes_no_weight(
    base: Path, engine: Engine, tmp_path: Path, peft_type: str
) -> None:
    adapters.write_kind(base, tmp_path / "one", peft_type)
    engine.attach(tmp_path / "one", "one")
    with pytest.raises(Usage, match=r"its weight cannot be 0\.5"):
        engine.activate({"one": 0.5})
    engine.activate({"one": 0.0})


def test_a_lora_with_trained_layers_beside_it_takes_no_weight(base: Path, engine: Engine, tmp_path: Path) -> None:
    model = adapters.write_kind(base, tmp_path / "one", "LOHA", modules_to_save=["dense"])
    engine.attach(tmp_path / "one", "one")
    with pytest.raises(Usage, match=r"its weight cannot be 0\.5"):
        engine.activate({"one": 0.5})
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(model, IDS)) < 1e-4


def test_trained_biases_of_the_base_are_the_adapters_own(base: Path, engine: Engine, tmp_path: Path) -> None:
    model = adapters.write_kind(base, tmp_path / "one", "OFT", bias="all")
    engine.attach(tmp_path / "one", "one")
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(model, IDS)) < 1e-4


@pytest.mark.parametrize("peft_type", ["LOHA", "LOKR", "IA3", "OFT", "VERA"])
def test_two_of_a_kind_are_active_at_once_as_in_peft(
    base: Path, engine: Engine, tmp_path: Path, peft_type: str
) -> None:
    model = adapters.write_kind(base, tmp_path / "one", peft_type, seed=1)
    adapters.write_kind(base, tmp_path / "two", peft_type, seed=2)
    model.load_adapter(tmp_path / "two", adapter_name="two")
    model.base_model.set_adapter(["default", "two"])
    for name in ("one", "two"):
        engine.attach(tmp_path / name, name)
    engine.activate({"two": 1.0, "one": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(model.eval(), IDS)) < 1e-4
    with_both = engine.logits(IDS)
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), with_both) > 0.01


def test_kinds_are_not_mixed_and_what_was_active_stays(base: Path, engine: Engine, tmp_path: Path) -> None:
    for peft_type in ("LOHA", "IA3"):
        adapters.write_kind(base, tmp_path / peft_type, peft_type)
        engine.attach(tmp_path / peft_type, peft_type)
    stem = "base_model.model.gpt_neox.layers.{}.attention.query_key_value"
    pairs = {stem.format(n) + ".lora_A.weight": torch.ones(4, 32) for n in (0, 1)}
    pairs |= {stem.format(n) + ".lora_B.weight": torch.ones(96, 4) for n in (0, 1)}
    adapters.write_lora(tmp_path / "lora", pairs, target_modules=["query_key_value"])
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"IA3": 1.0})
    before = engine.logits(IDS)
    with pytest.raises(Usage, match=r"different kinds cannot be active at once: IA3 \+ LoHa"):
        engine.activate({"IA3": 1.0, "LOHA": 1.0})
    with pytest.raises(Usage, match=r"cannot be active at once: LoHa \+ LoRA"):
        engine.activate({"lora": 1.0, "LOHA": 1.0})
    assert torch.equal(engine.logits(IDS), before)
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), before) > 0.01
    for name in ("lora", "IA3", "LOHA"):
        engine.detach(name)


@pytest.mark.parametrize("peft_type", ["LOHA", "PREFIX_TUNING", "P_TUNING"])
def test_decoding_and_swapping_in_the_middle_give_what_fresh_passes_give(
    base: Path, engine: Engine, tmp_path: Path, peft_type: str
) -> None:
    adapters.write_kind(base, tmp_path / "one", peft_type)
    engine.attach(tmp_path / "one", "one")
    ids = list(IDS)
    for active in ({"one": 1.0}, {}, {"one": 1.0}):
        engine.activate(active)
        said = list(engine.generate(ids, Sampling(temperature=0, max_tokens=6, ignore_eos=True)))
        for count, token in enumerate(said):
            assert int(engine.logits([*ids, *said[:count]])[-1].argmax()) == token
        ids += said
    engine.detach("one")


def test_a_prefix_and_a_loha_work_together(base: Path, engine: Engine, tmp_path: Path) -> None:
    model = adapters.write_kind(base, tmp_path / "loha", "LOHA")
    adapters.write_kind(base, tmp_path / "prefix", "PREFIX_TUNING")
    for name in ("loha", "prefix"):
        engine.attach(tmp_path / name, name)
    engine.activate({"loha": 1.0, "prefix": 1.0})
    from transformers import DynamicCache

    rows = load_file(tmp_path / "prefix" / "adapter_model.safetensors")["prompt_embeddings"].view(5, 2, 2, 4, 8)
    cache = DynamicCache()
    for layer in range(2):
        cache.update(rows[:, layer, 0].transpose(0, 1)[None], rows[:, layer, 1].transpose(0, 1)[None], layer)
    with torch.no_grad():
        reference = model(input_ids=torch.tensor([IDS]), past_key_values=cache).logits[0]
    assert differs(engine.logits(IDS), reference) < 1e-4
    for name in ("loha", "prefix"):
        engine.detach(name)


def test_bin_files_are_read_by_the_restricted_reader(base: Path, engine: Engine, tmp_path: Path) -> None:
    reference = adapters.peft_logits(adapters.write_kind(base, tmp_path / "one", "IA3", safe=False), IDS)
    assert (tmp_path / "one" / "adapter_model.bin").is_file()
    engine.attach(tmp_path / "one", "one")
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Trap()}, tmp_path / "one" / "adapter_model.bin")
    with pytest.raises(GlmchatError):
        engine.attach(tmp_path / "one", "two")
    assert not (tmp_path / "ran").exists()


def test_the_network_and_code_that_a_configuration_names_are_left_alone(
    base: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the hub was asked")

    for name in ("huggingface_hub.hf_hub_download", "huggingface_hub.file_exists", "peft.config.hf_hub_download",
                 "peft.utils.save_and_load.hf_hub_download", "peft.utils.save_and_load.file_exists"):  # fmt: skip
        monkeypatch.setattr(name, network)
    adapters.write_kind(base, tmp_path / "one", "LOHA")
    reaching = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "revision": "main"}
    change_config(tmp_path / "one", **reaching, megatron_core="evil", tokenizer_name_or_path="me/evil")
    engine.attach(tmp_path / "one", "one")
    engine.activate({"one": 1.0})


def test_a_wrong_adapter_is_refused_with_the_reason(base: Path, engine: Engine, tmp_path: Path) -> None:
    def refused(error: type[GlmchatError], words: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        adapters.write_kind(base, tmp_path / "one", "LOHA")
        change_tensors(tmp_path / "one", change)
        with pytest.raises(error, match=words):
            engine.attach(tmp_path / "one", "one")

    some = "base_model.model.gpt_neox.layers.0.attention.query_key_value.hada_w1_a"
    refused(Damaged, "lacks 1 of the 16 tensors", lambda tensors: tensors.pop(some))
    refused(Usage, "1 of the adapter's 17 tensors belong to no layer",
            lambda tensors: tensors.update({some.replace("layers.0", "layers.7"): tensors[some].clone()}))  # fmt: skip
    refused(Usage, r"hada_w1_a is \[96, 3\] in the adapter, but \[96, 4\] in this model",
            lambda tensors: tensors.update({some: tensors[some][:, :3].clone()}))  # fmt: skip
    refused(Damaged, "not finite", lambda tensors: tensors[some].__setitem__((0, 0), float("nan")))
    refused(
        Damaged,
        "does not contain the numbers of an adapter",
        lambda tensors: tensors.update({some: tensors[some].int()}),
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        pytest.param({"r": 4000}, "gives r 4000, but no tensor is that long", id="rank"),
        pytest.param({"r": -1}, "r is -1", id="negative"),
        pytest.param({"target_modules": "(a+)+b"}, "target_modules is", id="slow-pattern"),
        pytest.param({"rank_pattern": {"dense": 10**9}}, "rank_pattern is 1000000000", id="rank-of-a-layer"),
        pytest.param({"alpha": float("inf")}, "alpha is inf", id="infinite"),
        pytest.param({"target_modules": ["nothing"]}, "PEFT cannot use this LoHa", id="no-layer"),
        pytest.param({"peft_type": "IA3"}, "says IA3, and none of the 16 tensors belongs to one", id="other-kind"),
        pytest.param({"peft_type": "XLORA"}, "other models or adapters", id="mixture-of-others"),
        pytest.param({"peft_type": "BOFT"}, "runs a compiler", id="compiled"),
        pytest.param({"peft_type": "QUANTUM"}, "'QUANTUM', which glmchat does not support", id="unknown"),
    ],
)
def test_settings_that_no_adapter_has_are_refused(
    base: Path, engine: Engine, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    adapters.write_kind(base, tmp_path / "one", "LOHA")
    change_config(tmp_path / "one", **fields)
    with pytest.raises(GlmchatError, match=words):
        engine.attach(tmp_path / "one", "one")


def test_tokens_beyond_the_vocabulary_are_refused(base: Path, engine: Engine, tmp_path: Path) -> None:
    adapters.write_kind(base, tmp_path / "one", "TRAINABLE_TOKENS")
    change_config(tmp_path / "one", token_indices=[40, 272])
    with pytest.raises(Damaged, match="tokens beyond the 272"):
        engine.attach(tmp_path / "one", "one")


def test_another_base_is_refused_unless_it_is_forced(base: Path, engine: Engine, tmp_path: Path) -> None:
    adapters.write_kind(base, tmp_path / "one", "LOHA")
    change_config(tmp_path / "one", base_model_name_or_path="me/Other-7M")
    with pytest.raises(Usage, match="trained on me/Other-7M"):
        engine.attach(tmp_path / "one", "one")
    assert engine.attach(tmp_path / "one", "one", force=True).forced


def test_a_prefix_of_other_measures_is_refused(engine: Engine, tmp_path: Path) -> None:
    wide = adapters.write_neox(tmp_path / "wide", hidden_size=64)
    for peft_type in adapters.VIRTUAL_TOKENS:
        adapters.write_kind(wide, tmp_path / peft_type, peft_type)
        with pytest.raises(Usage, match="this model needs"):
            engine.attach(tmp_path / peft_type, "one")


def test_memory_counts_the_tensors_once_and_the_base_stays_where_it_is(base: Path, tmp_path: Path) -> None:
    engine = Engine.load(base, threads=1, dtype="float32")
    adapters.write_kind(base, tmp_path / "one", "LOHA")
    weights = engine.memory()["weights"]
    places = {t.data_ptr() for t in engine.model.parameters()}
    engine.attach(tmp_path / "one", "one")
    size = sum(t.nbytes for t in load_file(tmp_path / "one" / "adapter_model.safetensors").values())
    for active in ({}, {"one": 1.0}):
        engine.activate(active)
        assert engine.memory()["adapters"] == size and engine.memory()["weights"] == weights
    assert {t.data_ptr() for t in engine.model.parameters()} == places
    engine.detach("one")
    assert engine.memory()["adapters"] == 0


def test_a_pruned_adalora_is_read_with_its_ranks(base: Path, engine: Engine, tmp_path: Path) -> None:
    stem = "gpt_neox.layers.{}.{}"
    ranks = {
        stem.format(n, place) + ".lora_E": [True, n == 0, False, True]
        for n in (0, 1)
        for place in ("attention.query_key_value", "mlp.dense_h_to_4h")
    }
    model = adapters.write_kind(base, tmp_path / "one", "ADALORA")
    model.peft_config["default"].rank_pattern = {f"{name}.default": rows for name, rows in ranks.items()}
    model.save_pretrained(tmp_path / "pruned")
    change_config(tmp_path / "pruned", base_model_name_or_path=None)
    from peft import PeftModel
    from transformers import GPTNeoXForCausalLM

    plain = GPTNeoXForCausalLM.from_pretrained(base, dtype=torch.float32)
    reference = adapters.peft_logits(PeftModel.from_pretrained(plain, tmp_path / "pruned").eval(), IDS)
    engine.attach(tmp_path / "pruned", "one")
    engine.activate({"one": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4


def test_half_precision_takes_the_adapter_in_pefts_types(base: Path, tmp_path: Path) -> None:
    for peft_type in ("LOHA", "LN_TUNING", "IA3", "PREFIX_TUNING"):
        reference = adapters.peft_logits(adapters.write_kind(base, tmp_path / peft_type, peft_type), IDS)[-len(IDS) :]
        engine = Engine.load(base, threads=1, dtype="bfloat16")
        before = engine.logits(IDS)
        engine.attach(tmp_path / peft_type, "one")
        engine.activate({"one": 1.0})
        assert differs(engine.logits(IDS), reference) < 0.25 * differs(before, reference)


def test_on_quantised_weights_and_on_glmchats_own_families_the_way_out_is_named(
    base: Path, tmp_path: Path, builders: ModuleType
) -> None:
    adapters.write_kind(base, tmp_path / "one", "LOHA")
    with pytest.raises(Usage, match="these are quantised") as caught:
        Engine.load(base, threads=1, quant=8).attach(tmp_path / "one", "one")
    assert "--quant" in caught.value.hint
    adapters.write_kind(base, tmp_path / "prompt", "PROMPT_TUNING")
    packed = Engine.load(base, threads=1, quant=8)
    before = packed.logits(IDS)
    packed.attach(tmp_path / "prompt", "prompt")
    packed.activate({"prompt": 1.0})
    assert differs(packed.logits(IDS), before) > 0.01, "virtual tokens need no dense layers"
    llama = Engine.load(builders.write_folder(tmp_path / "llama"), threads=1)
    with pytest.raises(Usage, match="this is a LoHa, and glmchat computes llama models itself") as caught:
        llama.attach(tmp_path / "one", "one")
    assert "LoRA, DoRA" in caught.value.hint
