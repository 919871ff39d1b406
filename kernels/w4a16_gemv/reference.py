"""The definition of `w4a16_gemv`: decoded in float32 by blocks of rows that stay in a core's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewright.kernels.pack.reference import unpack

# Weights decoded at a time: in float32 they and their codes fit the cache of a core, and calls are few.
BLOCK = 1 << 19


def w4a16_gemv(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""

    def codes(part: slice) -> torch.Tensor:
        return unpack(packed[part], bits, x.shape[1])

    return by_blocks(x, codes, scale, zero, bias)


def by_blocks(
    x: torch.Tensor,
    codes: Callable[[slice], torch.Tensor],
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """x W^T + bias, (M, N) in the dtype of x, of a W of which `codes` gives rows of int8 codes.

    A row of inputs is multiplied at a time: for a few rows faster than a product of matrices, and a row of x yields
    the same bits with whatever others it comes.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    columns, rows = x.shape[1], scale.shape[0]
    inputs = x.to(wide)
    y = inputs.new_zeros((x.shape[0], rows))
    if y.numel() and columns:
        step = max(1, BLOCK // columns) if x.device.type == "cpu" else rows
        for start in range(0, rows, step):
            part = slice(start, start + step)
            weight = spread(codes(part), scale[part].to(wide), None if zero is None else zero[part])
            for out, line in zip(y[:, part], inputs, strict=True):
                out.copy_(torch.mv(weight, line))
    if bias is not None:
        y += bias.to(wide)
    return y.to(x.dtype)


def spread(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """(codes - zero) * scale for int8 (rows, columns) and (rows, groups), in the dtype of the scales."""
    weight = codes.to(scale.dtype)
    grouped = weight.view(*scale.shape, -1)
    if zero is not None:
        grouped -= zero[:, :, None]
    grouped *= scale[:, :, None]
    return weight
