"""`reduce_add` on a GPU: a program takes a few columns of a row and many parts of them at once.

Some hundred parts lie in the second-level cache, and what counts is how many loads are under way.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2
from rewright.kernels.poles import accumulator, refused

# Parts and columns of a tile: a warp reads 128 bytes of a part.
PARTS, COLUMNS = 64, 32
WARPS = 4


@triton.jit
def reduce_add_kernel(
    partial_ptr, bias_ptr, residual_ptr, out_ptr, parts, width, part_stride, row_stride,
    bias_stride, residual_row, residual_column,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < width
    at = partial_ptr + row * row_stride + column[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_D], ACC)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        known = (part < parts)[:, None] & inside[None, :]
        total += tl.load(at + part.to(tl.int64)[:, None] * part_stride, mask=known, other=0.0)
    y = tl.sum(total, axis=0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column * bias_stride, mask=inside, other=0.0).to(ACC)
    if HAS_RESIDUAL:
        residual_at = residual_ptr + row * residual_row + column * residual_column
        y += tl.load(residual_at, mask=inside, other=0.0).to(ACC)
    tl.store(out_ptr + row * width + column, y, mask=inside)


def supports(tensors: Sequence[torch.Tensor]) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    return refused(*tensors)


def reduce_add(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """y [B, d]; see the package for the mathematics, shapes and dtypes."""
    parts, rows, width = partial.shape
    y = torch.empty((rows, width), dtype=dtype, device=partial.device) if out is None else out
    if y.numel() == 0:
        return y
    with device_guard(partial):
        reduce_add_kernel[(cdiv(width, COLUMNS), rows)](
            partial,
            partial if bias is None else bias,
            partial if residual is None else residual,
            y,
            parts,
            width,
            partial.stride(0),
            partial.stride(1),
            1 if bias is None else bias.stride(0),
            *((1, 1) if residual is None else residual.stride()),
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            ACC=accumulator(partial.dtype),
            BLOCK_P=min(PARTS, next_power_of_2(parts)),
            BLOCK_D=COLUMNS,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y
