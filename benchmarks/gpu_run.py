"""What the steps of gpu_check.py share: a device with its clock, rows that survive a crash, networks of random weights.

A network of random packed weights is as fast and as large as a real one, and nobody has to download it. It is made on
the card, tensor by tensor, from the engine's own `pack`, so it has whatever layout the engine gives it there.
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
OFF = 0.2  # a measured figure this far from its prediction is worth a look
# Only text needs these; the networks and their goldens are ids.
_FOR_TEXT = ("platformdirs", "sentencepiece", "tiktoken", "tokenizers")


class _Absent(ModuleType):
    """In place of a package that is not installed and that nothing here uses."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def make_importable(folder: Path) -> None:
    """`import glmchat` works from a bare checkout, with torch, triton, numpy and safetensors alone."""
    if find_spec("glmchat") is None:
        folder.mkdir(parents=True, exist_ok=True)
        link = folder / "glmchat"
        if not link.is_symlink():
            link.symlink_to(ROOT)
        sys.path.insert(0, str(folder))
    for name in _FOR_TEXT:
        try:
            import_module(name)
        except ImportError:
            for part in ("", ".decoders", ".models", ".pre_tokenizers"):
                sys.modules[name + part] = _Absent(name + part)


class Run:
    """One step on one device. Kinds of device: a card; "cpu", where Triton interprets; the tests' pretend card."""

    def __init__(self, device: str, out: Path, reference: Path, step: str, seconds: float, *, tiny: bool) -> None:
        self.device, self.out, self.reference, self.step, self.tiny = device, out, reference, step, tiny
        self.kind = device.partition(":")[0]
        self.real = self.kind == "cuda"
        self.has_kernels = self.kind in ("cuda", "cpu")
        self.ends = time.perf_counter() + seconds
        if self.kind == "fakegpu":
            sys.path.append(str(ROOT / "tests"))
            import_module("fake_card")
        if self.kind == "cpu":
            _interpret()

    # Rows

    @property
    def left(self) -> float:
        return self.ends - time.perf_counter()

    def row(self, name: str, value: float | str | None, unit: str = "", **more: Any) -> None:
        """Written at once: whatever comes later cannot take it away."""
        line = {"step": self.step, "row": name, "value": value, "unit": unit, **more}
        with (self.out / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{self.step:10} {name:44} {shown} {unit}  {more.get('verdict', '')}", flush=True)

    def gate(self, name: str, error: float, limit: float) -> None:
        """Right or wrong: `error` is at most `limit`. NaN is wrong."""
        self.row(name, error, "", predicted=f"<= {limit:g}", verdict="right" if error <= limit else "WRONG")

    def holds(self, name: str, truth: bool) -> None:
        self.row(name, "yes" if truth else "no", "", predicted="yes", verdict="right" if truth else "WRONG")

    def measure(
        self, name: str, value: float, unit: str, predicted: float | None = None, *, least: bool = True, **more: Any
    ) -> None:
        """A figure beside its prediction. least: more is better (rates), else less is (times, bytes)."""
        verdict = ""
        if predicted is not None and self.real:
            ratio = value / predicted if least else predicted / max(value, 1e-12)
            verdict = "as predicted" if abs(ratio - 1) <= OFF else "better" if ratio > 1 else "MISSED"
        self.row(name, value, unit, predicted=predicted, verdict=verdict, **more)

    def skip(self, name: str, why: str) -> None:
        self.row(name, None, "", verdict=f"skipped: {why}")

    def fact(self, step: str, name: str) -> float | None:
        """What an earlier step measured."""
        return next((row["value"] for row in rows_of(self.out) if (row["step"], row["row"]) == (step, name)), None)

    # Clocks

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], repeat: int = 20) -> float:
        """The median of `repeat` calls behind a first one, on the card's own clock; without a card, of one call."""
        if not self.real:
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        work()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
        for begin, end in pairs:
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return sorted(begin.elapsed_time(end) / 1e3 for begin, end in pairs)[repeat // 2]

    def graphed(self, work: Callable[[], object]) -> Callable[[], object]:
        """`work` as one launch of a CUDA graph; elsewhere itself."""
        if not self.real:
            return work
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def free(self) -> int:
        """Bytes that may be taken."""
        return torch.cuda.mem_get_info()[0] if self.real else 1 << 28

    def empty(self) -> None:
        gc.collect()
        if self.real:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def noise(self, *shape: int) -> torch.Tensor:
        if self.real:
            return torch.randn(shape, device=self.device)
        return torch.randn(shape).to(self.device)

    def codes(self, *shape: int, below: int) -> torch.Tensor:
        drawn = torch.randint(0, below, shape, dtype=torch.int16, device=self.device if self.real else "cpu")
        return drawn.to(torch.uint8).to(self.device)


def rows_of(out: Path) -> list[dict[str, Any]]:
    file = out / "rows.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def _interpret() -> None:
    """On a CPU the card's own kernels, which Triton interprets, stand in for the CPU's."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("--device cpu runs the card's kernels in Triton's interpreter: set TRITON_INTERPRET=1")
    linear: Any = import_module("glmchat.engine.quantize.linear")
    words, self_test = import_module("glmchat.engine.gpu.words"), import_module("glmchat.engine.native.self_test")
    linear.choose = lambda shape, device: words.CardWords()
    step = import_module("glmchat.engine.gpu.step")
    self_test.card_step = lambda: (step.CardSteps, lambda: None)  # type: ignore[attr-defined]


def card_steps(run: Run, model: Any) -> None:
    """The model decodes with the card's step, where there is one."""
    if run.has_kernels:
        model.make_step, model.step_fault = import_module("glmchat.engine.native.self_test").card_step()
        model.changed()
    else:
        model.compile_steps = False


def load(run: Run, folder: Path, **options: Any) -> Any:
    """An Engine on the device, its decoding done by the card's step."""
    from glmchat.engine import Engine

    engine = Engine.load(folder, device=run.device, threads=1 if run.kind == "cpu" else None, **options)
    if run.kind == "cpu":
        card_steps(run, engine.model)
    return engine


# Networks

_V2 = {
    "model_type": "chatglm", "hidden_size": 4096, "num_layers": 28, "num_attention_heads": 32, "kv_channels": 128,
    "multi_query_attention": True, "multi_query_group_num": 2, "ffn_hidden_size": 13696, "layernorm_epsilon": 1e-5,
    "padded_vocab_size": 65024, "add_bias_linear": False, "add_qkv_bias": True, "rmsnorm": True,
    "post_layer_norm": True, "apply_residual_connection_post_layernorm": False, "original_rope": True,
    "tie_word_embeddings": False, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16",
}  # fmt: skip
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "chatglm3-6b": {**_V2, "_name_or_path": "THUDM/chatglm3-6b", "seq_length": 32768},
    "chatglm-6b": {
        "model_type": "chatglm", "hidden_size": 4096, "inner_hidden_size": 16384, "num_layers": 28,
        "num_attention_heads": 32, "layernorm_epsilon": 1e-5, "max_sequence_length": 4096, "use_cache": True,
        "position_encoding_2d": True, "torch_dtype": "float16", "vocab_size": 130528, "bos_token_id": 130004,
        "eos_token_id": 130005, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3,
    },
    "glm-4-9b": {
        **_V2, "_name_or_path": "THUDM/glm-4-9b-chat", "num_layers": 40, "padded_vocab_size": 151552,
        "seq_length": 32768, "rope_ratio": 500, "layernorm_epsilon": 1.5625e-07, "torch_dtype": "bfloat16",
        "eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329,
    },
    "llama-3-8b": {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 32768, "tie_word_embeddings": False, "bos_token_id": 128000,
        "eos_token_id": 128001, "torch_dtype": "bfloat16",
    },
    "qwen2": {
        "model_type": "qwen2", "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "vocab_size": 151936, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True, "bos_token_id": 151643,
        "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "tie_word_embeddings": True, "bos_token_id": 151643,
        "eos_token_id": 151645, "torch_dtype": "bfloat16",
    },
    "gpt2": {
        "model_type": "gpt2", "n_embd": 1024, "n_head": 16, "n_layer": 24, "n_positions": 1024, "n_ctx": 1024,
        "vocab_size": 50257, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "bos_token_id": 50256,
        "eos_token_id": 50256, "torch_dtype": "float16",
    },
}  # fmt: skip
_TINY: dict[str, Any] = {
    "hidden_size": 32, "num_layers": 1, "num_hidden_layers": 1, "n_layer": 1, "n_embd": 32, "n_head": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "multi_query_group_num": 1, "kv_channels": 16, "head_dim": 16,
    "inner_hidden_size": 64, "ffn_hidden_size": 64, "intermediate_size": 64, "padded_vocab_size": 160,
    "seq_length": 512, "max_position_embeddings": 512, "max_sequence_length": 512, "n_positions": 512, "n_ctx": 512,
}  # fmt: skip
_TINY_IDS: dict[str, Any] = {
    "vocab_size": 160, "bos_token_id": 150, "eos_token_id": 151, "mask_token_id": 148, "gmask_token_id": 149,
}  # fmt: skip


