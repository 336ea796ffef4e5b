"""Devices and kernels as the engine sees them, for `glmchat doctor`. A job without a plan: it changes nothing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from glmchat.jobs.lines import Request, Tell, run


def probe(request: Request, tell: Tell) -> dict[str, Any]:
    """What there is and what is taken.

    device: what `--device auto` takes; not_chosen: the others, and why not. kernels: one per device and width.
    decode_step: who computes one token, C in one call or torch, and then why.
    """
    import torch

    from glmchat.engine.native.self_test import card_fault, step_fault
    from glmchat.engine.quantize.kernels import kernel_report

    chosen, passed_over = _devices(torch)
    fault = step_fault if chosen == "cpu" else card_fault
    return {
        "device": chosen,
        "not_chosen": passed_over,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "cuda_built_for": torch.version.cuda,
        "decode_step": "compiled" if (reason := fault()) is None else f"torch: {reason}",
        "kernels": [asdict(row) for row in kernel_report("cpu" if chosen == "cpu" else chosen.split(":")[0])],
    }


def _devices(torch: Any) -> tuple[str, dict[str, str]]:
    passed_over: dict[str, str] = {}
    chosen = "cpu"
    if torch.version.cuda is None:
        passed_over["cuda"] = "the installed torch was built without CUDA"
    elif not torch.cuda.is_available():
        passed_over["cuda"] = "no NVIDIA card or driver answers"
    else:
        chosen = "cuda"
    mps = torch.backends.mps
    if not mps.is_built():
        passed_over["mps"] = "only on Macs"
    elif not mps.is_available():
        passed_over["mps"] = "macOS 14 or a Metal card is missing"
    else:
        passed_over["mps"] = "only with --device mps"
    return chosen, passed_over


if __name__ == "__main__":
    sys.exit(run(probe))
