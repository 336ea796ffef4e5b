"""Packed products on NVIDIA cards: ATen's operators from compute capability 8.0 on, one Triton kernel elsewhere.

None of the project's machines has a GPU: these kernels are checked against Triton's interpreter and compiler in the
tests, and on a user's card by the self-test in kernels.py, which puts the reference in place of what fails.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from glmchat.engine.quantize.kernels import Kernel, Packed, Shape
from glmchat.engine.quantize.reference import Reference

_TILES = 8  # inner k tiles of ATen's layout
_MANY = 64  # activation rows above which a dense product of the dequantised matrix is used


class AtenCuda(Kernel):
    """`_weight_int4pack_mm` and `_weight_int8pack_mm` in bfloat16."""

    name = "aten-cuda"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        return None if major >= 8 else f"compute capability {major}.{minor} has no bfloat16 products"

    def accepts(self, shape: Shape) -> bool:
        if shape.bits == 8:
            return shape.groups == 1
        fits = shape.out_features % 8 == 0 and shape.in_features % (_TILES * 16) == 0
        return fits and shape.group in (32, 64, 128, 256)

    def pack(
        self, shape: Shape, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if minimum is None:
            return {"codes": codes.contiguous(), "scale": scale[:, 0].bfloat16()}
        pairs = (codes[:, 0::2] << 4) | codes[:, 1::2]  # ATen's order: the even input in the high nibble
        zero = torch.stack((scale.T, (minimum + 8 * scale).T), dim=-1)
        return {
            "codes": torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _TILES),
            "pairs": zero.bfloat16().contiguous(),
        }

    def rows(self, shape: Shape, packed: Packed, ids: torch.Tensor) -> torch.Tensor:
        if shape.bits == 8:
            values: torch.Tensor = packed["codes"][ids].float() * packed["scale"][ids].float().unsqueeze(1)
            return values
        # The packed tiles have no rows: multiplying by the identity gives the matrix back, column by column.
        identity = torch.eye(shape.in_features, dtype=torch.bfloat16, device=ids.device)
        return self._product(shape, packed, identity)[:, ids].T.float()

    def _product(self, shape: Shape, packed: Packed, x: torch.Tensor) -> torch.Tensor:
        if shape.bits == 8:
            y: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, packed["codes"], packed["scale"])
        else:
            y = torch.ops.aten._weight_int4pack_mm(x, packed["codes"], shape.group, packed["pairs"])
        return y

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = self._product(shape, packed, x.bfloat16().contiguous()).to(x.dtype)
        return y if bias is None else y + bias.to(y.dtype)


class TritonCuda(Reference):
    """The reference's layout, multiplied without writing the dequantised matrix to memory."""

    name = "triton"

    def unavailable(self) -> str | None:
        if not torch.cuda.is_available():
            return "no CUDA device"
        return None if find_spec("triton") else "triton is not installed"

    def accepts(self, shape: Shape) -> bool:
        return shape.in_features % 2 == 0 and (shape.groups == 1 or shape.group % 32 == 0)

    def linear(self, shape: Shape, packed: Packed, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[0] > _MANY:
            return super().linear(shape, packed, x, bias)
        run = import_module("glmchat.engine.quantize.triton_kernel").run
        low = packed.get("minimum")
        y: torch.Tensor = run(x.half().contiguous(), packed["codes"], packed["scale"], low, shape.bits, shape.group).to(
            x.dtype
        )
        return y if bias is None else y + bias.to(y.dtype)


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
