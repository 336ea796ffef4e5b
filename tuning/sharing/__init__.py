"""The ways in which processes share a run; here, which of them accelerate's launcher and configuration ask for."""

from __future__ import annotations

import importlib.util
import os

from glmchat.core.errors import Usage
from glmchat.core.language import tr
from glmchat.tuning.settings import Settings
from glmchat.tuning.sharing.base import Sharing, not_heard
from glmchat.tuning.sharing.fsdp import Fsdp


def sharing_of(settings: Settings) -> Sharing:
    """As accelerate's launcher and configuration have it. Raises Usage for what of it cannot be done here."""
    from accelerate import Accelerator

    if _asked("MEGATRON_LM"):
        raise Usage(
            tr("Megatron-LM has models of its own, and those here are not read into them"),
            hint=tr("share the run by FSDP or DeepSpeed, or among plain processes (docs/tuning.md)"),
            code="tune.shards",
        )
    # On CPUs accelerate 1.15 itself knows no pieces, but its launcher says what was asked for.
    is_shared = "LOCAL_RANK" in os.environ
    in_pieces = is_shared and _asked("FSDP")
    if in_pieces and os.environ.get("FSDP_VERSION", "1") != "2":
        raise not_heard("fsdp_version", "2", tr("torch builds on the second version, fully_shard"))
    in_flat_pieces = is_shared and _asked("DEEPSPEED")
    if in_flat_pieces and importlib.util.find_spec("deepspeed") is None:
        raise Usage(
            tr("{name} is not installed", name="DeepSpeed"),
            hint=tr("install it: {command}", command="DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"),
            code="tune.shards",
        )
    accelerator = Accelerator(cpu=settings.device == "cpu")
    device = str(accelerator.device) if settings.device != "cpu" else "cpu"
    if accelerator.mixed_precision != "no":
        raise not_heard("mixed_precision", "'no'", tr("--dtype says what products are computed in"))
    if in_pieces:
        return Fsdp(accelerator, device)
    if in_flat_pieces:
        from glmchat.tuning.sharing.zero import Zero

        return Zero(accelerator, device)
    return Sharing(accelerator, device)


def _asked(kind: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{kind}", "").lower() == "true"
