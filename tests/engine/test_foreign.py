"""Folders that other programs quantised give the logits of their dequantised matrices, or are refused by their method.

Covers engine/formats/foreign.py, checkpoints/quantised.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from foreign_forms import FORMS, GROUP, Tensors, said
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from glmchat.checkpoints import fit
from glmchat.checkpoints.fit import check_folder
from glmchat.core.errors import Damaged, Usage
from glmchat.engine import Engine
from glmchat.engine.loading import stored_bits
from glmchat.hub.installed import quant_of

IDS = [1, 40, 77, 105, 9, 200, 31, 64, 12]


def write(folder: Path, form: str, builders: ModuleType, *, tied: bool = True) -> LlamaForCausalLM:
    """A folder as the method's own program writes it. Returns transformers' model of the dequantised matrices."""
    pack, config = FORMS[form]
    builders.write_folder(folder, num_hidden_layers=1, tie_word_embeddings=tied)
    twin = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        ends = "embed" in name or "lm_head" in name
        if tensor.dim() != 2 or (ends and "MLX" not in form):  # only MLX packs the embedding too
            tensors[name] = tensor
            continue
        stored, dense = pack(tensor)
        twin.get_submodule(name.removesuffix(".weight")).weight.data = dense.float().contiguous()
        tensors |= {name.removesuffix("weight") + part: value for part, value in stored.items()}
    if tied:
        twin.tie_weights()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return twin


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_dequantised_matrices(
    form: str, tied: bool, tmp_path: Path, builders: ModuleType
) -> None:
    twin = write(tmp_path, form, builders, tied=tied)
    with torch.no_grad():
        expected = twin(torch.tensor([IDS])).logits[0]
    check_folder(tmp_path)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert engine.family == "llama"
    # The kernel keeps a group's minimum in float16.
    exact = 5e-3 if stored_bits(engine.model) else 1e-4
    assert float((engine.logits(IDS) - expected).norm() / expected.norm()) < exact
    told = fit.estimate(tmp_path, dtype="float32")
    assert told is not None and 0.95 < told.weights / engine.memory()["weights"] < 1.15
    assert quant_of(json.loads((tmp_path / "config.json").read_text())) != "none"


@pytest.mark.parametrize("form", ["GPTQ", "GPTQ in activation order", "AWQ", "NF4", "MLX"])
@pytest.mark.parametrize("said_alone", [False, True])
def test_a_packed_gpt_2_is_read_although_its_own_matrices_lie_the_other_way_round(
    form: str, said_alone: bool, tmp_path: Path
) -> None:
    pack, config = FORMS[form]
    torch.manual_seed(0)
    twin = GPT2LMHeadModel(GPT2Config(vocab_size=272, n_embd=64, n_layer=2, n_head=4, n_positions=128)).eval()
    twin.save_pretrained(tmp_path)
    stored: Tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if ".h." not in name or tensor.dim() != 2 or said_alone:  # config.json may say it of dense tensors too
            stored[name] = tensor
            continue
        parts, dense = pack(tensor.t().contiguous())  # as of a plain layer: [out, in]
        twin.get_submodule(name.removesuffix(".weight")).weight.data = dense.float().t().contiguous()
        stored |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with torch.no_grad():
        expected = twin(torch.tensor([IDS])).logits[0]
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    packed = not said_alone and form in ("GPTQ", "AWQ", "MLX")
    assert stored_bits(engine.model) == (4 if packed else None)
    found = engine.logits(IDS)
    assert float((found - expected).norm() / expected.norm()) < (5e-3 if packed else 1e-4)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        memory, dense = fit.estimate(tmp_path, dtype=dtype), width * sum(p.numel() for p in twin.parameters())
        assert memory is not None and (memory.weights < 0.5 * dense if packed else memory.weights >= dense)
    held = engine.memory()["weights"]
    assert (
        held < 2 * sum(p.numel() for p in twin.parameters())
        if packed
        else held == 4 * sum(p.numel() for p in twin.parameters())
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "aqlm": (said("aqlm"), "AQLM"),
    "three bits": (said("gptq", bits=3), "GPTQ"),
    "gemv": (said("awq", bits=4, version="gemv"), "AWQ"),
    "mlx of two bits": ({"quantization": {"group_size": 64, "bits": 2}}, "MLX"),
    "exl2": (said("exl2", bits=4.5), "ExLlamaV2"),
    "unheard of": (said("zzz"), "zzz"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_method_that_is_not_read_is_named_before_an_engine_starts(
    case: str, tmp_path: Path, builders: ModuleType
) -> None:
    fields, name = REFUSED[case]
    builders.write_folder(tmp_path, **fields, _name_or_path="someone/Original-7B")
    started = time.process_time()
    for look in (check_folder, lambda folder: Engine.load(folder)):
        with pytest.raises(Usage, match=f"quantised with {name}") as caught:
            look(tmp_path)
        assert "someone/Original-7B" in (caught.value.hint or "")
        assert time.process_time() - started < 3


def test_the_refusal_needs_no_torch(tmp_path: Path, builders: ModuleType) -> None:
    builders.write_folder(tmp_path, **said("aqlm"))
    code = (
        "import sys; from pathlib import Path; from glmchat.checkpoints.fit import check_folder\n"
        "from glmchat.core.errors import Usage\n"
        "try: check_folder(Path(sys.argv[1]))\n"
        "except Usage: print('refused', 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "False"]


def test_parts_that_do_not_belong_together_are_damage(tmp_path: Path, builders: ModuleType) -> None:
    write(tmp_path, "GPTQ", builders)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("qzeros"))
    tensors[name] = tensors[name][:, :1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Damaged, match="cannot be unpacked"):
        Engine.load(tmp_path, threads=1)


def gemma(folder: Path, form: str, builders: ModuleType) -> torch.Tensor:
    """A folder of a model that runs through transformers. Returns transformers' logits of the dequantised matrices."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=272, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, pad_token_id=0, sliding_window=4,
    )  # fmt: skip
    twin = Gemma2ForCausalLM(config).eval()
    twin.save_pretrained(folder)
    builders.tokenizer().save(str(folder / "tokenizer.json"))
    pack, fields = FORMS[form]
    tensors: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.dim() != 2 or ("embed" in name and "MLX" not in form):
            tensors[name] = tensor
            continue
        stored, dense = pack(tensor)
        twin.get_submodule(name.removesuffix(".weight")).weight.data = dense.float().contiguous()
        tensors |= {name.removesuffix("weight") + part: value for part, value in stored.items()}
    twin.tie_weights()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with torch.no_grad():
        logits: torch.Tensor = twin(torch.tensor([IDS])).logits[0]
    return logits


