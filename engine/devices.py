"""Is the device there that was asked for?"""

from __future__ import annotations

import torch

from glmchat.core.errors import Usage
from glmchat.core.language import tr


def require_device(device: str) -> None:
    """Raises Usage for a device that this machine, or this torch, does not have. "auto" and "cpu" are always there."""
    kind, _, number = device.partition(":")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            why = tr("this torch is built without CUDA") if torch.version.cuda is None else None
            raise Usage(
                tr("there is no device {device}", device=device) + (f": {why}" if why else ""),
                hint=tr("--device auto takes what is there; `glmchat doctor` tells what that is"),
                code="device.missing",
            )
    elif kind == "mps" and not torch.backends.mps.is_available():
        raise Usage(
            tr("there is no device {device}", device=device),
            hint=tr("--device auto takes what is there; `glmchat doctor` tells what that is"),
            code="device.missing",
        )
