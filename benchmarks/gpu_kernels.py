"""What the card can do, and what each kernel of a decoded token makes of it: bus, graph nodes, products, attention.

The kernels are measured as the engine launches them: a step of a random network gives the list, its launches of one
role (the first product of every layer, the second …) run together in one graph, and since each layer has weights of its
own nothing stays in a cache.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from gpu_run import Run, config_of, named, prompt_of, random_model, step_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, scaled_dot_product_attention

# Shares of the bus that the product alone is expected to reach, by its bits. A bus above FAST outruns the unpacking of
# INT4 (about four instructions a weight), and small matrices are shorter than the gaps between kernels.
FAST = 1.1e12
LARGE = 30e6  # bytes of a matrix from which on the share is judged
SHARES = {4: (0.75, 0.55), 8: (0.75, 0.65), 16: (0.80, 0.80)}  # on a slower bus, on a faster one
DEPENDENT = 0.70  # INT4 where kernels start before the one in front has ended (Hopper and later)
NODE_GAP = 1.4e-6  # seconds, H200: 1.2 to 1.6 us
H200_BUS = 4.3e12
ROLES = ("qkv", "attend", "merge", "output", "gate and up", "down")


def share(run: Run, bits: int) -> float:
    return SHARES[bits][(run.fact("ceilings", "read bus") or 0) * 1e9 > FAST]


def ceilings(run: Run) -> None:
    """Of this card in this run: everything later is a share of it."""
    machine(run)
    if not run.has_kernels:
        return
    kernels = import_module("gpu_triton")
    count = min(1 << 30, run.free() // 8) // 65536 * 65536 if run.real else 8192
    words = torch.ones(count, dtype=torch.int32, device=run.device)
    programs, block = (132 * 16, 4096) if run.real else (2, 1024)
    out = torch.zeros(programs, dtype=torch.int32, device=run.device)
    by_triton = run.seconds(lambda: kernels.read[(programs,)](words, out, count, BLOCK=block))
    by_torch = run.seconds(words.sum)
    fast = min(by_triton, by_torch)
    run.measure("read bus", words.nbytes / fast / 1e9, "GB/s", H200_BUS / 1e9 if "H200" in name_of(run) else None)
    run.row("read bus by", "triton" if fast == by_triton else "torch")
    source, target = words.chunk(2)
    seconds = run.seconds(lambda: target.copy_(source))
    run.measure("copy, read and written", 2 * source.nbytes / seconds / 1e9, "GB/s")
    nodes = 200 if run.real else 2
    graph = run.graphed(lambda: [kernels.nothing[(1,)](out, DEPENDENT=False) for _ in range(nodes)])
    run.measure("node of a graph", run.seconds(graph) / nodes * 1e6, "us", NODE_GAP * 1e6, least=False)
    if run.real and torch.cuda.get_device_capability()[0] >= 9:
        graph = run.graphed(lambda: [kernels.nothing[(1,)](out, DEPENDENT=True, launch_pdl=True) for _ in range(nodes)])
        run.measure("node of a graph, dependent launch", run.seconds(graph) / nodes * 1e6, "us")
    size = 8192 if run.real else 64
    a = run.noise(size, size).half()
    seconds = run.seconds(lambda: a @ a)
    run.measure("16-bit product", 2 * size**3 / seconds / 1e12, "TFLOP/s", 700.0 if "H200" in name_of(run) else None)


def name_of(run: Run) -> str:
    return torch.cuda.get_device_name() if run.real else run.kind


def machine(run: Run) -> None:
    run.row("card", name_of(run))
    run.row("torch", torch.__version__)
    if not run.real:
        return
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    run.row("capability", capability)
    run.row("CUDA of torch", str(torch.version.cuda))
    run.row("cuDNN", str(torch.backends.cudnn.version()))
    run.row("triton", import_module("triton").__version__)
    asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    try:
        command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        run.row(asked, told.splitlines()[0])
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        run.skip(asked, f"nvidia-smi: {type(error).__name__}")


def products(run: Run) -> None:
    """Every matrix of two networks at four widths, and torch's own products of one size beside them."""
    if not run.has_kernels:
        run.skip("products", f"Triton has no {run.kind}")
        return
    for name in ("chatglm3-6b", "chatglm-6b"):
        for bits, group in ((4, 128), (4, 32), (8, None), (16, None)):
            if run.left < 4:
                run.skip(f"{name} {bits} bits", "no time left")
            elif not run.tiny or (name, group) == ("chatglm3-6b", 32):
                _roles(run, name, bits, group)
    _peers(run)


