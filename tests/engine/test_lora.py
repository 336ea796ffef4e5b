"""LoRA folders as PEFT writes them give PEFT's own logits, on dense and on packed bases, alone and together.

Covers engine/adapters/low_rank.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import adapter_builders as adapters
import pytest
import torch
from gguf import GGUFWriter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from glmchat.core.errors import Usage
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.quantize.linear import QuantLinear

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    return Path(builders.write_folder(tmp_path_factory.mktemp("base") / "plain"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, builders: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("base") / "untied"
    return Path(builders.write_folder(folder, tie_word_embeddings=False, attention_bias=True))


def load(folder: Path, **settings: Any) -> Engine:
    return Engine.load(folder, threads=1, dtype="float32", **settings)


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="queries-and-values"),
        pytest.param({"target_modules": "all-linear"}, id="all-linear"),
        pytest.param({"target_modules": r".*\.(up_proj|o_proj)"}, id="pattern"),
        pytest.param({"use_rslora": True, "r": 9}, id="rank-stabilised"),
        pytest.param(
            {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {r"layers.1.self_attn.q_proj": 3}}, id="patterns"
        ),
        pytest.param({"use_dora": True, "target_modules": ["q_proj", "down_proj", "gate_proj"]}, id="dora"),
        pytest.param({"target_modules": ["embed_tokens", "k_proj"]}, id="embedding"),
        pytest.param({"modules_to_save": ["norm"]}, id="saved-norm"),
        pytest.param({"modules_to_save": ["embed_tokens"]}, id="saved-embedding"),
        pytest.param({"layers_to_transform": [0, 2]}, id="some-layers"),
        pytest.param({"exclude_modules": ["model.layers.1.self_attn.q_proj"]}, id="excluded"),
    ],
)
def test_every_peft_setting_gives_pefts_logits(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    reference = adapters.peft_logits(adapters.write_peft(base, tmp_path / "lora", **settings), IDS)
    engine = load(base)
    before = engine.logits(IDS)
    engine.attach(tmp_path / "lora", "lora")
    assert torch.equal(engine.logits(IDS), before)
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4
    assert differs(reference, before) > 0.01
    engine.activate({})
    assert torch.equal(engine.logits(IDS), before)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bias": "all", "target_modules": ["q_proj", "o_proj"]}, id="all-biases"),
        pytest.param({"bias": "lora_only"}, id="own-biases"),
        pytest.param({"lora_bias": True, "target_modules": ["q_proj"]}, id="bias-of-b"),
        pytest.param({"use_dora": True}, id="dora-with-biases"),
        pytest.param({"modules_to_save": ["lm_head"]}, id="saved-head"),
        pytest.param({"target_modules": ["lm_head", "q_proj"]}, id="lora-on-head"),
    ],
)
def test_biases_and_heads_are_those_of_peft(untied: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    reference = adapters.peft_logits(adapters.write_peft(untied, tmp_path / "lora", **settings), IDS)
    engine = load(untied)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4


def test_a_trained_head_of_a_tied_model_leaves_the_embedding_alone(base: Path, tmp_path: Path) -> None:
    reference = adapters.peft_logits(adapters.write_peft(base, tmp_path / "lora", modules_to_save=["lm_head"]), IDS)
    engine = load(base)
    before = engine.logits(IDS)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4
    engine.activate({})
    assert torch.equal(engine.logits(IDS), before)
    assert engine.model.lm_head is None


def test_two_adapters_are_the_weighted_sum_that_peft_computes(base: Path, tmp_path: Path) -> None:
    adapters.write_peft(base, tmp_path / "one", seed=1)
    adapters.write_peft(base, tmp_path / "two", seed=2, target_modules=["v_proj", "up_proj"], r=3)
    reference = PeftModel.from_pretrained(adapters.theirs(base), tmp_path / "one", adapter_name="one")
    reference.load_adapter(tmp_path / "two", adapter_name="two")
    reference.base_model.set_adapter(["one", "two"])
    for name, weight in (("one", 0.5), ("two", -1.25)):
        for module in reference.modules():
            if hasattr(module, "set_scale") and name in getattr(module, "lora_A", {}):
                module.set_scale(name, weight)
    engine = load(base)
    for name in ("one", "two"):
        engine.attach(tmp_path / name, name)
    engine.activate({"one": 0.5, "two": -1.25})
    assert differs(engine.logits(IDS), adapters.peft_logits(reference.eval(), IDS)) < 1e-4


@pytest.mark.parametrize("quant", [4, 8])
@pytest.mark.parametrize("dora", [False, True])
def test_a_packed_base_gives_what_its_dequantised_matrices_give(
    base: Path, tmp_path: Path, quant: int, dora: bool
) -> None:
    adapters.write_peft(base, tmp_path / "lora", target_modules="all-linear", use_dora=dora)
    engine = load(base, quant=quant)
    plain = adapters.theirs(base)
    for name, module in engine.model.named_modules():
        if isinstance(module, QuantLinear) and not name.startswith("model.embed_tokens"):
            plain.get_submodule(name).weight.data = module.dequantise()
    plain.model.embed_tokens.weight.data = engine.model.get_submodule("model.embed_tokens")(torch.arange(272)).float()
    plain.tie_weights()
    reference = PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    before = engine.logits(IDS)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(reference, IDS)) < 2e-4
    engine.activate({})
    assert torch.equal(engine.logits(IDS), before)


def test_decoding_with_an_adapter_equals_a_fresh_forward_pass(base: Path, tmp_path: Path) -> None:
    adapters.write_peft(base, tmp_path / "lora", target_modules="all-linear")
    engine = load(base, quant=4)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    said = list(engine.generate(IDS, Sampling(temperature=0, max_tokens=12, ignore_eos=True)))
    for count, token in enumerate(said):
        assert int(engine.logits([*IDS, *said[:count]])[-1].argmax()) == token


def test_bfloat16_activations_take_float32_adapters(base: Path, tmp_path: Path) -> None:
    model = adapters.write_peft(base, tmp_path / "lora")
    engine = Engine.load(base, threads=1, dtype="bfloat16")
    engine.attach(tmp_path / "lora", "lora")
    before = engine.logits(IDS)
    engine.activate({"lora": 1.0})
    with_adapter = engine.logits(IDS)
    reference = adapters.peft_logits(model, IDS)
    assert differs(with_adapter, reference) < 0.1 * differs(before, reference)


@pytest.mark.parametrize("named", [True, False])
def test_a_raw_file_of_trained_parameters_is_a_lora(base: Path, tmp_path: Path, named: bool) -> None:
    model = adapters.write_peft(base, tmp_path / "lora", lora_alpha=32)
    reference = adapters.peft_logits(model, IDS)
    trained = {n: p for n, p in model.named_parameters() if "lora_" in n}
    if not named:
        trained = {n.replace(".default", ""): p for n, p in trained.items()}
    torch.save({n: p.detach() for n, p in trained.items()}, tmp_path / "adapter.pt")
    engine = load(base)
    told = engine.attach(tmp_path / "adapter.pt", "raw").to_json()
    assert (told["form"], told["rank"], told["alpha"], told["alpha_known"]) == ("raw", 4, 32.0, False)
    engine.activate({"raw": 1.0})
    assert differs(engine.logits(IDS), reference) < 1e-4
    engine.attach(tmp_path / "adapter.pt", "half", alpha=16)
    engine.activate({"half": 2.0})
    assert differs(engine.logits(IDS), reference) < 1e-4


def test_a_training_output_is_read_for_its_weights(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    adapters.write_peft(base, output / "checkpoint-3000")
    (output / "checkpoint-500").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (output / "checkpoint-3000" / name).write_bytes(b"not to be opened")
    (output / "checkpoint-3000" / "trainer_state.json").write_text("{")
    engine = load(base)
    engine.attach(output / "checkpoint-3000", "trained")
    with pytest.raises(Usage, match="checkpoint-500, checkpoint-3000") as caught:
        engine.attach(output, "trained")
    assert caught.value.hint.endswith("checkpoint-3000")


def test_an_unknown_neutral_field_is_no_reason_to_refuse(base: Path, tmp_path: Path) -> None:
    adapters.write_peft(base, tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "invented_in_2027": None, "megatron_core": "x"}))
    load(base).attach(tmp_path / "lora", "lora")


def test_attaching_copies_nothing_of_the_base(base: Path, tmp_path: Path) -> None:
    adapters.write_peft(base, tmp_path / "lora", target_modules="all-linear")
    engine = load(base, quant=4)
    engine.logits(IDS)
    modules = {name: id(module) for name, module in engine.model.named_modules()}
    places = {t.data_ptr() for t in (*engine.model.parameters(), *engine.model.buffers())}
    weights = engine.memory()["weights"]
    for _ in range(3):
        engine.attach(tmp_path / "lora", "lora")
        engine.activate({"lora": 1.0})
        engine.logits(IDS)
        assert engine.memory()["weights"] == weights
        assert {t.data_ptr() for t in (*engine.model.parameters(), *engine.model.buffers())} == places
        engine.detach("lora")
        engine.logits(IDS)
    assert {name: id(module) for name, module in engine.model.named_modules()} == modules
    assert engine.memory()["adapters"] == 0


@pytest.mark.parametrize("words", [280, 268])
def test_an_adapter_that_brings_all_words_is_used_on_a_base_of_any_number_of_them(
    untied: Path, tmp_path: Path, words: int
) -> None:
    """PEFT saves such an adapter with the base's own embedding beside the trained one."""
    resized = adapters.theirs(untied)
    resized.resize_token_embeddings(words)
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    resized.config._name_or_path = str(untied)
    model = get_peft_model(resized, LoraConfig(**settings))
    adapters.randomise(model, 1)
    model.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))
    names = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert any("original_module" in name for name in names)
    grown = adapters.theirs(untied)
    grown.resize_token_embeddings(words)
    grown.save_pretrained(tmp_path / "grown")
    for base in (untied, tmp_path / "grown"):
        engine = load(base)
        engine.attach(tmp_path / "lora", "lora")
        engine.activate({"lora": 1.0})
        assert differs(engine.logits(IDS), adapters.peft_logits(model.eval(), IDS)) < 1e-4


