"""The card's step against the model's own forward, in Triton's interpreter: test_gpu_kernels.py starts this program.

`python -P step_checks.py FAMILY[:BITS][+lora][+prefix] ...`: tiny networks with random weights, dense or packed;
logits, candidates and what stands in the cache after each token; the list of launches is the same for every token.
FAMILY[:BITS]+chain compares a step for each layer with one for all.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import nn

from glmchat.engine.adapters.low_rank import AdaptedLinear, LowRank
from glmchat.engine.families import family_of
from glmchat.engine.gpu import step as card
from glmchat.engine.gpu import words
from glmchat.engine.gpu.choose import Choice
from glmchat.engine.gpu.step import CardStep, run_chain, spans
from glmchat.engine.gpu.words import CardWords
from glmchat.engine.models.base import LanguageModel
from glmchat.engine.models.prefix import PrefixedModel
from glmchat.engine.quantize.kernels import Shape
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

if os.environ.get("TRITON_INTERPRET"):  # there a program costs 30 ms, however many rows it computes
    card.rows_of_a_program = words.rows_of_a_program = lambda outputs: 32
    words._UNPACK_ROWS = 32

_SIZES = {"vocab_size": 200, "hidden_size": 64, "bos_token_id": 1, "eos_token_id": 2}
_GLM = {**_SIZES, "model_type": "chatglm", "num_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_SIZES, "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 96, "tie_word_embeddings": True},
    "qwen2": {**_SIZES, "model_type": "qwen2", "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 96},
    "qwen3": {**_SIZES, "model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 32},
    "chatglm": {**_GLM, "inner_hidden_size": 128, "position_encoding_2d": True},
    "chatglm2": {**_GLM, "multi_query_group_num": 2, "ffn_hidden_size": 96, "kv_channels": 32, "rmsnorm": True,
                 "multi_query_attention": True, "post_layer_norm": True, "padded_vocab_size": 200,
                 "add_qkv_bias": True},
    "glm4": {**_SIZES, "model_type": "glm4", "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 32, "partial_rotary_factor": 0.5,
             "attention_bias": True, "pad_token_id": 0},
    "gpt2": {**_SIZES, "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 64, "n_positions": 64},
}  # fmt: skip
CONFIGS["chatglm"] |= {"vocab_size": 200, "bos_token_id": 130, "eos_token_id": 131, "mask_token_id": 126,
                       "gmask_token_id": 127}  # fmt: skip
PROMPT = (3, 4, 5, 6, 7, 127, 130)  # [gMASK] and <sop> at its end, which only ChatGLM-6B minds


def random_model(config: dict[str, Any], bits: int) -> LanguageModel:
    """The network with random weights; bits 4 or 8: its matrices packed as a card holds them."""
    family, spec = family_of(config)
    model = family.build(spec)
    noise = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        parameter.copy_(torch.randn(parameter.shape, generator=noise) * 0.15 + ("norm" in name or "ln_" in name))
    for path, module in list(model.named_modules()):
        if bits and isinstance(module, nn.Linear | nn.Embedding) and "wpe" not in path:
            outputs, inputs = module.weight.shape
            shape, kernel = Shape(outputs, inputs, bits, 32), CardWords()
            codes = torch.randint(0, 1 << bits, (outputs, inputs), generator=noise)
            scale = (torch.rand(outputs, inputs // 32, generator=noise) + 0.5) * (0.04 if bits == 4 else 0.002)
            if bits == 4:
                packed = kernel.pack(shape, codes.to(torch.uint8), scale, -7.3 * scale)
            else:
                packed = kernel.pack(shape, (codes - 128).to(torch.int8), scale, None)
            layer = QuantLinear(shape, kernel, packed, getattr(module, "bias", None))
            model.swap(path, layer if isinstance(module, nn.Linear) else QuantEmbedding(layer))
    model.prepare(torch.float32, "cpu")
    return model


def adapt(model: LanguageModel) -> None:
    """Adapters on two of three matrices of the layers, of several ranks: the base in the row that one leaves out."""
    noise = torch.Generator().manual_seed(4)
    places = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantLinear) and ".linear" not in path and path.count(".") > 2
    ]
    assert places
    for number, (path, module) in enumerate(places):
        if number % 3 == 2:
            continue
        rank = (3, 8, 20)[number % 3 + number % 2]
        down, up = torch.randn(module.in_features, rank, generator=noise), torch.randn(rank, module.out_features)
        model.swap(path, AdaptedLinear(module, LowRank(down * 0.1, up * 0.1)))


def check(config: dict[str, Any], bits: int, *, lora: bool = False, prefix: bool = False) -> None:
    model = random_model(config, bits)
    spec = model.spec
    if lora:
        adapt(model)
    if prefix:
        assert isinstance(model, PrefixedModel)
        model.set_prefix(torch.randn(spec.layers, 2, spec.kv_heads, 5, spec.head_dim) * 0.3)
    cache = model.new_cache(48, torch.float32)
    model(torch.tensor(PROMPT), cache, last_only=True)
    parts = model.parts()
    assert parts is not None
    step = CardStep(parts, model.spec, cache)
    choice = Choice(0.7, 1.0, (), ())
    listed = [launch.addresses() for launch in step.launches()]
    nodes = (6 if parts.layers[0].attention_norm is None else 8) * spec.layers + 4
    adapted = sum(isinstance(module, AdaptedLinear) for module in model.modules())
    assert nodes + (adapted > 0) <= len(listed) <= nodes + adapted
    for token in (9, 44):
        row = step(token, cache, *model.positions(cache))
        assert [launch.addresses() for launch in step.launches()] == listed
        length = cache.length
        written = [(k[:, length].clone(), v[:, length].clone()) for k, v in zip(cache.keys, cache.values, strict=True)]
        right = model(torch.tensor([token]), cache, last_only=True)[-1]
        name = (config["model_type"], bits, token)
        assert float((row - right).abs().max() / right.abs().max()) < 2e-5, name
        values, ids = torch.sort(row, descending=True, stable=True)
        with torch.inference_mode(False):  # as a sampler asks, behind the step
            best = row.candidates(choice)
        assert torch.equal(best.ids, ids[:64]), name
        assert torch.equal(best.values, values[:64]), name
        assert abs(float(best.total - torch.logsumexp(row.double() / choice.temperature, 0))) < 1e-5, name
        for (key, value), keys, old in zip(written, cache.keys, cache.values, strict=True):
            assert float((key - keys[:, length]).abs().max()) < 2e-5, name
            assert float((value - old[:, length]).abs().max()) < 2e-5, name


def check_chain(config: dict[str, Any], bits: int) -> None:
    """A layer a step, and the head, which lies with the embedding, behind them: the same logits as in one step."""
    model = random_model(config, bits)
    caches = [model.new_cache(48, torch.float32) for _ in range(2)]
    for cache in caches:
        model(torch.tensor(PROMPT), cache, last_only=True)
    parts = model.parts()
    assert parts is not None
    whole, card, other = CardStep(parts, model.spec, caches[0]), torch.device("cpu"), torch.device("cpu", 0)
    cut = spans([card, other], card)
    assert cut == [(card, range(0, 1)), (other, range(1, 2)), (card, range(2, 2))]
    chain = [CardStep(parts, model.spec, caches[1], span=span, device=device) for device, span in cut]
    choices = [Choice(0.7, 1.5, (), ()) for _ in range(2)]
    for token in (9, 9):
        one = whole(token, caches[0], *model.positions(caches[0]))
        for step in chain:  # what a step hands on is not what it was given: a graph's first token runs twice
            step.outgoing.fill_(float("nan"))
        two = run_chain(chain, token, caches[1], *model.positions(caches[1]))
        assert torch.equal(one, two), (config["model_type"], bits, token)
        best = [row.candidates(choice) for row, choice in zip((one, two), choices, strict=True)]
        assert torch.equal(best[0].ids, best[1].ids)
        assert torch.equal(best[0].values, best[1].values)
        for cache in caches:
            cache.advance(1)


if __name__ == "__main__":
    with torch.inference_mode():
        for name in sys.argv[1:]:
            form, *more = name.split("+")
            family, _, bits = form.partition(":")
            if "chain" in more:
                check_chain(CONFIGS[family], int(bits or 0))
            else:
                check(CONFIGS[family], int(bits or 0), lora="lora" in more, prefix="prefix" in more)
    print("right")
