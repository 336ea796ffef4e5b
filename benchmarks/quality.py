"""Perplexity of SmolLM2 under every quantisation, beside llama.cpp's formats on the same weights.

    python benchmarks/quality.py [--threads N] [--json FILE] [--only WORD]

Two subjects: the starter model dequantised to float32 (its weights lie on a Q4_1 grid), and the same network with its
weights moved off that grid by noise of a fifth of a step. The text is that of ../shared/reference/smollm2/golden.json.
Only the layers' matrices are quantised unless a line names the ends: embedding and head, which are one matrix here, in
INT8 as the product does for every family but Llama (whose INT4 copies keep them in 16 bits for other programs). Q4_0,
Q4_1 and Q8_0 come from the gguf package, which computes what llama.cpp's own quantiser does. Run it on a quiet machine;
it takes some minutes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from glmchat.engine import Engine
from glmchat.engine.loading import open_weights
from glmchat.engine.quantize.int4 import quantise_int4, search
from glmchat.engine.quantize.int8 import quantise_int8
from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

ROOT = Path(__file__).resolve().parent.parent
STARTER = ROOT / ".test-cache" / "data" / "models" / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT.parent / "shared" / "data" / "llama-factory" / "c4_demo.jsonl"
GOLDEN = ROOT.parent / "shared" / "reference" / "smollm2" / "golden.json"
WINDOW, WINDOWS, TEXTS = 512, 4, 12

Change = Callable[[torch.Tensor], torch.Tensor]


def windows(engine: Engine) -> list[list[int]]:
    lines = TEXT.read_text(encoding="utf-8").splitlines()[:TEXTS]
    ids = engine.tokenizer.encode(" ".join(json.loads(line)["text"] for line in lines))
    return [ids[n * WINDOW : (n + 1) * WINDOW] for n in range(WINDOWS)]


def perplexity(engine: Engine, texts: list[list[int]]) -> float:
    total = sum(engine.loss(ids, ids) * (len(ids) - 1) for ids in texts)
    return math.exp(total / sum(len(ids) - 1 for ids in texts))


def ggml(kind: GGMLQuantizationType) -> Change:
    def change(weight: torch.Tensor) -> torch.Tensor:
        packed = quantize(np.ascontiguousarray(weight.numpy()), kind)
        return torch.from_numpy(dequantize(packed, kind).astype(np.float32)).view(weight.shape)

    return change


def int4(group: int, *, fast: bool = False, symmetric: bool = False) -> Change:
    return lambda weight: quantise_int4(weight, group, fast=fast, symmetric=symmetric).stored().dequantise()


def int4_whole(group: int) -> Change:
    """Whole zero points even where free ones pay, as `quantize` writes when another program is to read the folder."""

    def change(weight: torch.Tensor) -> torch.Tensor:
        codes, scale, low, _ = search(weight.reshape(-1, group), integer_zero=True)
        return (codes * scale[:, None] + low[:, None]).view(weight.shape)

    return change


def int8(*, fast: bool = False) -> Change:
    return lambda weight: quantise_int8(weight, fast=fast).stored().dequantise()


FORMATS: list[tuple[str, float, Change]] = [
    ("llama.cpp Q4_0", 4.5, ggml(GGMLQuantizationType.Q4_0)),
    ("llama.cpp Q4_1", 5.0, ggml(GGMLQuantizationType.Q4_1)),
    ("llama.cpp Q8_0", 8.5, ggml(GGMLQuantizationType.Q8_0)),
    ("INT4 g64 whole points", 4 + 20 / 64, int4_whole(64)),
    ("INT4 g64", 4 + 20 / 64, int4(64)),
    ("INT4 g64 --fast", 4 + 20 / 64, int4(64, fast=True)),
    ("INT4 g32", 4 + 20 / 32, int4(32)),
    ("INT4 g32 --fast", 4 + 20 / 32, int4(32, fast=True)),
    ("INT4 g32 --symmetric", 4 + 16 / 32, int4(32, symmetric=True)),
    ("INT8", 8.03, int8()),
    ("INT8 --fast", 8.03, int8(fast=True)),
    ("INT4 g64 whole, ends", 4 + 20 / 64, int4_whole(64)),
    ("INT4 g64, ends", 4 + 20 / 64, int4(64)),
    ("INT8, ends", 8.03, int8()),
]


class Subject:
    """A dense float32 engine whose layers' matrices can be exchanged."""

    def __init__(self, threads: int | None) -> None:
        self.engine = Engine.load(STARTER, dtype="float32", threads=threads)
        source = open_weights(self.engine.checkpoint)
        self.weights: dict[str, torch.Tensor] = {}
        self.steps: dict[str, torch.Tensor] = {}
        self.embedding = self.engine.model.get_submodule("model.embed_tokens")
        assert isinstance(self.embedding, QuantEmbedding)
        self.as_stored = self.embedding.linear
        eight = quantise_int8(self.as_stored.dequantise()).stored()
        self.ends = QuantLinear.from_int8(eight.q, eight.scale)
        self.ends.multiply_exactly()
        for name, module in list(self.engine.model.named_modules()):
            if isinstance(module, QuantLinear) and name.startswith("model.layers"):
                dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
                self.engine.model.swap(name, dense)
                stored = source.read(f"{name}.weight")
                self.steps[name] = stored.scale.repeat_interleave(32, 1)  # type: ignore[union-attr]
                self.weights[name] = stored.dequantise()  # type: ignore[union-attr]

    def move_off_the_grid(self) -> None:
        noise = torch.Generator().manual_seed(11)
        for name, weight in self.weights.items():
            self.weights[name] = weight + self.steps[name] * 0.2 * torch.randn(weight.shape, generator=noise)

    @torch.inference_mode()
    def with_change(self, change: Change, ends: bool = False) -> Engine:
        """The engine with every layer's matrices changed; ends: embedding and head requantised to INT8 per row."""
        self.embedding.linear = self.ends if ends else self.as_stored
        self.engine.model.changed()
        for name, weight in self.weights.items():
            linear = self.engine.model.get_submodule(name)
            linear.weight = torch.nn.Parameter(change(weight), requires_grad=False)
        return self.engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    options = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    subject = Subject(options.threads)
    texts = windows(subject.engine)
    for title in ("on the Q4_1 grid", "off the grid"):
        if title == "off the grid":
            subject.move_off_the_grid()
        original = perplexity(subject.with_change(lambda weight: weight), texts)
        table = results[title] = {"original": original}
        print(f"{title}\n  {'original float32':24} {original:9.4f}", flush=True)
        for name, bits, change in FORMATS:
            if options.only not in name:
                continue
            found = table[name] = perplexity(subject.with_change(change, name.endswith("ends")), texts)
            print(f"  {name:24} {found:9.4f} {100 * (found / original - 1):+7.3f} %   {bits:.2f} bits", flush=True)
    table = results["the kernel's own arithmetic, the file as it is"] = {}
    print("the kernel's own arithmetic, the file as it is")
    for name, dtype in (("float32, exact products", "float32"), ("as run, int16 activations", None)):
        engine = Engine.load(STARTER, dtype=dtype, threads=options.threads)
        found = table[name] = perplexity(engine, texts)
        print(f"  {name:24} {found:9.4f}   ({engine.facts()['kernel']}, {engine.facts()['dtype']})", flush=True)
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8"))["perplexity"]["perplexity"]
    for name, found in table.items():
        print(
            f"  {name:24} {100 * (found / recorded - 1):+7.3f} % beside the {recorded:.3f} recorded from transformers"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