@pytest.mark.parametrize("form", FORMS)
def test_models_that_run_through_transformers_are_read_packed_too(
    form: str, tmp_path: Path, builders: ModuleType
) -> None:
    expected = gemma(tmp_path, form, builders)
    check_folder(tmp_path)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    packed = stored_bits(engine.model)
    dense = "NF4" in form or form in (
        "GPTQ in activation order", "GPTQ, 8 bits", "MLX, 8 bits", "HQQ, groups across rows", "HQQ, 8 bits",
    )  # fmt: skip
    assert (packed is None) is dense, "codes stay codes where they have a form here"
    assert float((engine.logits(IDS) - expected).norm() / expected.norm()) < (5e-3 if packed else 1e-4)


@pytest.mark.parametrize("order", [None, "weight", "static", "group"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_folder_of_llm_compressor_has_the_weights_that_compressed_tensors_unpacks(
    bits: int, symmetric: bool, order: str | None, tmp_path: Path, builders: ModuleType
) -> None:
    """With scales in bfloat16, as it writes them; unpacked in float32, so that nothing is rounded in between."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor as Compressor
    from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": GROUP}
    arguments = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    builders.write_folder(tmp_path, num_hidden_layers=1, torch_dtype="bfloat16")
    tensors: Tensors = {}
    right: Tensors = {}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if "_proj" not in name:
            tensors[name] = tensor
            continue
        columns = tensor.shape[1]
        shuffle = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
        there = shuffle if order == "group" else torch.arange(columns)
        groups = tensor[:, there].view(len(tensor), -1, GROUP)
        scale, point = calculate_qparams(groups.amin(-1), groups.amax(-1), arguments)
        state = {"weight": tensor[:, there], "weight_scale": scale.bfloat16(), "weight_zero_point": point}
        packed = Compressor.compress(state, scheme)
        dense = Compressor.decompress({**packed, "weight_scale": scale.bfloat16().float()}, scheme)["weight"]
        back = there.argsort()
        right[name] = dense[:, back]
        codes = unpack_from_int32(packed["weight_packed"], bits, tensor.shape)
        packed["weight_packed"] = pack_to_int32(codes[:, back].contiguous(), bits)
        if order == "group":
            packed["weight_g_idx"] = (back // GROUP).int()
        tensors |= {name.removesuffix("weight") + part: value for part, value in packed.items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "config.json"
    group = {"targets": ["Linear"], "weights": {**weights, "actorder": order, "dynamic": False, "observer": "minmax"}}
    described = {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head"], "version": "0.11.0",
    }  # fmt: skip
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": described}))
    check_folder(tmp_path)
    engine = Engine.load(tmp_path, dtype="float32", threads=1)
    assert engine.family == "llama"
    for name, dense in right.items():
        layer: Any = engine.model.get_submodule(name.removesuffix(".weight"))
        found = layer.dequantise() if hasattr(layer, "dequantise") else layer.weight
        assert torch.equal(found, dense), name
    is_packed = order != "group" and (bits == 4 or symmetric)
    assert (stored_bits(engine.model) == bits) is is_packed
