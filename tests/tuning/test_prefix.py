"""Prefixes that learn: the gradients that the original code recorded, its equations step by step, and PEFT's; and what
is written is read by the original's way, by PEFT and by the engine, with the logits of what learned.

Covers tuning/methods/prefix.py, engine/models/prefix.py, tuning/forward.py, engine/models/documents.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from learning import REFERENCE, documents, learn, losses, plain, recorded_rows
from safetensors.torch import load_file
from tiny_checkpoints import build
from torch import nn
from torch.nn import functional

from glmchat.core.errors import Usage
from glmchat.engine.engine import Engine
from glmchat.engine.families import identify
from glmchat.engine.quantize.linear import QuantLinear
from glmchat.tuning.checking import Base, refuse_family
from glmchat.tuning.examples import Example
from glmchat.tuning.forward import flatten, load_base
from glmchat.tuning.methods import method_of
from glmchat.tuning.methods.base import Method
from glmchat.tuning.methods.prefix import Prefix
from glmchat.tuning.order import order_of
from glmchat.tuning.products import Packed
from glmchat.tuning.trainer import _Run

# variant -> the base that its prefix was trained on
VARIANTS = {"v1_new_ptuning": "v1_new_struct", "v1_new_ptuning_proj": "v1_new_struct", "v2_ptuning": "v2"}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("chatglm", {"method": "prefix"}),
    ("chatglm-early", {"method": "prefix", "prefix_projection": True}),
    ("chatglm2", {"method": "prefix", "prefix_projection": True}),
    ("chatglm3", {"method": "prefix"}),
    ("llama", {"method": "prefix"}),
    ("llama", {"method": "prefix", "prefix_projection": True}),
    ("llama", {"method": "prompt"}),
    ("qwen3", {"method": "prefix"}),
    ("glm4-hf", {"method": "prompt"}),
    ("gpt2", {"method": "prefix"}),
    ("gpt2", {"method": "prompt"}),
    ("gguf", {"method": "prefix"}),
]
recorded = pytest.mark.skipif(not REFERENCE.is_dir(), reason="../shared with the reference vectors is absent")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def method_for(folder: Path, **asked: Any) -> Method:
    settings = plain(prefix_length=5, **asked)
    checkpoint, model, _ = load_base(folder, settings, "cpu")
    return method_of(checkpoint, model, settings)


def gradients(method: Method, groups: list[list[Example]], by_layer: bool = False) -> tuple[float, list[torch.Tensor]]:
    total = 0.0
    for value in method.parameters.values():
        value.grad = None
    for group in groups:
        loss = method.loss(flatten(group), by_layer=by_layer)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, [value.grad.clone() for value in method.parameters.values() if value.grad is not None]


@recorded
@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_of_the_encoder_are_the_recorded_ones(variant: str, by_layer: bool) -> None:
    folder = REFERENCE / variant
    tensors, facts = load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text())
    settings = plain(method="prefix", prefix_length=8, prefix_projection="proj" in variant)
    checkpoint, model, _ = load_base(REFERENCE / VARIANTS[variant], settings, "cpu")
    method = Prefix(checkpoint, model, settings)
    method.read(folder / "prefix_only")
    flat = flatten(recorded_rows(tensors))
    loss = method.loss(flat, by_layer=by_layer) / len(flat.targets)
    assert float(loss.detach()) == pytest.approx(float(tensors["train.loss"]), abs=1e-5)
    torch.autograd.backward(loss)
    assert len(method.parameters) == (5 if "proj" in variant else 1)
    for name, value in method.parameters.items():
        assert value.grad is not None
        assert float(value.grad.norm()) == pytest.approx(facts["grad_l2_norms"][name], rel=1e-4)
        if (expected := tensors.get(f"grad.{name}")) is not None:
            torch.testing.assert_close(value.grad, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@recorded
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_written_is_what_the_original_saves_and_gives_its_logits(variant: str, tmp_path: Path) -> None:
    settings = plain(method="prefix", prefix_length=8, prefix_projection="proj" in variant)
    base = REFERENCE / VARIANTS[variant]
    checkpoint, model, _ = load_base(base, settings, "cpu")
    method = Prefix(checkpoint, model, settings)
    method.read(REFERENCE / variant / "prefix_only")
    method.write(tmp_path)
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    theirs = torch.load(REFERENCE / variant / "prefix_only" / "pytorch_model.bin", weights_only=True)
    assert {n: (t.shape, t.dtype) for n, t in saved.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    config, original = (json.loads((p / "config.json").read_text()) for p in (tmp_path, REFERENCE / variant))
    for name in ("pre_seq_len", "prefix_projection", "model_type", "architectures"):
        assert config[name] == original[name]
    # main.py: prefix_state_dict without "transformer.prefix_encoder.", into the encoder
    stripped = {name.removeprefix("transformer.prefix_encoder."): value for name, value in saved.items()}
    rows, width = theirs["transformer.prefix_encoder.embedding.weight"].shape
    encoder = nn.Module()
    encoder.embedding = nn.Embedding(rows, width)
    if settings.prefix_projection:
        out, inner = theirs["transformer.prefix_encoder.trans.2.weight"].shape
        encoder.trans = nn.Sequential(nn.Linear(width, inner), nn.Tanh(), nn.Linear(inner, out))
    assert encoder.load_state_dict(stripped) == ([], [])
    engine = Engine.load(base, dtype="float32", threads=1)
    engine.attach(tmp_path, "tuned")
    engine.activate({"tuned": 1.0})
    tensors = load_file(REFERENCE / variant / "golden.safetensors")
    logits = engine.logits(tensors["p17.input_ids"][0].tolist())
    torch.testing.assert_close(logits[:, tensors["probe_ids"]], tensors["p17.logits_probe"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "asked"), KINDS)
def test_documents_in_one_pass_are_what_each_is_alone(tmp_path: Path, family: str, asked: dict[str, Any]) -> None:
    method, data = method_for(build(family, tmp_path / "base"), **asked), documents(family, 5)
    alone, singly = gradients(method, [[each] for each in data])
    for order in (data, data[::-1]):
        for by_layer in (False, True):
            together, at_once = gradients(method, [order], by_layer)
            assert together == pytest.approx(alone, rel=1e-5)
            assert len(at_once) == len(singly) == len(method.parameters)
            for one, other in zip(singly, at_once, strict=True):
                assert float(one.norm()) > 0
                torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max() + 1))


@pytest.mark.parametrize(("family", "asked"), KINDS)
def test_the_engine_answers_with_the_folder_as_what_learned_does(
    tmp_path: Path, family: str, asked: dict[str, Any]
) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 6)
    settings = plain(steps=4, rows_per_step=3, learning_rate=2e-2, prefix_length=5, **asked)
    result, _ = learn(tmp_path / "run", folder, data, settings, evaluation=data[:2])
    assert result.change > 0 and result.probe is not None
    engine = Engine.load(folder, dtype="float32", threads=1)
    bare = engine.logits(result.probe.ids)[-1]
    engine.attach(result.adapter, "tuned")
    engine.activate({"tuned": 1.0})
    logits = engine.logits(result.probe.ids)[-1]
    torch.testing.assert_close(logits, result.probe.logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    assert not torch.allclose(logits, bare, atol=1e-3)
    told = [engine.loss(each.ids, each.labels) * sum(each.learned) for each in data[:2]]
    assert result.evaluation == pytest.approx(sum(told) / sum(sum(each.learned) for each in data[:2]), rel=1e-4)


def original_loss(weights: dict[str, torch.Tensor], config: dict[str, Any], kv: torch.Tensor, row: Example) -> Any:
    """modeling_chatglm.py of ChatGLM2: sum of the losses of one row behind a prefix kv [2 * layers, heads, p, d]."""
    heads, groups, dim = config["num_attention_heads"], config["multi_query_group_num"], config["kv_channels"]
    eps, count, before = config["layernorm_epsilon"], len(row.ids), kv.shape[2]
    angles = torch.outer(
        torch.arange(count).float(), 1.0 / 10000 ** (torch.arange(0, dim // 2, 2).float() / (dim // 2))
    )
    cos, sin = angles.cos(), angles.sin()

    def rms(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weights[name]

    def turned(x: torch.Tensor) -> torch.Tensor:  # [n, heads, d]: the pairs of the first half
        a, b = x[..., : dim // 2 : 2], x[..., 1 : dim // 2 : 2]
        c, s = cos[:, None], sin[:, None]
        return torch.cat((torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2), x[..., dim // 2 :]), -1)

    mask = torch.ones(count, before + count, dtype=torch.bool).tril(before)
    x = weights["transformer.embedding.word_embeddings.weight"][torch.tensor(row.ids)]
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        y = rms(x, at + "input_layernorm.weight")
        mixed = y @ weights[at + "self_attention.query_key_value.weight"].T
        mixed = mixed + weights[at + "self_attention.query_key_value.bias"]
        query, key, value = torch.split(mixed.view(count, -1, dim), [heads, groups, groups], 1)
        keys = torch.cat((kv[2 * layer], turned(key).transpose(0, 1)), 1).repeat_interleave(heads // groups, 0)
        values = torch.cat((kv[2 * layer + 1], value.transpose(0, 1)), 1).repeat_interleave(heads // groups, 0)
        scores = turned(query).transpose(0, 1) @ keys.transpose(1, 2) / dim**0.5
        seen = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
        x = x + seen.transpose(0, 1).reshape(count, -1) @ weights[at + "self_attention.dense.weight"].T
        y = rms(x, at + "post_attention_layernorm.weight") @ weights[at + "mlp.dense_h_to_4h.weight"].T
        gate, up = y.chunk(2, -1)
        x = x + (functional.silu(gate) * up) @ weights[at + "mlp.dense_4h_to_h.weight"].T
    logits = rms(x, "transformer.encoder.final_layernorm.weight") @ weights["transformer.output_layer.weight"].T
    return functional.cross_entropy(logits[:-1], torch.tensor(row.labels[1:]), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("projected", [False, True])
def test_twenty_steps_are_those_of_the_originals_equations_in_plain_torch(tmp_path: Path, projected: bool) -> None:
    folder, data = build("chatglm2", tmp_path / "base"), documents("chatglm2", 10)
    settings = plain(
        method="prefix", prefix_length=6, prefix_projection=projected, learning_rate=2e-2, epochs=4, rows_per_step=2
    )
    result, events = learn(tmp_path / "run", folder, data, settings)

    config = json.loads((folder / "config.json").read_text())
    _, model, _ = load_base(folder, settings, "cpu")
    weights = {name: value.detach() for name, value in model.named_parameters()}
    width = 2 * config["num_layers"] * config["kv_channels"] * config["multi_query_group_num"]
    hidden = config["hidden_size"]
    torch.manual_seed(settings.seed)
    embedding = nn.Embedding(6, width)
    trans = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
    parameters = [*embedding.parameters(), *(trans.parameters() if projected else ())]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0, eps=settings.eps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda done: 1 - done / 20)
    expected = []
    for epoch in range(1, 5):
        order = order_of(len(data), settings.seed, epoch)
        for start in range(0, len(order), 2):
            rows = [data[number] for number in order[start : start + 2]]
            prefix = trans(embedding.weight) if projected else embedding.weight
            shape = (6, 2 * config["num_layers"], config["multi_query_group_num"], config["kv_channels"])
            kv = prefix.view(*shape).permute(1, 2, 0, 3)
            loss = sum(original_loss(weights, config, kv, row) for row in rows) / sum(sum(r.learned[1:]) for r in rows)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimiser.step()
            schedule.step()
            expected.append(float(loss.detach()))
    assert len(expected) == 20
    torch.testing.assert_close(torch.tensor(losses(events)), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    saved = torch.load(result.adapter / "pytorch_model.bin", weights_only=True)
    learned = saved["transformer.prefix_encoder.embedding.weight"]
    torch.testing.assert_close(learned, embedding.weight.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "glm4-hf", "qwen3"])
@pytest.mark.parametrize(
    "asked", [{"method": "prefix"}, {"method": "prefix", "prefix_projection": True}, {"method": "prompt"}]
)
def test_pefts_own_training_has_the_same_gradients_and_reads_the_folder(
    tmp_path: Path, family: str, asked: dict[str, Any]
) -> None:
    from peft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder, row = build(family, tmp_path / "base"), documents("llama", 3)[2]
    method = method_for(folder, **asked)
    total, found = gradients(method, [[row]])

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, pad_token_id=0).eval()

    shape: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
    if asked["method"] == "prompt":
        config = PromptTuningConfig(**shape)
    else:
        config = PrefixTuningConfig(**shape, prefix_projection=asked.get("prefix_projection", False))
    theirs = get_peft_model(base(), config).eval()
    encoder = theirs.prompt_encoder["default"]
    own = [value.detach() for value in method.parameters.values()]
    assert [value.shape for value in encoder.parameters()] == [value.shape for value in own]
    with torch.no_grad():
        for value, ours in zip(encoder.parameters(), own, strict=True):
            value.copy_(ours)
    ids, labels = torch.tensor(row.ids)[None], torch.tensor(row.labels)[None]
    loss = theirs(input_ids=ids, labels=labels).loss * sum(row.learned[1:])
    torch.autograd.backward(loss)
    assert total == pytest.approx(float(loss.detach()), rel=1e-5)
    for value, ours in zip(encoder.parameters(), found, strict=True):
        torch.testing.assert_close(ours, value.grad, rtol=1e-4, atol=1e-5 * float(value.grad.abs().max() + 1))

    settings = plain(steps=3, rows_per_step=2, learning_rate=2e-2, prefix_length=5, **asked)
    result, _ = learn(tmp_path / "run", folder, documents("llama", 6), settings)
    assert result.probe is not None
    with torch.no_grad():
        read = PeftModel.from_pretrained(base(), result.adapter).eval()
        logits = read(input_ids=torch.tensor(result.probe.ids)[None]).logits[0, -1]
    torch.testing.assert_close(logits, result.probe.logits, rtol=0, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize(("family", "asked"), [KINDS[0], KINDS[2], KINDS[5], KINDS[6]])
def test_a_run_that_was_stopped_goes_on_bit_by_bit(tmp_path: Path, family: str, asked: dict[str, Any]) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 8)
    settings = plain(epochs=2, rows_per_step=2, learning_rate=2e-2, prefix_length=5, dropout=0.2, **asked)
    whole, events = learn(tmp_path / "whole", folder, data, settings)
    asked_often = iter([False, False, False, True])
    first, begun = learn(tmp_path / "parts", folder, data, settings, lambda: next(asked_often))
    second, rest = learn(tmp_path / "parts", folder, data, settings)
    assert first.stopped and first.step == 3 and second.step == whole.step == 8
    assert losses(begun) + losses(rest) == losses(events)
    for path in whole.adapter.iterdir():
        assert (second.adapter / path.name).read_bytes() == path.read_bytes() or path.suffix == ".bin"
    if (whole.adapter / "pytorch_model.bin").exists():
        one, other = (torch.load(r.adapter / "pytorch_model.bin", weights_only=True) for r in (whole, second))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["chatglm", "chatglm2", "llama"])
def test_a_packed_base_stays_packed_and_has_the_gradients_of_its_dequantised_matrices(
    tmp_path: Path, family: str, bits: int
) -> None:
    folder, data = build(family, tmp_path / "base"), documents(family, 4)
    method = method_for(folder, method="prefix", quant=bits)
    packed = [(n, m) for n, m in method.model.named_modules() if isinstance(m, Packed)]
    assert packed and all(isinstance(m.base, QuantLinear) for _, m in packed)
    total, found = gradients(method, [data])
    for name, layer in packed:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        dense.weight = nn.Parameter(layer.base.dequantise(), requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
        method.model.swap(name, dense)
    expected, theirs = gradients(method, [data])
    assert total == pytest.approx(expected, rel=1e-4)
    for ours, other in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-3 * float(other.abs().max()))


@pytest.mark.parametrize(
    ("name", "length", "expected"),
    [("chatglm-6b", 128, 29_360_128), ("chatglm-6b", 8, 1_835_008), ("chatglm2", 128, 1_835_008),
     ("chatglm3", 128, 1_835_008)],
)  # fmt: skip
def test_so_many_parameters_learn_as_the_originals_told(
    shared: Path, tmp_path: Path, name: str, length: int, expected: int
) -> None:
    shutil.copyfile(shared / "tokenizers" / name / "config.json", tmp_path / "config.json")
    checkpoint = identify(tmp_path)
    with torch.device("meta"):
        model = checkpoint.family.build(checkpoint.spec)
    learning, numbers = Prefix(checkpoint, model, plain(method="prefix", prefix_length=length)).count()
    assert learning == expected
    assert 5e9 < numbers - learning < 7e9


def test_models_without_a_place_for_a_prefix_are_refused_before_they_are_loaded(shared: Path, tmp_path: Path) -> None:
    shutil.copytree(shared / "tokenizers" / "glm4", tmp_path / "glm4")
    for family, method in (("glm4", "prefix"), ("chatglm", "prompt"), ("chatglm3", "prompt"), ("fallback", "prefix")):
        folder = tmp_path / family
        checkpoint = identify(folder if folder.exists() else build(family, folder))
        base = Base.at(checkpoint.path)
        assert base.is_native == (checkpoint.family.load is None)
        with pytest.raises(Usage, match=f"--method {method} does not know models of the family") as refused:
            refuse_family(base.family, method, is_native=base.is_native)
        assert ("--method prefix" in refused.value.hint) == (family in ("chatglm", "chatglm3"))
    refuse_family(base.family, "lora", is_native=base.is_native)


@recorded
def test_nothing_is_trained_on_top_of_a_prefix_of_the_checkpoints_own() -> None:
    with pytest.raises(Usage, match="a P-Tuning prefix of its own, and nothing on top of it"):
        method_for(REFERENCE / "v2_ptuning", method="prefix")


def test_a_row_that_is_too_long_with_the_prefix_is_named(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "base")
    context = identify(folder).spec.context
    data = documents("llama", 3, longest=24)
    settings = plain(method="prefix", prefix_length=context - 10)
    longest = max(data, key=lambda each: len(each.ids))
    with pytest.raises(Usage, match=rf"{longest.place} has {len(longest.ids)} tokens, .* of them the prefix") as raised:
        learn(tmp_path / "run", folder, data, settings)
    assert raised.value.hint == "cut rows with --max-length 10"


def test_samples_are_answered_with_what_was_learned_so_far(tmp_path: Path) -> None:
    folder, data = build("chatglm3", tmp_path / "base"), documents("chatglm3", 4)
    run = _Run(folder, data, plain(method="prefix", prefix_length=5, steps=2), tmp_path / "run", print, (), ())
    ids = torch.tensor(data[0].ids)
    with torch.no_grad():
        bare = run.model.eval()(ids)
        with run.method.in_force():
            assert not torch.allclose(run.model(ids), bare, atol=1e-3)
        assert torch.equal(run.model(ids), bare)
