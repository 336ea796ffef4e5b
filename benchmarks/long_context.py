"""What a decoded token costs behind a long context: layers of full size with random int4 weights, in C and in torch.

    python benchmarks/long_context.py [--shape chatglm3-6b] [--layers 2] [--threads 2] [--lengths 100 8000] [--no-torch]
    python benchmarks/long_context.py --types [--shape smollm2] [--threads 1]

Embedding and head are left out, so the ratio is that of the layers alone, which is the worse one.
--types: what `--cache-type` costs, in processor time, the types in turns: so a busy machine tells the ratios too.
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
from torch import nn

from glmchat.checkpoints.families import parse
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.models import chatglm2
from glmchat.engine.models.layers import attend
from glmchat.engine.quantize.linear import QuantLinear

REPEATS = 12  # the best of them counts
SHAPES = {
    "chatglm3-6b": SimpleNamespace(hidden=4096, ffn=13696, heads=32, groups=2, width=128),
    "smollm2": SimpleNamespace(hidden=576, ffn=1536, heads=9, groups=3, width=64),
    "many key heads": SimpleNamespace(hidden=2048, ffn=4096, heads=16, groups=16, width=128),
    "tiny": SimpleNamespace(hidden=256, ffn=512, heads=32, groups=2, width=16),
}


def network(shape: SimpleNamespace, layers: int, group: int) -> chatglm2.ChatGLM2:
    """A ChatGLM2/3 of full width, few layers, a small vocabulary, random weights in 4 bits."""
    config = {
        "model_type": "chatglm", "num_layers": layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
        "multi_query_attention": True, "multi_query_group_num": shape.groups, "kv_channels": shape.width,
        "ffn_hidden_size": shape.ffn, "padded_vocab_size": 64, "rmsnorm": True, "post_layer_norm": True,
    }  # fmt: skip
    with torch.device("meta"):
        model = chatglm2.ChatGLM2(parse(config))
    noise = torch.Generator().manual_seed(1)
    for module in list(model.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not isinstance(module, nn.Linear) or name == "bias":
                module.register_parameter(name, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                size = (child.out_features, child.in_features)
                q = torch.randint(0, 16, size, generator=noise, dtype=torch.uint8)
                scale = torch.full((size[0], size[1] // group), 2**-9)
                bias = None if child.bias is None else torch.zeros(size[0])
                setattr(module, name, QuantLinear.from_int4(q, scale, torch.zeros_like(scale), bias))
    model.prepare(torch.float32, "cpu")
    return model


def by_c(model: chatglm2.ChatGLM2, cache: KVCache) -> float:
    step = model.compiled(cache)
    assert step is not None, model.not_compiled
    return step.seconds(cache, model.spec.layers)


def by_torch(model: chatglm2.ChatGLM2, cache: KVCache) -> float:
    length = cache.length
    started = time.perf_counter()
    with torch.inference_mode():
        model(torch.zeros(1, dtype=torch.int64), cache, last_only=True)
    cache.length = length
    return time.perf_counter() - started


def attend_in_torch(model: chatglm2.ChatGLM2, cache: KVCache) -> None:
    heads, kv_heads, width = model.spec.heads, model.spec.kv_heads, model.spec.head_dim
    row = torch.ones(kv_heads, 1, width)
    with torch.inference_mode():
        attend(torch.ones(1, heads, width), *cache.append(0, row, row), None)


def compare_types(model: chatglm2.ChatGLM2, lengths: list[int], layers: int) -> None:
    noise = torch.Generator().manual_seed(1)
    size = (model.spec.kv_heads, max(lengths), model.spec.head_dim)
    caches = {dtype: model.new_cache(max(lengths) + 1, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)}
    for layer in range(layers):
        rows = torch.randn(size, generator=noise), torch.randn(size, generator=noise)
        for cache in caches.values():
            cache.put(layer, 0, *rows)
    for length in lengths:
        best, alone = (dict.fromkeys(caches, float("inf")) for _ in range(2))
        for _ in range(2 * REPEATS):
            for dtype, cache in caches.items():
                cache.length = length
                started = time.process_time()
                by_c(model, cache)
                between = time.process_time()
                attend_in_torch(model, cache)
                best[dtype] = min(best[dtype], between - started)
                alone[dtype] = min(alone[dtype], time.process_time() - between)
        for dtype, seconds in best.items():
            print(
                f"{length:5} tokens, cache in {str(dtype)[6:]:8}: "
                f"{1e3 * seconds / layers:7.3f} ms of the processor a layer, "
                f"{seconds / best[torch.float32]:.2f} of float32; its attention, of torch's forward, "
                f"{1e3 * alone[dtype]:7.3f} ms, {alone[dtype] / alone[torch.float32]:.2f}; "
                f"{caches[dtype].nbytes // (caches[dtype].capacity * layers)} bytes a position and layer",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm3-6b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--lengths", type=int, nargs="*", default=[100, 2000, 8000])
    parser.add_argument("--no-torch", action="store_true")
    parser.add_argument("--types", action="store_true")
    options = parser.parse_args()
    model = network(SHAPES[options.shape], options.layers, options.group)
    programs = {"C": by_c} if options.no_torch else {"C": by_c, "torch": by_torch}
    for threads in options.threads:
        torch.set_num_threads(threads)
        if options.types:
            compare_types(model, options.lengths, options.layers)
            continue
        for dtype in (torch.float32, torch.bfloat16):
            cache = model.new_cache(max(options.lengths) + 1, dtype)
            for part in (*cache.keys, *cache.values):
                part.normal_()
            for name, program in programs.items():
                if name == "torch" and dtype != torch.float32:
                    continue  # the model is in float32
                first = 0.0
                for length in options.lengths:
                    cache.length = length
                    seconds = min(program(model, cache) for _ in range(REPEATS))
                    first = first or seconds
                    each = 1e3 * seconds / options.layers
                    print(
                        f"{threads} thread(s), cache in {str(dtype)[6:]}, {length:5} tokens, {name:5}: "
                        f"{each:6.2f} ms a layer, {seconds / first:.2f} of the first",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
