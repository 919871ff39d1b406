"""`predictor_out` on a GPU: a program takes a block of neurons, and lists the active ones by a running sum of them.

There are no atomics: a list is in a program's hands alone, and its order is that of the neurons.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard
from rewright.kernels.neurons import BLOCK, MOST_ROWS, wider
from rewright.kernels.poles import accumulator, refused

# Columns of B in a tile, for one row of t and for more of them: those are multiplied as matrices.
ONE, SEVERAL = 64, 32
WARPS = 8


@triton.jit
def predictor_out_kernel(
    t_ptr, b_ptr, scale_ptr, c_ptr, shift_ptr, index_ptr, count_ptr, shift, tokens, rows, columns,
    t_row, b_row, scale_stride, c_stride,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    token = tl.arange(0, BLOCK_M)
    here = token < tokens
    lane = tl.arange(0, BLOCK_K)
    b_at = b_ptr + row[:, None] * b_row
    total = tl.zeros([BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M], ACC)
    for first in range(0, columns, BLOCK_K):
        k = first + lane
        known = k < columns
        b = tl.load(b_at + k[None, :], mask=inside[:, None] & known[None, :], other=0).to(ACC)
        if BLOCK_M == 1:
            total += b * tl.load(t_ptr + k, mask=known, other=0.0).to(ACC)[None, :]
        else:
            t_at = t_ptr + token.to(tl.int64)[None, :] * t_row + k[:, None]
            t = tl.load(t_at, mask=known[:, None] & here[None, :], other=0.0).to(ACC)
            total = tl.dot(b, t, total, input_precision="ieee", out_dtype=ACC)
    score = tl.sum(total, axis=1)[:, None] if BLOCK_M == 1 else total
    if HAS_SCALE:
        score *= tl.load(scale_ptr + row * scale_stride, mask=inside, other=0.0).to(ACC)[:, None]
    score += tl.load(c_ptr + row * c_stride, mask=inside, other=0.0).to(ACC)[:, None]
    if HAS_SHIFT:
        score += tl.load(shift_ptr).to(ACC)
    else:
        score += shift
    passes = (score > 0) & here[None, :] & inside[:, None]
    active = tl.max(passes.to(tl.int32), axis=1)
    place = tl.cumsum(active, axis=0) - active
    tl.store(index_ptr + block * BLOCK_N + place, row.to(tl.int32), mask=active > 0)
    tl.store(count_ptr + block, tl.sum(active, axis=0))


def supports(tensors: Sequence[torch.Tensor]) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    return refused(*tensors)


def predictor_out(
    t: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    shift: float | torch.Tensor,
    b_scale: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`index` and `count`; see the package for the mathematics, shapes and dtypes."""
    rows, columns = b.shape
    blocks = cdiv(rows, BLOCK)
    index, count = out or (
        torch.empty((blocks, BLOCK), dtype=torch.int32, device=t.device),
        torch.empty(blocks, dtype=torch.int32, device=t.device),
    )
    if rows == 0:
        return index, count
    t = t if t.stride(1) == 1 else t.contiguous()
    b = b if b.stride(1) == 1 else b.contiguous()
    number = not isinstance(shift, torch.Tensor)
    one = len(t) == 1
    with device_guard(t):
        predictor_out_kernel[(blocks,)](
            t,
            b,
            c if b_scale is None else b_scale,
            c,
            c if number else shift,
            index,
            count,
            float(shift) if number else 0.0,
            len(t),
            rows,
            columns,
            t.stride(0),
            b.stride(0),
            1 if b_scale is None else b_scale.stride(0),
            c.stride(0),
            HAS_SCALE=b_scale is not None,
            HAS_SHIFT=not number,
            ACC=accumulator(wider(t.dtype)),
            BLOCK_M=1 if one else MOST_ROWS,
            BLOCK_N=BLOCK,
            BLOCK_K=ONE if one else SEVERAL,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return index, count
