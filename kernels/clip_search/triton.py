"""`clip_search` on a GPU: a program tries every share on its rows, reading them again from cache each time."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from rewright.kernels.joint_sweep.triton import _divide, _round_half_even
from rewright.kernels.launch import cdiv, device_guard, interpreter

# A warp's width of rows, whose sums over the columns the warps share.
ROWS = 32
COLUMNS = 32
WARPS = 4
STORED = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _guard(scale, greatest, least, STORED: tl.constexpr):
    rounded = tl.minimum(scale, greatest).to(tl.float32)
    if tl.bfloat16 == STORED:
        # To the nearest, ties to even, in the bits: the interpreter's own conversion cuts them off.
        bits = rounded.to(tl.uint32, bitcast=True)
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
        rounded = bits.to(tl.float32, bitcast=True)
    else:
        rounded = rounded.to(STORED).to(tl.float32)
    return tl.where(scale > 0.0, tl.maximum(rounded.to(scale.dtype), least), 1.0)


@triton.jit
def clip_search_kernel(
    weight_ptr, keep_ptr, importance_ptr, shares_ptr, scale_ptr, zero_ptr,
    rows, size, shares, steps, first, last, greatest, least,
    weight_row, weight_column, keep_row, keep_column, importance_stride,
    HAS_KEEP: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, SYMMETRIC: tl.constexpr, STORED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    in_row = row[:, None] < rows
    weight_at = weight_ptr + row[:, None] * weight_row + column[None, :] * weight_column
    keep_at = keep_ptr + row[:, None] * keep_row + column[None, :] * keep_column
    lowest = tl.zeros([BLOCK_R], ACC)
    highest = tl.zeros([BLOCK_R], ACC)
    for start in range(0, size, BLOCK_C):
        inside = in_row & (column < size - start)[None, :]
        if HAS_KEEP:
            inside &= tl.load(keep_at + tl.cast(keep_column, tl.int64) * start, mask=inside, other=0) != 0
        w = tl.load(weight_at + tl.cast(weight_column, tl.int64) * start, mask=inside, other=0.0).to(ACC)
        lowest = tl.minimum(lowest, tl.min(w, axis=1))
        highest = tl.maximum(highest, tl.max(w, axis=1))
    span = tl.zeros([BLOCK_R], ACC) + steps
    best_scale = tl.zeros([BLOCK_R], ACC)
    best_zero = tl.zeros([BLOCK_R], ACC)
    best = tl.zeros([BLOCK_R], ACC)
    for index in range(shares):
        share = tl.load(shares_ptr + index)
        low = lowest * share
        high = highest * share
        if SYMMETRIC:
            scale = _guard(_divide(tl.maximum(-low, high) * 2, span), greatest, least, STORED)
            zero = tl.zeros([BLOCK_R], ACC)
        else:
            scale = _guard(_divide(high - low, span), greatest, least, STORED)
            # Clamped before it is rounded, as the bounds are integers.
            zero = _round_half_even(tl.minimum(tl.maximum(_divide(-low, scale), 0.0), span)) + first
        least_level = (first - zero)[:, None]
        greatest_level = (last - zero)[:, None]
        wide = tl.broadcast_to(scale[:, None], [BLOCK_R, BLOCK_C])
        error = tl.zeros([BLOCK_R], ACC)
        for start in range(0, size, BLOCK_C):
            here = (column < size - start)[None, :]
            inside = in_row & here
            if HAS_KEEP:
                inside &= tl.load(keep_at + tl.cast(keep_column, tl.int64) * start, mask=inside, other=0) != 0
            # A weight that does not count is 0, which every grid has.
            w = tl.load(weight_at + tl.cast(weight_column, tl.int64) * start, mask=inside, other=0.0).to(ACC)
            level = _round_half_even(tl.minimum(tl.maximum(_divide(w, wide), least_level), greatest_level))
            gap = level * wide - w
            gap *= gap
            if HAS_IMPORTANCE:
                at = importance_ptr + (start + column[None, :]) * importance_stride
                gap *= tl.load(at, mask=here, other=0.0).to(ACC)
            error += tl.sum(gap, axis=1)
        better = (error < best) | (index == 0)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
        best = tl.where(better, error, best)
    tl.store(scale_ptr + row, best_scale.to(tl.float32), mask=row < rows)
    tl.store(zero_ptr + row, best_zero.to(tl.float32), mask=row < rows)


def supports(weight: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take this weight."""
    if weight.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


@functools.lru_cache(maxsize=16)
def _shares(shares: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(shares, dtype=dtype, device=device)


def clip_search(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    importance: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    shares: tuple[float, ...],
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero); see the package for the mathematics, shapes and dtypes."""
    rows, size = weight.shape
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    if rows:
        wide = weight.dtype == torch.float64
        mask = None if keep is None else keep.view(torch.uint8)
        facts = torch.finfo(stored)
        with device_guard(weight):
            clip_search_kernel[(cdiv(rows, ROWS),)](
                weight,
                weight if mask is None else mask,
                weight if importance is None else importance,
                _shares(shares, torch.float64 if wide else torch.float32, weight.device),
                scale,
                zero,
                rows,
                size,
                len(shares),
                (1 << bits) - 1,
                -(1 << (bits - 1)),
                (1 << (bits - 1)) - 1,
                facts.max,
                facts.smallest_normal * (facts.eps if stored == torch.float16 else 1),
                *weight.stride(),
                *((1, 1) if mask is None else mask.stride()),
                1 if importance is None else importance.stride(0),
                HAS_KEEP=mask is not None,
                HAS_IMPORTANCE=importance is not None,
                SYMMETRIC=symmetric,
                STORED=STORED[stored],
                ACC=tl.float64 if wide else tl.float32,
                BLOCK_R=ROWS,
                BLOCK_C=COLUMNS,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return scale, zero
