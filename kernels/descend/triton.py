"""`descend` on a GPU: a program holds its rows' gradient of the block in registers and goes through the columns once.

Right-looking: a column's gradient is taken out of the tile by a masked sum (exact, all other terms are zeros) and its
step is added to the later ones. Rows are independent, so the result does not depend on the tile.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.joint_sweep.triton import CONFIGS, MAX_WIDTH, _divide, _round_half_even
from rewright.kernels.launch import cdiv, device_guard, interpreter, next_power_of_2


@triton.jit
def descend_kernel(
    value_ptr, gradient_ptr, hessian_ptr, scale_ptr, zero_ptr, keep_ptr, codes_ptr, new_ptr,
    rows, width, low, high,
    value_row, value_column, gradient_row, gradient_column, hessian_row, hessian_column,
    scale_stride, zero_stride, keep_row, keep_column,
    HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_KEEP: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    in_row = row < rows
    in_column = column < width
    tile = tl.load(
        gradient_ptr + row[:, None] * gradient_row + column[None, :] * gradient_column,
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
    kept_at = keep_ptr + row * keep_row
    value_at = value_ptr + row * value_row
    hessian_at = hessian_ptr + column * hessian_column
    pivot_at = hessian_ptr
    out_at = row
    for j in range(width):
        slope = tl.sum(tl.where(column[None, :] == j, tile, 0.0), axis=1)
        old = tl.load(value_at, mask=in_row, other=0.0).to(ACC)
        z = old - _divide(slope, tl.zeros([BLOCK_R], ACC) + tl.load(pivot_at).to(ACC))
        if HAS_KEEP:
            z = tl.where(tl.load(kept_at, mask=in_row, other=0) != 0, z, 0.0)
            kept_at += keep_column
        if HAS_SCALE:
            # The bounds are integers, so clamping first gives the same level and keeps the rounding in range.
            level = _divide(z, divisor)
            level = _round_half_even(tl.minimum(tl.maximum(level, lowest), highest))
            new = level * scale + 0.0
            tl.store(codes_ptr + out_at, (level + zero).to(tl.int8), mask=in_row)
        else:
            new = z + 0.0
            tl.store(codes_ptr + out_at, tl.zeros([BLOCK_R], tl.int8), mask=in_row)
        tl.store(new_ptr + out_at, new, mask=in_row)
        curvature = tl.load(hessian_at, mask=in_column & (column > j), other=0.0).to(ACC)
        tile += (new - old)[:, None] * curvature[None, :]
        value_at += value_column
        hessian_at += hessian_row
        pivot_at += hessian_row + hessian_column
        out_at += rows


def supports(value: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take this block."""
    if value.shape[1] > MAX_WIDTH:
        return f"it holds at most {MAX_WIDTH} columns in registers and the block has {value.shape[1]}"
    if value.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, dequantised); see the package for the mathematics, shapes and dtypes."""
    rows, width = value.shape
    codes = torch.empty((width, rows), dtype=torch.int8, device=value.device)
    new = torch.empty((width, rows), dtype=value.dtype, device=value.device)
    if rows:
        mask = None if keep is None else keep.view(torch.uint8)
        block_c = max(16, next_power_of_2(width))
        block_r, warps = CONFIGS[block_c]
        with device_guard(value):
            descend_kernel[(cdiv(rows, block_r),)](
                value,
                gradient,
                hessian,
                value if scale is None else scale,
                value if zero is None else zero,
                value if mask is None else mask,
                codes,
                new,
                rows,
                width,
                low,
                high,
                *value.stride(),
                *gradient.stride(),
                *hessian.stride(),
                1 if scale is None else scale.stride(0),
                1 if zero is None else zero.stride(0),
                *((1, 1) if mask is None else mask.stride()),
                HAS_SCALE=scale is not None,
                HAS_ZERO=zero is not None,
                HAS_KEEP=mask is not None,
                ACC=tl.float64 if value.dtype == torch.float64 else tl.float32,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return codes.t(), new.t()
