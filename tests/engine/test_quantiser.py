"""Checkpoints quantised on disk: what comes back, who else can read it, and what a kill or a bad file does.

Covers engine/quantize/plan.py, engine/quantize/streaming.py, engine/quantize/quantiser.py,
engine/formats/compressed.py, engine/native/cpu.py, engine/quantize/replace.py.
"""

from __future__ import annotations

import errno
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_card
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from glmchat.checkpoints.recipe import Recipe
from glmchat.core.errors import Damaged, DoesNotFit, Interrupted, Usage
from glmchat.engine import Engine
from glmchat.engine.formats.compressed import pack, pack_zero_points, unpack, unpack_zero_points
from glmchat.engine.native.cpu import NativeCpu, search_native
from glmchat.engine.quantize import int4, int8, quantiser
from glmchat.engine.quantize import plan as planning
from glmchat.engine.quantize.int4 import quantise_int4
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.plan import QuantizePlan, incomplete, plan_quantise
from glmchat.engine.quantize.quantiser import QuantizeProgress, execute, kept_copy

IDS = [1, 5, 9, 200, 33, 7]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny random Llama as transformers writes it; widths 128 and 160 have groups of 32 in common."""
    return tiny_llama(tmp_path / "tiny", tied=False)


def tiny_llama(folder: Path, *, tied: bool) -> Path:
    torch.manual_seed(1)
    folder.mkdir()
    width, inner, words = 128, 160, 320
    tensors = {"model.embed_tokens.weight": torch.randn(words, width) * 0.5, "model.norm.weight": torch.ones(width)}
    if not tied:
        tensors["lm_head.weight"] = torch.randn(words, width) * 0.1
    for layer in range(2):
        stem = f"model.layers.{layer}."
        for name, rows, columns in (
            ("self_attn.q_proj", width, width),
            ("self_attn.k_proj", width // 2, width),
            ("self_attn.v_proj", width // 2, width),
            ("self_attn.o_proj", width, width),
            ("mlp.gate_proj", inner, width),
            ("mlp.up_proj", inner, width),
            ("mlp.down_proj", width, inner),
        ):
            tensors[f"{stem}{name}.weight"] = torch.randn(rows, columns) * 0.1
        tensors[f"{stem}input_layernorm.weight"] = torch.ones(width)
        tensors[f"{stem}post_attention_layernorm.weight"] = torch.ones(width)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": words,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "auto_map": {"AutoModel": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('code of a model folder ran')")
    (folder / "LICENSE").write_text("the licence")
    return folder


def logits(folder: Path, quant: int | None = None, ids: list[int] = IDS) -> torch.Tensor:
    return Engine.load(folder, quant=quant, dtype="float32", threads=1).logits(ids)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fast", [False, True])
def test_a_quantised_folder_computes_what_quantising_in_memory_does(
    llama: Path, tmp_path: Path, bits: int, fast: bool
) -> None:
    out = execute(plan_quantise(llama, tmp_path / "q", Recipe(bits, ends=8, fast=fast)))
    found, dense = logits(out), logits(llama)
    assert (found - dense).norm() < (0.4 if bits == 4 else 0.03) * dense.norm()
    if not fast:
        assert torch.equal(found, logits(llama, quant=bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_card_finds_grids_as_good_and_the_folder_says_who_made_it(llama: Path, tmp_path: Path, bits: int) -> None:
    plans = [plan_quantise(llama, tmp_path / name, Recipe(bits, ends=8)) for name in ("here", "there")]
    here = execute(plans[0], device="cpu")
    with fake_card.record() as log:
        there = execute(plans[1], device=fake_card.NAME)
    assert [what for what, _ in log if what == "to card"], "the matrices are searched there"
    dense = Engine.load(llama, dtype="float32", threads=1).model
    models = [Engine.load(folder, dtype="float32", threads=1).model for folder in (here, there)]
    names = [name for name, module in dense.named_modules() if isinstance(module, torch.nn.Linear)]
    assert names
    for name in names:
        right = dense.get_submodule(name).weight
        errors = [
            float((model.get_submodule(name).dequantise() - right).norm())  # type: ignore[operator]
            for model in models
        ]
        assert errors[1] < 1.001 * errors[0], name
    settings = [json.loads((folder / "glmchat.json").read_text())["settings"] for folder in (here, there)]
    assert settings[1].pop("maker") == f"torch {torch.__version__} on {fake_card.NAME}"
    assert settings[0] == settings[1]


def test_a_full_card_leaves_a_matrix_to_the_processor(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = int4.search

    def full(values: torch.Tensor, **how: Any) -> Any:
        if not values.is_cpu:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return search(values, **how)

    right = execute(plan_quantise(llama, tmp_path / "here", Recipe(4)), device="cpu")
    monkeypatch.setattr(int4, "search", full)
    out = execute(plan_quantise(llama, tmp_path / "there", Recipe(4)), device=fake_card.NAME)
    files = sorted(path.name for path in right.glob("*.safetensors"))
    assert files == sorted(path.name for path in out.glob("*.safetensors"))
    for name in files:
        assert (out / name).read_bytes() == (right / name).read_bytes()


def test_the_folder_stands_on_its_own_and_says_where_it_is_from(llama: Path, tmp_path: Path) -> None:
    plan = plan_quantise(llama, tmp_path / "q", Recipe(4))
    out = execute(plan, manifest={"name": "tiny:int4", "base": "tiny", "repo": "a/tiny", "revision": "c0ffee"})
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "LICENSE", "glmchat.json", "model.safetensors.index.json"} <= names
    assert "code.py" not in names
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    manifest = json.loads((out / "glmchat.json").read_text())
    assert manifest["kind"] == "quantized"
    assert manifest["base"] == "tiny"
    assert manifest["revision"] == "c0ffee"
    assert manifest["quant"] == plan.label == "int4-g32"
    assert manifest["settings"]["bits"] == 4
    for record in manifest["files"]:
        assert (out / record["path"]).stat().st_size == record["size"]
    assert sum(p.stat().st_size for p in out.glob("*.safetensors")) <= plan.bytes_out


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False)])
def test_transformers_reads_a_quantised_llama(
    tmp_path: Path, bits: int, symmetric: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    source = tiny_llama(tmp_path / "tiny", tied=tied)
    out = execute(plan_quantise(source, tmp_path / "q", Recipe(bits, symmetric=symmetric)))
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        found = theirs(torch.tensor([IDS])).logits[0]
    ours = logits(out)
    assert (found - ours).abs().max() < 5e-3 * ours.abs().max()  # they multiply codes and scales in float16


def test_the_words_are_packed_as_compressed_tensors_packs_them() -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    for bits, columns in ((4, 96), (8, 96), (8, 30)):
        codes = torch.randint(0, 2**bits, (40, columns), dtype=torch.uint8)
        signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
        assert torch.equal(pack(codes, bits), helpers.pack_to_int32(signed, bits))
        assert torch.equal(unpack(pack(codes, bits), bits, columns), codes)
    points = torch.randint(0, 16, (37, 3), dtype=torch.uint8)
    assert torch.equal(
        pack_zero_points(points), helpers.pack_to_int32((points.int() - 8).to(torch.int8), 4, packed_dim=0)
    )
    assert torch.equal(unpack_zero_points(pack_zero_points(points), 37), points)


def test_a_gguf_is_repacked_without_losing_a_bit(starter_model: Path, tmp_path: Path) -> None:
    plan = plan_quantise(starter_model, tmp_path / "q", Recipe(4))
    out = execute(plan)
    written = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    assert abs(written - plan.bytes_out) < 10_000  # headers by another writer; the offsets are 13 MB
    before = Engine.load(starter_model, dtype="float32", threads=1)
    after = Engine.load(out, dtype="float32", threads=1)
    said = [{"role": "user", "content": "Why is the sky blue? 2024"}]
    assert before.render(said) == after.render(said)
    assert torch.equal(before.logits(before.render(said)), after.logits(before.render(said)))


@pytest.mark.parametrize(("variant", "bits", "ids"), [("v2_int4", 4, IDS), ("v1_new_int8", 8, [*IDS, 1301, 1304])])
def test_official_packed_weights_are_repacked_without_losing_a_bit(
    shared: Path, tmp_path: Path, variant: str, bits: int, ids: list[int]
) -> None:
    source = shared / "reference" / "chatglm" / variant
    out = execute(plan_quantise(source, tmp_path / "q", Recipe(bits, ends=0)))
    assert torch.equal(logits(source, ids=ids), logits(out, ids=ids))
    assert "quantization_bit" not in json.loads((out / "config.json").read_text())


def test_a_four_bit_grid_is_found_again_and_kept() -> None:
    g = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (64, 18, 32), generator=g)
    q[..., 0], q[..., 1] = 0, 15
    scale = (torch.rand(64, 18, 1, generator=g) * 0.01 + 0.001).half().float()
    low = (-torch.rand(64, 18, 1, generator=g) * 0.1).half().float()
    weight = (q * scale + low).view(64, 576)
    codes = quantise_int4(weight, 32, portable=False)
    assert (codes.stored().dequantise() - weight).abs().max() < 1e-7
    assert quantise_int4(weight, 32).offset is None, "other programs know whole zero points only"
    assert (quantise_int4(weight, 32, symmetric=True).stored().dequantise() - weight).abs().max() > 1e-4


def test_the_search_loses_less_than_rounding_to_nearest() -> None:
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(4)) * 0.02
    weight[::16, ::16] *= 6  # outliers
    for group in (32, 128):
        for symmetric in (False, True):
            errors = [
                (quantise_int4(weight, group, fast=f, symmetric=symmetric).stored().dequantise() - weight).norm()
                for f in (False, True)
            ]
            assert errors[0] < 0.99 * errors[1]
    searched, nearest = (quantise_int8(weight, fast=f).stored().dequantise() for f in (False, True))
    assert (searched - weight).norm() <= (nearest - weight).norm()


@pytest.mark.skipif(NativeCpu().unavailable() is not None, reason="the C search is not here")
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_search_in_c_and_in_torch_agree(lanes: int, dtype: torch.dtype) -> None:
    wide = torch.randn(300, 96, generator=torch.Generator().manual_seed(5)) * 0.02
    wide[7], wide[8] = 0, 0.25
    wide[9, 3], wide[10, 5], wide[11, 7] = 4, 5e-8, float("inf")
    for bits, group, whole, symmetric, fast in (
        (4, 32, True, False, True),
        (4, 96, True, False, False),
        (4, 32, False, False, False),
        (4, 96, True, True, False),
        (8, 96, True, True, False),
        (8, 72, True, True, True),  # no whole number of registers
    ):
        given = wide.view(-1, group).to(dtype)
        values = given.float()
        one = search_native(given, bits, integer_zero=whole, symmetric=symmetric, fast=fast, lanes=lanes)
        assert one is not None
        if bits == 4:
            two = int4.search_torch(values, integer_zero=whole, symmetric=symmetric, fast=fast)
        else:
            two = int8.search_torch(values, fast=fast)
        sound = torch.isfinite(values).all(1)
        assert torch.equal(one[3].isnan(), ~sound)
        assert torch.equal(two[3].isnan(), ~sound)
        ours, theirs = (codes.float() * scale[:, None] + low[:, None] for codes, scale, low, _ in (one, two))
        scale, low = one[1:3]
        # Two zero points can make the same weights, and two scales lose the same but for rounding.
        assert torch.isclose(ours[sound], theirs[sound], atol=1e-7).float().mean() > 0.98
        weights = values.abs() + values.square().mean(1, keepdim=True).sqrt() if bits == 4 else 1
        found = ((ours - values).square() * weights).sum(1)
        if bits == 4 or not fast:  # rounding to nearest at eight bits does not ask for its error
            assert torch.allclose(one[3][sound].sum(), two[3][sound].sum(), rtol=1e-3)
            assert torch.allclose(found[sound], one[3][sound], rtol=1e-3, atol=1e-9)
        assert torch.equal(scale.half().float(), scale)
        if bits == 4 and whole:
            assert torch.allclose(low / scale, (low / scale).round())


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    assert not quantise_int4(weight, 32).stored().dequantise()[3].any()
    assert not quantise_int8(weight).stored().dequantise()[3].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_no_number_is_named(llama: Path, tmp_path: Path, bad: float, name: str) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors[name].view(-1)[7] = bad
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(Damaged, match="not") as caught:
        execute(plan_quantise(llama, tmp_path / "q", Recipe(4)))
    assert name in caught.value.message
    assert not (tmp_path / "q").exists()


def test_the_shard_of_a_bad_weight_is_named(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(-1)[7] = float("nan")
    for number, part in enumerate((list(tensors)[:8], list(tensors)[8:])):
        save_file({n: tensors[n] for n in part}, llama / f"model-{number}.safetensors")
    where = {n: f"model-{int(i >= 8)}.safetensors" for i, n in enumerate(tensors)}
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(Damaged) as caught:
        execute(plan_quantise(llama, tmp_path / "q", Recipe(8)))
    assert f"{name} in {where[name]}" in caught.value.message


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Usage) as caught:
        plan_quantise(llama, tmp_path / "q", Recipe(4, 128))
    assert "160 inputs" in caught.value.message
    assert "32" in caught.value.hint
    with pytest.raises(Usage):
        Recipe(4, 48)
    with pytest.raises(Usage):
        Recipe(3)


def test_what_is_quantised_is_not_quantised_again(llama: Path, tmp_path: Path, shared: Path) -> None:
    out = execute(plan_quantise(llama, tmp_path / "q", Recipe(4)))
    with pytest.raises(Usage, match="already quantised"):
        plan_quantise(out, tmp_path / "again", Recipe(4))
    with pytest.raises(Usage, match="has 4 bits"):
        plan_quantise(shared / "reference" / "chatglm" / "v2_int4", tmp_path / "again", Recipe(8))
    with pytest.raises(Usage, match="already exists"):
        execute(plan_quantise(llama, out, Recipe(4)))


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    with pytest.raises(DoesNotFit, match="are free at"):
        plan_quantise(llama, tmp_path / "q", Recipe(4))
    assert not incomplete(tmp_path / "q").exists()


def test_the_copy_of_run_quant_is_made_once_and_used_again(llama: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    out = tmp_path / "store" / "tiny-int4"
    made = kept_copy(llama, 4, out, {"name": "tiny:int4"}, lambda stage, done: told.append((stage, done)))
    assert made == out
    assert told[0] == ("quantize", 0.0)
    assert told[-1] == ("quantize", 1.0)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    told.clear()
    assert kept_copy(llama, 4, out, {}, lambda stage, done: told.append((stage, done))) == out
    assert not told
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_a_copy_without_room_is_refused_with_the_way_that_needs_none(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning.shutil, "disk_usage", lambda path: type("Disk", (), {"free": 1000})())
    with pytest.raises(DoesNotFit, match="are free at") as caught:
        kept_copy(llama, 4, tmp_path / "store" / "tiny-int4", {}, lambda stage, done: None)
    assert "--no-keep" in caught.value.hint


def small_shards(plan: QuantizePlan) -> QuantizePlan:
    """The same plan with a weight file for every two tensors."""
    count = len(plan.tensors)
    return replace(plan, shards=tuple((n, min(n + 2, count)) for n in range(0, count, 2)))


def test_ctrl_c_while_the_disk_is_waited_for_leaves_no_half_file(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("glmchat.engine.formats.folder_writer.os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(small_shards(plan_quantise(llama, tmp_path / "q", Recipe(4))))
    assert not list(tmp_path.rglob("model-*"))  # neither half nor under its name


def test_a_run_that_is_stopped_before_its_first_whole_file_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        execute(small_shards(plan_quantise(llama, tmp_path / "q", Recipe(4))), cancelled=lambda: True)
    assert not list(tmp_path.glob("q*"))


def test_a_disk_that_fills_up_stops_with_a_word_and_the_next_run_goes_on(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_shards(plan_quantise(llama, tmp_path / "q", Recipe(4)))
    real = quantiser.SafetensorsWriter.write
    written: list[str] = []

    def write(self, name: Any, tensor: Any):  # type: ignore[no-untyped-def]
        written.append(name)
        if len(written) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, name, tensor)

    monkeypatch.setattr(quantiser.SafetensorsWriter, "write", write)
    with pytest.raises(DoesNotFit, match="disk is full"):
        execute(plan)
    monkeypatch.setattr(quantiser.SafetensorsWriter, "write", real)
    kept = {p.name: p.stat().st_mtime_ns for p in incomplete(plan.out).glob("model-*.safetensors")}
    assert len(kept) > 2
    seen: list[QuantizeProgress] = []
    out = execute(plan, on_progress=seen.append)
    assert {n: (out / n).stat().st_mtime_ns for n in kept} == kept
    assert seen[0].done > 0
    assert seen[-1].done == seen[-1].total
    whole = execute(small_shards(plan_quantise(llama, tmp_path / "other", Recipe(4))))
    assert torch.equal(logits(out), logits(whole))


def test_other_settings_do_not_go_on_with_what_a_broken_run_left(llama: Path, tmp_path: Path) -> None:
    plan = small_shards(plan_quantise(llama, tmp_path / "q", Recipe(4)))
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        execute(plan, cancelled=lambda: next(calls) > 6)
    left = set(incomplete(plan.out).glob("model-*.safetensors"))
    assert left
    out = execute(plan_quantise(llama, tmp_path / "q", Recipe(8)))
    assert json.loads((out / "glmchat.json").read_text())["quant"] == "int8"
    with safe_open(out / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert "lm_head.weight_packed" in file.keys()  # noqa: SIM118


def test_a_kill_in_the_middle_leaves_nothing_under_the_final_name_and_the_next_run_finishes(
    llama: Path, tmp_path: Path
) -> None:
    out = tmp_path / "q"
    script = (
        "import sys\nfrom pathlib import Path\nfrom dataclasses import replace\n"
        "from glmchat.engine.quantize.plan import plan_quantise\n"
        "from glmchat.engine.quantize.quantiser import execute, incomplete\n"
        "from glmchat.checkpoints.recipe import Recipe\n"
        f"plan = plan_quantise(Path({str(llama)!r}), Path({str(out)!r}), Recipe(4))\n"
        "count = len(plan.tensors)\n"
        "plan = replace(plan, shards=tuple((n, min(n + 2, count)) for n in range(0, count, 2)))\n"
        "def show(p):\n"
        "    if len(list(incomplete(plan.out).glob('model-*.safetensors'))) == 2:\n"
        "        print('two are written', flush=True)\n"
        "        sys.stdin.read()\n"
        "execute(plan, on_progress=show)\n"
    )
    command = [sys.executable, "-P", "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as child:
        assert child.stdout is not None and child.stdout.readline() == "two are written\n"
        child.send_signal(signal.SIGKILL)
    assert not out.exists()
    assert len(list(incomplete(out).glob("model-*.safetensors"))) == 2
    started = time.time()
    done = execute(small_shards(plan_quantise(llama, out, Recipe(4))))
    assert done == out
    assert not incomplete(out).exists()
    assert min(p.stat().st_mtime for p in out.glob("model-*.safetensors")) < started


def test_the_plan_says_what_it_will_do_without_doing_it(llama: Path, tmp_path: Path) -> None:
    plan = plan_quantise(llama, tmp_path / "q", Recipe(4, ends=8))
    told = plan.to_json()
    json.dumps(told)
    assert told["tensors"] == {"int8": 2, "int4-g32": 14, "as it is": 5}, "one size of groups for all"
    assert told["groups"]["model.layers.0.mlp.down_proj.weight"] == 32
    assert told["bytes_out"] < told["bytes_in"]
    assert plan.seconds > 0
    assert list(tmp_path.iterdir()) == [llama]


def test_packed_weights_without_their_description_are_refused(llama: Path, tmp_path: Path) -> None:
    out = execute(plan_quantise(llama, tmp_path / "q", Recipe(4)))
    config = json.loads((out / "config.json").read_text())
    described = config.pop("quantization_config")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(Damaged, match="does not say how"):
        logits(out)
    (llama / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
    with pytest.raises(Damaged, match="do not match"):
        logits(llama)