def _roles(run: Run, name: str, bits: int, group: int | None) -> None:
    config = config_of(run, name, layers=8)
    with torch.inference_mode():
        model = random_model(run, config, bits, group)
        cache = model.new_cache(64, model.dtype)
        model(torch.tensor(prompt_of(config, 8), device=run.device), cache, last_only=True)
        step = step_of(model, cache)
        step(5, cache, *model.positions(cache))
        bus = run.fact("ceilings", "read bus")
        for role, launches in roles_of(step).items():
            if role in ("attend", "merge"):
                continue
            size = sum(bytes_of(launch) for launch in launches)
            graph = run.graphed(lambda launches=launches: [launch() for launch in launches])
            seconds = run.seconds(graph)
            rate = size / seconds / 1e9
            label = f"{name} {bits} bits{f' g{group}' if group else ''}: {role}"
            width = launches[0].constants.get("BITS", bits)
            judged = share(run, min(width, 16)) if bus and size / len(launches) > LARGE else None
            run.measure(
                label, 100 * rate / (bus or rate), "% of the bus", None if judged is None else 100 * judged,
                us=seconds / len(launches) * 1e6, gb_s=rate, matrix_bytes=size // len(launches),
            )  # fmt: skip
        del step, model, cache
    run.empty()


def roles_of(step: Any) -> dict[str, list[Any]]:
    """Launches by what they are for: six a layer, and the ends."""
    launches = step.launches()
    layers = [launch for launch in launches if launch.kernel in ("product", "attend", "merge")]
    names: dict[str, list[Any]] = {}
    for launch in launches:
        if launch.kernel not in ("product", "attend", "merge"):
            names.setdefault(launch.kernel, []).append(launch)
    for place, launch in enumerate(layers[:-1]):
        names.setdefault(ROLES[place % len(ROLES)], []).append(launch)
    names["head"] = layers[-1:]
    return names


def bytes_of(launch: Any) -> int:
    """What a launch must read: the words, and the scales of packed ones; of a lookup one row."""
    given = named(launch)
    if launch.kernel != "product":
        return 0
    packed = launch.constants["BITS"] < 16
    return int(given["words"].nbytes + (given["pairs"].nbytes if packed else 0))


