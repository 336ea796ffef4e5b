"""Devices and kernels as the engine sees them, for `glmchat doctor`. A job without a plan: it changes nothing."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

from glmchat.jobs.lines import Request, Tell, run


def probe(request: Request, tell: Tell) -> dict[str, Any]:
    """What there is and what is taken.

    device: what `--device auto` takes for a small model; not_chosen: the others, and why not. cards: those that this
    process sees. kernels: one per device and width. decode_step: who computes one token, and why if it is torch.
    obstacles: what keeps a card from being used, and what helps.
    """
    import torch

    from glmchat.checkpoints.device_plan import ON_CPU, plan_device
    from glmchat.core.cards import card_obstacle, compiler_obstacle, driver_obstacle, written
    from glmchat.engine.native.cards import seen, set_up, start_fault, torch_build
    from glmchat.engine.native.self_test import card_fault, step_fault
    from glmchat.engine.quantize.kernels import kernel_report

    cards, build = seen(), torch_build()
    plan = plan_device("auto", None, cards, build)
    chosen, reason = plan.devices[0], plan.reason
    obstacles = [driver_obstacle(cards, build)]
    if obstacles == [None]:
        obstacles = [*(card_obstacle(card, build) for card in cards.visible), compiler_obstacle()]
    if chosen != "cpu" and (fault := start_fault()) is not None:
        chosen, reason = "cpu", fault
    set_up(plan if chosen != "cpu" else ON_CPU)
    why_not = {"mps": _no_mps(torch)} if chosen != "cpu" else {"cuda": reason, "mps": _no_mps(torch)}
    fault_of_step = (step_fault if chosen == "cpu" else card_fault)()
    return {
        "device": chosen,
        "not_chosen": why_not,
        "cards": [card.to_json() for card in cards.visible],
        "driver": cards.driver,
        "driver_cuda": None if cards.cuda is None else written(cards.cuda),
        "obstacles": [asdict(one) for one in obstacles if one is not None] if cards.driver is not None else [],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "cuda_built_for": torch.version.cuda,
        "decode_step": "compiled" if fault_of_step is None else f"torch: {fault_of_step}",
        "kernels": [asdict(row) for row in kernel_report(chosen.split(":")[0])],
    }


def _no_mps(torch: Any) -> str:
    mps = torch.backends.mps
    if not mps.is_built():
        return "only on Macs"
    return "only with --device mps" if mps.is_available() else "macOS 14 or a Metal card is missing"


if __name__ == "__main__":
    sys.exit(run(probe))
