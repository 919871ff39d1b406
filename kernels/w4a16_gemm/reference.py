"""The definition of `w4a16_gemm` and its gradient: W decoded by blocks of rows, or of columns, that fit a cache."""

from __future__ import annotations

import math

import torch

from rewright.kernels.pack.reference import unpack
from rewright.kernels.w4a16_gemv.reference import spread

# Weights decoded at a time.
BLOCK = 1 << 20


def w4a16_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""
    columns, rows = x.shape[1], packed.shape[0]
    y = x.new_empty((x.shape[0], rows))
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    step = max(1, BLOCK // columns) if x.device.type == "cpu" else rows
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight = decode(packed[part], scale[part], None if zero is None else zero[part], bits, x.dtype)
        if bias is None:
            y[:, part] = x @ weight.t()
        else:
            y[:, part] = torch.nn.functional.linear(x, weight, bias[part].to(x.dtype))
    return y


def w4a16_gemm_dx(
    dy: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """(M, K) in the dtype of dy; see the package for the mathematics, shapes and dtypes."""
    rows, groups = scale.shape
    columns = packed.shape[1] * 32 // bits
    dx = dy.new_zeros((dy.shape[0], columns))
    if dx.numel() == 0 or rows == 0:
        return dx
    # Whole words and whole groups, or a stretch of the only group.
    whole = 32 // bits if groups == 1 else math.lcm(columns // groups, 32 // bits)
    step = whole * max(1, BLOCK // (rows * whole)) if dy.device.type == "cpu" else columns
    for start in range(0, columns, step):
        stop = min(columns, start + step)
        words = packed[:, start * bits // 32 : stop * bits // 32]
        part = slice(None) if groups == 1 else slice(start * groups // columns, stop * groups // columns)
        weight = decode(words, scale[:, part], None if zero is None else zero[:, part], bits, dy.dtype)
        dx[:, start:stop] = dy @ weight
    return dx


def decode(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """(rows, words) int32 to the weights (rows, columns) in `dtype`, with the rounding that its arithmetic has."""
    # In float32 the difference and the product of 16-bit numbers are exact, so each weight is rounded once.
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack(packed, bits, packed.shape[1] * 32 // bits)
    return spread(codes, scale.to(dtype).to(wide), zero).to(dtype)