def config_of(run: Run, name: str, layers: int | None = None) -> dict[str, Any]:
    config = dict(CONFIGS[name])
    if run.tiny:
        config |= {key: value for key, value in (_TINY | _TINY_IDS).items() if key in config}
        config["tie_word_embeddings"] = config.get("tie_word_embeddings", False)
    elif layers is not None:
        config |= {key: layers for key in ("num_layers", "num_hidden_layers", "n_layer") if key in config}
    return config


def prompt_of(config: Mapping[str, Any], length: int) -> list[int]:
    """Ids that mean nothing; ChatGLM-6B begins its answer behind [gMASK] and <sop>."""
    ids = [(7 * place) % 140 + 3 for place in range(length)]
    if "gmask_token_id" in config:
        ids[-2:] = [config["gmask_token_id"], config["bos_token_id"]]
    return ids


def random_model(
    run: Run, config: Mapping[str, Any], bits: int, group: int | None = None, dtype: torch.dtype | None = None
) -> Any:
    """The network with random weights on the device, ready to decode. bits: 4, 8, or 16 for weights in `dtype`."""
    from glmchat.checkpoints.recipe import Recipe
    from glmchat.engine.families import family_of

    family, spec = family_of(config)
    dtype = dtype or getattr(torch, config["torch_dtype"])
    with torch.device("meta"):
        model = family.build(spec)
    recipe = Recipe(bits, group).settled(spec.family) if bits < 16 else None
    matrices = spec.matrices()
    for path, module in list(model.named_modules()):
        name = f"{path}.weight"
        width = recipe.choose(name, *matrices[name]) if recipe is not None and name in matrices else (16, 0)
        if width[0] < 16 and width[0]:
            model.swap(path, _packed(run, module, *width, dtype))
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            drawn = run.noise(*parameter.shape)
            if parameter.dim() > 1:
                drawn /= math.sqrt(parameter.shape[-1])
            elif leaf == "weight":
                drawn = 1 + 0.1 * drawn
            else:
                drawn *= 0.05
            setattr(module, leaf, nn.Parameter(drawn.to(dtype), requires_grad=False))
    model.dtype = dtype
    model.prepare(dtype, run.device)
    card_steps(run, model)
    return model.eval()