def _peers(run: Run) -> None:
    """16384 x 4096 through torch's own operators, in copies that no cache holds."""
    outputs, inputs = (16384, 4096) if run.real else (64, 128)
    x = run.noise(1, inputs).bfloat16()

    def rate(name: str, make: Callable[[], Any], call: Callable[[Any], object], size: int) -> None:
        try:
            made = [make() for _ in range(1 + int(120e6) // size if run.real else 1)]
            graph = run.graphed(lambda: [call(one) for one in made])
            seconds = run.seconds(graph) / len(made)
            bus = run.fact("ceilings", "read bus")
            run.measure(f"torch {name}", 100 * size / seconds / 1e9 / (bus or 1), "% of the bus", us=seconds * 1e6)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            run.skip(f"torch {name}", str(error).splitlines()[0][:120])

    half = outputs * inputs
    rate("bfloat16", lambda: run.noise(outputs, inputs).bfloat16(), lambda w: linear(x, w), 2 * half)

    def int8() -> Any:
        return run.codes(outputs, inputs, below=127).to(torch.int8), run.noise(outputs).bfloat16()

    rate("_weight_int8pack_mm", int8, lambda w: torch._weight_int8pack_mm(x, *w), half)

    def int4() -> Any:
        packed = torch._convert_weight_to_int4pack(run.codes(outputs, inputs // 2, below=255), 8)
        return packed, run.noise(inputs // 128, outputs, 2).bfloat16()

    if run.real:
        rate("_weight_int4pack_mm g128", int4, lambda w: torch._weight_int4pack_mm(x, w[0], 128, w[1]), half // 2)


def attention(run: Run) -> None:
    """The step's two kernels over long caches, and torch's operators in their place."""
    for name in ("chatglm3-6b", "llama-3-8b", "chatglm-6b"):
        config = config_of(run, name, layers=4)
        if not run.tiny:
            config |= {key: 256 for key in ("padded_vocab_size",) if key in config}
            config |= {
                key: 512 for key in ("ffn_hidden_size", "inner_hidden_size", "intermediate_size") if key in config
            }
        else:
            config = config_of(run, name)
        lengths = (9,) if run.tiny else (128, 2048, 8192, 32000)
        if run.tiny and name != "chatglm3-6b":
            continue
        if run.has_kernels:
            _attention(run, name, config, lengths)
        _operators(run, name, config, lengths)


def _attention(run: Run, name: str, config: dict[str, Any], lengths: tuple[int, ...]) -> None:
    with torch.inference_mode():
        model = random_model(run, config, 16)
        spec = model.spec
        cache = model.new_cache(lengths[-1] + 64, model.dtype)
        cache.reserve(lengths[-1] + 64)
        for table in (*cache.keys, *cache.values):
            table.fill_(0.25)
        model(torch.tensor(prompt_of(config, 8), device=run.device), cache, last_only=True)
        step = step_of(model, cache)
        bus = run.fact("ceilings", "read bus")
        for length in lengths:
            cache.length = length
            step(5, cache, length, 0)
            both = [launch for launch in step.launches() if launch.kernel in ("attend", "merge")]
            graph = run.graphed(lambda both=both: [launch() for launch in both])
            seconds = run.seconds(graph) / spec.layers
            size = 2 * length * spec.kv_heads * spec.head_dim * cache.keys[0].element_size()
            run.measure(
                f"{spec.kv_heads} key heads, {length} positions", seconds * 1e6, "us",
                gb_s=size / seconds / 1e9, share=size / seconds / 1e9 / (bus or 1),
            )  # fmt: skip
        del step, model, cache
    run.empty()


def _operators(run: Run, name: str, config: dict[str, Any], lengths: tuple[int, ...]) -> None:
    from glmchat.engine.families import family_of

    spec = family_of(config)[1]
    query = run.noise(1, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim).half()
    room = run.noise(1, spec.kv_heads, lengths[-1] + 16, spec.head_dim).half()
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) if run.real else (SDPBackend.MATH,):
        label = f"{spec.kv_heads} key heads, torch {backend.name.removesuffix('_ATTENTION').lower()}"
        try:
            with sdpa_kernel(backend):
                for length in lengths:
                    keys = room[:, :, :length]
                    seconds = run.seconds(lambda keys=keys: scaled_dot_product_attention(query, keys, keys))
                    run.measure(f"{label}, {length} positions", seconds * 1e6, "us")
                if run.real:  # what a length costs that was not seen before: one a token
                    part = room[:, :, :777]
                    for word in ("a new length", "the same again"):
                        seconds = _once(run, lambda part=part: scaled_dot_product_attention(query, part, part))
                        run.measure(f"{label}, {word}", seconds * 1e6, "us")
        except RuntimeError as error:
            run.skip(label, str(error).splitlines()[0][:120])


def _once(run: Run, work: Callable[[], object]) -> float:
    """Seconds of the very first call, by the host's clock: what is planned anew is planned there."""
    run.wait()
    started = time.perf_counter()
    work()
    run.wait()
    return time.perf_counter() - started
