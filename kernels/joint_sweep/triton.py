"""`joint_sweep` on a GPU: a program holds its rows' whole block in registers and goes through the columns once.

Right-looking: column j is taken out of the tile by a masked sum (exact, all other terms are zeros) and its error is
subtracted from the later columns. Rows are independent, so the result does not depend on the tile.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter, next_power_of_2

MAX_WIDTH = 128

# Padded columns -> (rows, warps): 16 to 32 values a thread, and a program for every few rows.
CONFIGS = {16: (32, 1), 32: (32, 1), 64: (16, 2), 128: (16, 4)}


@triton.jit
def _divide(a, b):
    # Plain `/` on float32 is an approximation on NVIDIA GPUs; on float64 it is IEEE division.
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def _round_half_even(x):
    # Adding 1.5 * 2^p, p the number of mantissa bits, pushes the fraction out under the hardware's rounding rule.
    if x.dtype == tl.float32:
        return (x + 12582912.0) - 12582912.0
    return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def joint_sweep_kernel(
    weight_ptr, factor_ptr, scale_ptr, zero_ptr, keep_ptr, codes_ptr, value_ptr, error_ptr, loss_ptr,
    rows, width, low, high,
    weight_row, weight_column, factor_row, factor_column, scale_stride, zero_stride, keep_row, keep_column,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_KEEP: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    in_row = row < rows
    in_column = column < width
    tile = tl.load(
        weight_ptr + row[:, None] * weight_row + column[None, :] * weight_column,
        mask=in_row[:, None] & in_column[None, :],
        other=0.0,
    ).to(ACC)
    zero = tl.zeros([BLOCK_R], ACC)
    scale = tl.zeros([BLOCK_R], ACC)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + row * scale_stride, mask=in_row, other=0.0).to(ACC)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + row * zero_stride, mask=in_row, other=0).to(ACC)
    # z / inf is 0: a row without a scale gets its zero point.
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    lowest = low - zero
    highest = high - zero
    loss = tl.zeros([BLOCK_R], ACC)
    kept_at = keep_ptr + row * keep_row
    factor_at = factor_ptr + column * factor_column
    pivot_at = factor_ptr
    out_at = row
    for j in range(width):
        w = tl.sum(tl.where(column[None, :] == j, tile, 0.0), axis=1)
        z = w
        if HAS_KEEP:
            z = tl.where(tl.load(kept_at, mask=in_row, other=0) != 0, w, 0.0)
            kept_at += keep_column
        if HAS_SCALE:
            # The bounds are integers, so clamping first gives the same level and keeps the rounding in range.
            level = _divide(z, divisor)
            level = _round_half_even(tl.minimum(tl.maximum(level, lowest), highest))
            q = level * scale + 0.0
            tl.store(codes_ptr + out_at, (level + zero).to(tl.int8), mask=in_row)
        else:
            q = z + 0.0
            tl.store(codes_ptr + out_at, tl.zeros([BLOCK_R], tl.int8), mask=in_row)
        e = _divide(w - q, tl.zeros([BLOCK_R], ACC) + tl.load(pivot_at).to(ACC))
        tl.store(value_ptr + out_at, q, mask=in_row)
        tl.store(error_ptr + out_at, e, mask=in_row)
        loss += e * e
        factor = tl.load(factor_at, mask=in_column & (column > j), other=0.0).to(ACC)
        tile -= e[:, None] * factor[None, :]
        factor_at += factor_row
        pivot_at += factor_row + factor_column
        out_at += rows
    tl.store(loss_ptr + row, loss * 0.5, mask=in_row)


def supports(weight: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take this weight."""
    if weight.shape[1] > MAX_WIDTH:
        return f"it holds at most {MAX_WIDTH} columns in registers and the block has {weight.shape[1]}"
    if weight.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


def joint_sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, dequantised, error, loss); see the package for the mathematics, shapes and dtypes."""
    rows, width = weight.shape
    codes = torch.empty((width, rows), dtype=torch.int8, device=weight.device)
    value = torch.empty((width, rows), dtype=weight.dtype, device=weight.device)
    error = torch.empty_like(value)
    loss = torch.empty(rows, dtype=weight.dtype, device=weight.device)
    if rows:
        mask = None if keep is None else keep.view(torch.uint8)
        block_c = max(16, next_power_of_2(width))
        block_r, warps = CONFIGS[block_c]
        with device_guard(weight):
            joint_sweep_kernel[(cdiv(rows, block_r),)](
                weight,
                factor,
                weight if scale is None else scale,
                weight if zero is None else zero,
                weight if mask is None else mask,
                codes,
                value,
                error,
                loss,
                rows,
                width,
                low,
                high,
                *weight.stride(),
                *factor.stride(),
                1 if scale is None else scale.stride(0),
                1 if zero is None else zero.stride(0),
                *((1, 1) if mask is None else mask.stride()),
                HAS_SCALE=scale is not None,
                HAS_ZERO=zero is not None,
                HAS_KEEP=mask is not None,
                ACC=tl.float64 if weight.dtype == torch.float64 else tl.float32,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return codes.t(), value.t(), error.t(), loss
