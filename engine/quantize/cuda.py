"""cpm_kernels (`glmchat[cuda]`), looked at for NVIDIA cards; what multiplies there is gpu/words.py."""

from __future__ import annotations

from importlib import import_module

import torch

from glmchat.engine.quantize.kernels import Reference


class CpmKernels(Reference):
    """cpm_kernels (`glmchat[cuda]`), looked at and passed over, so that `doctor` can say why.

    The package has no kernel that extracts packed weights: those lived in the checkpoints' own code, which never runs
    here. Its INT8 product takes INT8 activations, which would not be weight-only quantisation.
    """

    name = "cpm_kernels"
    bits = (8,)

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        try:
            import_module("cpm_kernels")
        except Exception as error:  # noqa: BLE001 - RuntimeError without a driver, ModuleNotFoundError for pkg_resources
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return "its INT8 product rounds activations to 8 bits, and it has no kernel that unpacks weights"