def write_gguf_lora(path: Path, folder: Path, heads: dict[str, int], alpha: float = 8.0, **fields: str) -> None:
    """A PEFT folder as llama.cpp's convert_lora_to_gguf.py writes it: rows of queries and keys in pairs, an embedding's
    A turned round."""
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for key, value in fields.items():
        writer.add_string(key.replace("_", "."), value)
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        place, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
        if not factor:
            continue
        short = GGUF_NAMES[place.rpartition(".")[2]]
        layer = f"blk.{place.split('.')[2]}." if ".layers." in place else ""
        if factor.startswith("B") and place.rpartition(".")[2] in heads:
            count = heads[place.rpartition(".")[2]]
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        kind = "a" if "A" in factor[:11] else "b"
        tensor = tensor.t() if factor.startswith("embedding_A") else tensor
        writer.add_tensor(f"{layer}{short}.weight.lora_{kind}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "up_proj": "ffn_up",
    "gate_proj": "ffn_gate", "down_proj": "ffn_down", "embed_tokens": "token_embd", "lm_head": "output",
}  # fmt: skip


@pytest.mark.parametrize("targets", ["all-linear", ["embed_tokens", "k_proj"]], ids=["layers", "embedding"])
def test_a_lora_in_gguf_gives_pefts_logits(base: Path, tmp_path: Path, targets: Any) -> None:
    model = adapters.write_peft(base, tmp_path / "lora", target_modules=targets)
    write_gguf_lora(tmp_path / "lora.gguf", tmp_path / "lora", {"q_proj": 4, "k_proj": 2})
    engine = load(base)
    engine.attach(tmp_path / "lora.gguf", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(model, IDS)) < 1e-4


