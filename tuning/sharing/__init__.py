"""The ways in which processes share a run; here, which of them accelerate's launcher and configuration ask for."""

from __future__ import annotations

import os

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tuning.settings import Settings
from glmchat.tuning.sharing.base import Sharing, not_heard
from glmchat.tuning.sharing.fsdp import Fsdp


def sharing_of(settings: Settings) -> Sharing:
    """As accelerate's launcher and configuration have it. Raises Usage for what of it cannot be done here."""
    from accelerate import Accelerator

    # On CPUs accelerate 1.15 itself knows no pieces, but its launcher says what was asked for.
    for kind in ("DEEPSPEED", "MEGATRON_LM"):
        if _asked(kind):
            raise Usage(
                tr(
                    "{kind} keeps what learns in pieces of its own, which checkpoints here are not read out of",
                    kind=kind,
                ),
                hint=tr("share the run by FSDP, or among plain processes (docs/tuning.md)"),
                code="tune.shards",
            )
    in_pieces = "LOCAL_RANK" in os.environ and _asked("FSDP")
    if in_pieces and os.environ.get("FSDP_VERSION", "1") != "2":
        raise not_heard("fsdp_version", "2", tr("torch builds on the second version, fully_shard"))
    accelerator = Accelerator(cpu=settings.device == "cpu")
    device = str(accelerator.device) if settings.device != "cpu" else "cpu"
    if accelerator.mixed_precision != "no":
        raise not_heard("mixed_precision", "'no'", tr("--dtype says what products are computed in"))
    if in_pieces:
        return Fsdp(accelerator, device)
    return Sharing(accelerator, device)


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"
