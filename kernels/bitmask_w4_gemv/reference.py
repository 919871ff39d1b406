"""The definition of `bitmask_w4_gemv`: decoded in float32 by blocks of rows that stay in a core's cache."""

from __future__ import annotations

import torch

from rewright.kernels.bitmask.reference import unpack_bitmask
from rewright.kernels.w4a16_gemv.reference import BLOCK, multiply, spread


def bitmask_w4_gemv(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""
    wide = torch.promote_types(x.dtype, torch.float32)
    columns, rows = x.shape[1], mask.shape[0]
    inputs = x.to(wide)
    y = inputs.new_zeros((x.shape[0], rows))
    if y.numel() and columns:
        step = max(1, BLOCK // columns) if x.device.type == "cpu" else rows
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weight = spread(unpack_bitmask(mask[part], values[part]), scale[part].to(wide), None)
            multiply(inputs, weight, y[:, part])
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype)