def test_a_lora_in_gguf_without_alpha_is_taken_as_it_is(base: Path, tmp_path: Path) -> None:
    model = adapters.write_peft(base, tmp_path / "lora", lora_alpha=4)
    write_gguf_lora(tmp_path / "lora.gguf", tmp_path / "lora", {"q_proj": 4, "k_proj": 2}, alpha=0.0)
    engine = load(base)
    engine.attach(tmp_path / "lora.gguf", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(IDS), adapters.peft_logits(model, IDS)) < 1e-4


def test_a_lora_in_gguf_is_no_model_and_a_model_in_gguf_no_adapter(
    base: Path, tmp_path: Path, builders: ModuleType
) -> None:
    adapters.write_peft(base, tmp_path / "lora")
    write_gguf_lora(tmp_path / "lora.gguf", tmp_path / "lora", {"q_proj": 4, "k_proj": 2})
    with pytest.raises(Usage, match=r"lora\.gguf contains only an adapter") as caught:
        load(tmp_path / "lora.gguf")
    assert "run BASE --adapter" in (caught.value.hint or "")
    whole = builders.write_gguf(tmp_path / "whole.gguf")
    with pytest.raises(Usage, match=r"whole\.gguf contains a model, not an adapter"):
        load(base).attach(whole, "lora")


@pytest.mark.parametrize("rank", [80, 300])
def test_a_token_at_a_time_a_rank_above_every_side_is_what_the_whole_prompt_gives(
    base: Path, tmp_path: Path, rank: int
) -> None:
    adapters.write_peft(base, tmp_path / "lora", r=rank, lora_alpha=8, target_modules="all-linear")
    engine = load(base, quant=8)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    answer = list(engine.generate(IDS, Sampling(temperature=0, max_tokens=8, ignore_eos=True)))
    rows = engine.logits([*IDS, *answer])
    assert answer == rows[len(IDS) - 1 : -1].argmax(-1).tolist()
