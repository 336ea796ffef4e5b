"""Prefixes and LoRAs of the ChatGLM families: the recorded P-Tuning goldens, PEFT's layers, old MergedLinear files.

Covers engine/adapters/prefix_tuning.py, engine/models/prefix.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import adapter_builders as adapters
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft import get_peft_model_state_dict as state_of
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from glmchat.core.errors import Damaged, Usage
from glmchat.core.messages import Sampling
from glmchat.engine import Engine
from glmchat.engine.quantize.linear import QuantLinear

CLOSE = 1e-4
V1_IDS = [5, 60, 33, 7, 1301, 1304]


def load(folder: Path, **settings: object) -> Engine:
    return Engine.load(folder, dtype="float32", threads=1, **settings)  # type: ignore[arg-type]


def differs(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("older_form", [False, True])
@pytest.mark.parametrize(
    ("base", "trained"),
    [("v1_new_struct", "v1_new_ptuning"), ("v1_new_struct", "v1_new_ptuning_proj"), ("v2", "v2_ptuning")],
)
def test_a_prefix_on_a_plain_base_gives_the_recorded_numbers(
    shared: Path, base: str, trained: str, older_form: bool
) -> None:
    folder = shared / "reference" / "chatglm"
    expected = load_file(folder / trained / "golden.safetensors")
    facts = json.loads((folder / trained / "golden.json").read_text())
    engine = load(folder / base)
    ids = expected["p17.input_ids"][0].tolist()
    before = engine.logits(ids)
    engine.attach(folder / trained if older_form else folder / trained / "prefix_only", "tuned")
    engine.activate({"tuned": 1.0})
    for prompt in facts["prompts"]:
        asked = expected[f"{prompt}.input_ids"][0].tolist()
        found = engine.logits(asked)[:, expected["probe_ids"]]
        assert differs(found, expected[f"{prompt}.logits_probe"]) < CLOSE, prompt
    for prompt in ("p3", "p17"):
        asked = expected[f"{prompt}.input_ids"][0].tolist()
        said = list(engine.generate(asked, Sampling(temperature=0, max_tokens=16, ignore_eos=True)))
        assert said == expected[f"{prompt}.greedy_ids"].tolist(), prompt
    engine.activate({})
    assert torch.equal(engine.logits(ids), before)


@pytest.mark.parametrize("quant", [4, 8])
def test_a_float32_prefix_stands_before_a_packed_base(shared: Path, quant: int) -> None:
    folder = shared / "reference" / "chatglm"
    engine, dense = load(folder / "v2", quant=quant), load(folder / "v2")
    dequantise_into(engine, dense)
    ids = load_file(folder / "v2_ptuning" / "golden.safetensors")["p17.input_ids"][0].tolist()
    for one in (engine, dense):
        one.attach(folder / "v2_ptuning" / "prefix_only", "tuned")
        one.activate({"tuned": 1.0})
        assert prefix_of(one).dtype == torch.float32
    assert differs(engine.logits(ids), dense.logits(ids)) < 3e-4
    said = list(engine.generate(ids, Sampling(temperature=0, max_tokens=4, ignore_eos=True)))
    assert said[0] == int(engine.logits(ids)[-1].argmax())


def prefix_of(engine: Engine) -> torch.Tensor:
    prefix = engine.model.prefix_key_values
    assert isinstance(prefix, torch.Tensor)
    return prefix


def dequantise_into(packed: Engine, dense: Engine) -> None:
    """The dense model gets the numbers that the packed one computes with."""
    for name, module in packed.model.named_modules():
        if isinstance(module, QuantLinear):
            place = dense.model.get_submodule(name.removesuffix(".linear"))
            place.get_parameter("weight").data = module.dequantise()


def test_prefixes_of_one_length_mix_and_others_say_why_not(shared: Path, tmp_path: Path) -> None:
    folder = shared / "reference" / "chatglm"
    engine = load(folder / "v1_new_struct")
    engine.attach(folder / "v1_new_ptuning" / "prefix_only", "new")
    engine.attach(folder / "v1_new_ptuning_proj" / "prefix_only", "old")
    new = torch.load(folder / "v1_new_ptuning" / "prefix_only" / "pytorch_model.bin")
    name = "transformer.prefix_encoder.embedding.weight"
    torch.save({name: new[name][:5]}, tmp_path / "pytorch_model.bin")
    engine.attach(tmp_path, "short")
    alone = []
    for one in ("new", "old"):
        engine.activate({one: 1.0})
        alone.append(prefix_of(engine))
    engine.activate({"new": 0.2, "old": 0.8})
    assert differs(prefix_of(engine), 0.2 * alone[0] + 0.8 * alone[1]) < 1e-6
    kept = engine.logits(V1_IDS)
    with pytest.raises(Usage, match="different lengths"):
        engine.activate({"new": 0.5, "short": 0.5})
    with pytest.raises(Usage, match=r"add up to 0\.5"):
        engine.activate({"new": 0.5})
    assert torch.equal(engine.logits(V1_IDS), kept)


@pytest.mark.parametrize(
    ("variant", "official", "quant"),
    [
        *((variant, None, quant) for variant in ("v1_new_struct", "v2", "v3") for quant in (None, 4)),
        ("v1_new_struct", "v1_new_int8", None),
        ("v2", "v2_int4", None),
    ],
)
def test_a_lora_on_chatglm_equals_pefts_own_layers(
    shared: Path, tmp_path: Path, variant: str, official: str | None, quant: int | None
) -> None:
    """official: a checkpoint that THUDM's code packed; PEFT's layers stand on its dequantised matrices."""
    folder = shared / "reference" / "chatglm" / variant
    config = LoraConfig(r=8, lora_alpha=32, target_modules=["query_key_value", "dense_4h_to_h"])
    reference = load(folder)
    plain = reference.model
    engine = load(folder.with_name(official or variant), quant=quant)
    dequantise_into(engine, reference)
    for name, parameter in engine.model.named_parameters():
        if official is not None and name in dict(plain.named_parameters()):
            plain.get_parameter(name).data = parameter.data.float()
    inject_adapter_in_model(config, plain)
    adapters.randomise(plain, 5, 0.05)
    tensors = {f"base_model.model.{name}": value for name, value in state_of(plain).items()}
    adapters.write_lora(
        tmp_path / "lora",
        {name: value.contiguous() for name, value in tensors.items()},
        r=8, lora_alpha=32, target_modules=["query_key_value", "dense_4h_to_h"],
    )  # fmt: skip
    ids = V1_IDS if variant.startswith("v1") else [1001, 1003, 5, 60, 33, 7]
    expected = reference.logits(ids)
    before = engine.logits(ids)
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(ids), expected) < (CLOSE if quant is None else 3e-4)
    assert differs(before, expected) > 0.01
    engine.activate({})
    assert torch.equal(engine.logits(ids), before)


def test_an_old_merged_linear_changes_the_rows_that_were_trained(shared: Path, tmp_path: Path) -> None:
    """The real configuration with enable_lora [true, false, true]; blocks of rows, though heads are interleaved."""
    real = shared / "adapters" / "chatglm-adapter-configs" / "xyliu-uir-adapter_config.json"
    engine = load(shared / "reference" / "chatglm" / "v1_new_struct")
    noise = torch.Generator().manual_seed(11)
    tensors = {}
    for layer in range(28):
        stem = f"base_model.model.transformer.layers.{layer}.attention.query_key_value"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(16, 64, generator=noise) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(128, 8, 1, generator=noise) * 0.1
    adapters.write_lora(tmp_path / "lora", tensors)
    shutil.copy(real, tmp_path / "lora" / "adapter_config.json")

    other = load(shared / "reference" / "chatglm" / "v1_new_struct")
    for layer in range(28):  # what the library of that time computed: a grouped convolution, then zero padding
        stem = f"base_model.model.transformer.layers.{layer}.attention.query_key_value"
        a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
        low = torch.nn.functional.conv1d(a.T[None].transpose(1, 2), b, groups=2)[0]  # [128, 64]
        padded = torch.zeros(192, 64)
        padded[:64], padded[128:] = low[:64], low[64:]
        other.model.get_parameter(f"{stem.removeprefix('base_model.model.')}.weight").data += padded * (32 / 8)

    told = engine.attach(tmp_path / "lora", "old")
    assert told.to_json()["form"] == "merged-linear"
    engine.activate({"old": 1.0})
    assert differs(engine.logits(V1_IDS), other.logits(V1_IDS)) < CLOSE


@pytest.mark.parametrize(
    ("name", "variant", "quant"),
    [("marioyyds", "v1_new_struct", None), ("Interstellar2", "v2", None), ("Interstellar2", "v2", 8)],
)
def test_real_configurations_change_the_models_they_were_made_for(
    shared: Path, tmp_path: Path, name: str, variant: str, quant: int | None
) -> None:
    folder = shared / "reference" / "chatglm" / variant
    engine, merged = load(folder, quant=quant), load(folder)
    dequantise_into(engine, merged)
    noise = torch.Generator().manual_seed(5)
    tensors: dict[str, torch.Tensor] = {}
    for place, module in merged.model.named_modules():
        if place.endswith(".query_key_value"):
            a, b = torch.randn(8, 64, generator=noise) * 0.1, torch.randn(module.out_features, 8, generator=noise) * 0.1
            tensors |= {f"base_model.model.{place}.lora_{part}.weight": t for part, t in (("A", a), ("B", b))}
            module.weight.data += b @ a * (32 / 8)
    adapters.write_lora(tmp_path / "lora", tensors)
    real = shared / "adapters" / "chatglm-adapter-configs" / f"{name}-adapter_config.json"
    shutil.copy(real, tmp_path / "lora" / "adapter_config.json")
    ids = V1_IDS if variant.startswith("v1") else [1001, 1003, 5, 60, 33, 7]
    before = engine.logits(ids)
    engine.attach(tmp_path / "lora", "real")
    engine.activate({"real": 1.0})
    assert differs(engine.logits(ids), merged.logits(ids)) < (CLOSE if quant is None else 3e-4)
    engine.activate({})
    assert torch.equal(engine.logits(ids), before)


@pytest.mark.parametrize("name", ["marioyyds", "Interstellar2", "EDLlyc-glm4", "1350562074"])
def test_real_configurations_are_refused_on_another_model_for_what_they_are(
    shared: Path, tmp_path: Path, name: str, builders: ModuleType
) -> None:
    base = builders.write_folder(tmp_path / "base")
    noise = torch.zeros(8, 4096)
    stem = "base_model.model.transformer.layers.0.attention.query_key_value"
    adapters.write_lora(
        tmp_path / "lora", {f"{stem}.lora_A.weight": noise, f"{stem}.lora_B.weight": noise.T.contiguous()}
    )
    shutil.copy(
        shared / "adapters" / "chatglm-adapter-configs" / f"{name}-adapter_config.json",
        tmp_path / "lora" / "adapter_config.json",
    )
    with pytest.raises(Usage, match="belong to no layer of this model"):
        load(base).attach(tmp_path / "lora", "lora")


@pytest.mark.parametrize("kind", ["prefix", "projected", "prompt"])
def test_virtual_tokens_of_peft_give_pefts_logits_on_a_llama(tmp_path: Path, builders: ModuleType, kind: str) -> None:
    base = builders.write_folder(tmp_path / "base")
    if kind == "prompt":
        model = get_peft_model(adapters.theirs(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6))
    else:
        projected = kind == "projected"
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=6, prefix_projection=projected, encoder_hidden_size=32
        )
        model = get_peft_model(adapters.theirs(base), config)
    adapters.randomise(model, 3)
    model.save_pretrained(tmp_path / "virtual")
    ids = [1, 40, 77, 105, 9]
    reference = adapters.peft_logits(model.eval(), ids)[-len(ids) :]
    engine = load(base)
    before = engine.logits(ids)
    engine.attach(tmp_path / "virtual", "virtual")
    engine.activate({"virtual": 1.0})
    assert differs(engine.logits(ids), reference) < CLOSE
    said = list(engine.generate(ids, Sampling(temperature=0, max_tokens=8, ignore_eos=True)))
    for count, token in enumerate(said):
        assert int(engine.logits([*ids, *said[:count]])[-1].argmax()) == token
    engine.activate({})
    assert torch.equal(engine.logits(ids), before)


def test_a_lora_on_gpt2_takes_its_transposed_layers(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True))
    adapters.randomise(tuned, 4)
    tuned.save_pretrained(tmp_path / "lora")
    ids = [3, 9, 27, 81, 5]
    engine = load(tmp_path / "base")
    engine.attach(tmp_path / "lora", "lora")
    engine.activate({"lora": 1.0})
    assert differs(engine.logits(ids), adapters.peft_logits(tuned.eval(), ids)) < CLOSE


def test_a_prefix_of_another_length_than_its_configuration_says_is_refused(shared: Path, tmp_path: Path) -> None:
    folder = shared / "reference" / "chatglm"
    shutil.copy(folder / "v2_ptuning" / "prefix_only" / "pytorch_model.bin", tmp_path)
    (tmp_path / "config.json").write_text('{"pre_seq_len": 128}')
    with pytest.raises(Damaged, match="pre_seq_len 128, but the prefix has 8"):
        load(folder / "v2").attach(tmp_path, "tuned")


def test_prefixes_of_other_models_are_refused_by_their_measures(shared: Path, tmp_path: Path) -> None:
    folder = shared / "reference" / "chatglm"
    two, one = load(folder / "v2"), load(folder / "v1_new_struct")
    with pytest.raises(Usage, match="width 256, but the adapter has 3584"):
        two.attach(folder / "v1_new_ptuning" / "prefix_only", "tuned")
    with pytest.raises(Usage, match="width 3584, but the adapter has 256"):
        one.attach(folder / "v2_ptuning" / "prefix_only", "tuned")
    old = {"transformer.word_embeddings.weight": torch.zeros(150528, 1)}
    torch.save({**old, "transformer.prefix_encoder.embedding.weight": torch.zeros(8, 3584)}, tmp_path / "p.pt")
    with pytest.raises(Usage, match="a vocabulary of 150528, but this model has 1536"):
        one.attach(tmp_path / "p.pt", "tuned")
