"""What coarser numbers cost in perplexity, on real text: a narrower key/value cache, and activations of 8 bits.

    .venv/bin/python -P benchmarks/rounding.py [cache] [products] [kernel] [--windows 16] [--length 512] [--threads 1]

The starter model multiplies exactly in float32 but for what a row names. The text is
shared/data/llama-factory/c4_demo.jsonl; a window is read in one pass through a cache. Nothing here depends on what else
the machine does. Beside the perplexity stands the divergence (Kullback and Leibler, nats a token) from what the exact
model predicts, which noise in the text does not hide.

cache: every key and value is rounded as it is stored, and attention reads what the cache gives back, the token's own
with it, as the compiled step does. INT8 has one scale for the numbers of a head at a position, INT4 one for 32 of them
and a minimum. products: what is multiplied with packed weights of 4 bits is rounded first, with one scale for so many
neighbours; "all" rounds what embedding and head, of 8 bits here, are multiplied with too.

kernel: the compiled step decodes the windows, token by token, as answers are written, behind the caches that
`--cache-type` takes. "exact" is then its float32 cache; it multiplies packed weights by activations of 16 bits.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from glmchat.engine import Engine
from glmchat.engine.kv_cache import KVCache
from glmchat.engine.quantize.linear import QuantLinear

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT.parent / "shared" / "data" / "llama-factory" / "c4_demo.jsonl"

Rounding = Callable[[torch.Tensor], torch.Tensor]
PLAIN = QuantLinear.forward


def whole(block: int | None, largest: int) -> Rounding:
    """To whole numbers up to `largest` with one scale for `block` neighbours, or for a whole row."""

    def change(values: torch.Tensor) -> torch.Tensor:
        blocks = values.reshape(*values.shape[:-1], -1, block or values.shape[-1])
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / largest
        return ((blocks / scale).round() * scale).reshape(values.shape)

    return change


def int4(values: torch.Tensor) -> torch.Tensor:
    groups = values.reshape(*values.shape[:-1], -1, 32)
    low = groups.amin(-1, keepdim=True)
    scale = (groups.amax(-1, keepdim=True) - low).clamp_min(1e-30) / 15
    return (((groups - low) / scale).round() * scale + low).reshape(values.shape)


def exact(values: torch.Tensor) -> torch.Tensor:
    return values


CACHES: dict[str, Rounding] = {
    "cache float16, 16 bits": lambda values: values.half().float(),
    "cache bfloat16, 16 bits": lambda values: values.bfloat16().float(),
    "cache INT8, 8.25 bits": whole(None, 127),
    "cache INT4, 5 bits": int4,
}
PRODUCTS: dict[str, Rounding] = {
    "products, 16 bits, 32 a scale": whole(32, 32767),
    "products, 8 bits, 32 a scale": whole(32, 127),
    "products, 8 bits, 64 a scale": whole(64, 127),
    "products, 8 bits, 192 a scale": whole(192, 127),
    "products, 8 bits, a row a scale": whole(None, 127),
    "products, 8 bits, 32 a scale, all": whole(32, 127),
}


KERNEL = {"cache bfloat16, the kernel": "bfloat16", "cache INT8, the kernel": "int8"}
AT_ONCE = 4  # windows whose log-probabilities, 100 MB each, are held together


class Rounded(KVCache):
    """A float32 cache that holds what a narrower one could."""

    rounding: Rounding = staticmethod(exact)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().append(layer, self.rounding(key), self.rounding(value))


@torch.inference_mode()
def decoded(engine: Engine, windows: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
    """As `predicted`, of windows of one length that are decoded beside each other: a row has its own bits."""
    engine.model.cache_type = KERNEL.get(name, "float32")
    step, caches = engine.model.step(), [engine.model.new_cache(len(w), engine.model.cache_dtype) for w in windows]
    found = []
    for at in range(len(windows[0]) - 1):
        tokens = [int(window[at]) for window in windows]
        found.append(functional.log_softmax(step.rows(tokens, caches, [at] * len(caches)), dim=-1))
        for cache in caches:
            cache.advance(1)
    return list(torch.stack(found, 1))


@torch.inference_mode()
def predicted(engine: Engine, ids: torch.Tensor, name: str) -> torch.Tensor:
    """Log-probabilities [n - 1, vocab] of what follows each id but the last."""
    spec, products = engine.spec, PRODUCTS.get(name, exact)
    cache = Rounded(spec.layers, spec.kv_heads, spec.head_dim, len(ids), torch.float32)
    cache.rounding = CACHES.get(name, exact)

    def forward(linear: QuantLinear, x: torch.Tensor) -> torch.Tensor:
        return PLAIN(linear, products(x) if linear.bits == 4 or name.endswith("all") else x)

    QuantLinear.forward = forward  # type: ignore[method-assign]
    return functional.log_softmax(engine.model(ids, cache)[:-1], dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=("cache", "products", "kernel", []))
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    tables = {"cache": [*CACHES], "products": [*PRODUCTS], "kernel": [*KERNEL]}
    chosen = given.tables or ["cache", "products"]
    if "kernel" in chosen and len(chosen) > 1:
        parser.error("kernel is compared with other products than the rest: alone")
    names = [name for table in chosen for name in tables[table]]
    engine = Engine.load(STARTER, dtype=None if "kernel" in chosen else "float32", threads=given.threads)
    lines = TEXT.read_text(encoding="utf-8").splitlines()
    ids = engine.tokenizer.encode(" ".join(json.loads(line)["text"] for line in lines))
    windows = [torch.tensor(ids[n * given.length : (n + 1) * given.length]) for n in range(given.windows)]
    count = sum(len(window) - 1 for window in windows)
    print(f"{STARTER.name}: {count} tokens of {len(windows)} windows of {given.length}", flush=True)
    loss, apart = dict.fromkeys(["exact", *names], 0.0), dict.fromkeys(names, 0.0)

    def rows(some: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
        return decoded(engine, some, name) if "kernel" in chosen else [predicted(engine, one, name) for one in some]

    for first in range(0, len(windows), AT_ONCE):
        some = windows[first : first + AT_ONCE]
        exact_rows = rows(some, "exact")
        for name in loss:
            for window, ours, right in zip(some, rows(some, name), exact_rows, strict=True):
                loss[name] += float(functional.nll_loss(ours, window[1:], reduction="sum")) / count
                if name in apart:
                    apart[name] += float(functional.kl_div(ours, right, reduction="sum", log_target=True)) / count
    print(f"{'exact':35} perplexity {math.exp(loss['exact']):8.4f}")
    for name in names:
        worse = 100 * (math.exp(loss[name] - loss["exact"]) - 1)
        print(f"{name:35} perplexity {math.exp(loss[name]):8.4f} {worse:+7.3f} %  divergence {apart[name]:.1e}")


if __name__ == "__main__":
    main()