def _packed(run: Run, module: Any, bits: int, group: int, dtype: torch.dtype) -> nn.Module:
    from glmchat.engine.quantize.linear import QuantEmbedding, QuantLinear

    outputs, inputs = (int(size) for size in module.weight.shape)
    groups = inputs // group if group else 1
    spread = (run.noise(outputs, groups) * 0.1 + 1) / math.sqrt(inputs) / (4.6 if bits == 4 else 74)
    bias = None
    if getattr(module, "bias", None) is not None:
        bias = (run.noise(outputs) * 0.05).to(dtype)
    if bits == 4:
        layer = QuantLinear.from_int4(run.codes(outputs, inputs, below=16), spread, 0.37 * spread, bias)
    else:
        codes = (run.codes(outputs, inputs, below=255).to(torch.int16) - 127).to(torch.int8)
        layer = QuantLinear.from_int8(codes, spread, bias)
    return QuantEmbedding(layer, dtype) if isinstance(module, nn.Embedding) else layer


def step_of(model: Any, cache: Any, *, dependent: bool | None = None) -> Any:
    """The card's step of `model` over `cache`, with its list of launches.

    dependent: kernels start before the one in front has ended; None: as the engine's self-test decided.
    """
    from glmchat.engine.gpu.step import CardStep, CardSteps

    model.step()  # the self-test is asked
    return CardStep(model.parts(), model.spec, cache, dependent=CardSteps.dependent if dependent is None else dependent)


def named(launch: Any) -> dict[str, Any]:
    """A launch's arguments by the names that its kernel gives them."""
    kernel = getattr(import_module("glmchat.engine.gpu.words").kernels(), launch.kernel)
    return dict(zip(kernel.arg_names, launch.arguments, strict=False))
