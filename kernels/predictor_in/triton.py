"""`predictor_in` on a GPU: a program takes one row of A, which is a few kilobytes, and all rows of x."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import device_guard, next_power_of_2
from rewright.kernels.neurons import wider
from rewright.kernels.poles import accumulator, refused

# Products in flight: 32 a thread, shared among the rows of x.
ELEMENTS = 4096
WARPS = 4


@triton.jit
def predictor_in_kernel(
    x_ptr, a_ptr, scale_ptr, a0_ptr, out_ptr, tokens, rows, columns, x_row, a_row, scale_stride, a0_stride,
    HAS_SCALE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK_M)
    here = token < tokens
    lane = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_row
    for first in range(0, columns, BLOCK_K):
        k = (first + lane)[None, :]
        known = k < columns
        a = tl.load(a_ptr + row * a_row + k, mask=known, other=0).to(ACC)
        x = tl.load(x_at + k, mask=here[:, None] & known, other=0.0).to(ACC)
        total += x * a
    t = tl.sum(total, axis=1)
    if HAS_SCALE:
        t *= tl.load(scale_ptr + row * scale_stride).to(ACC)
    t += tl.load(a0_ptr + row * a0_stride).to(ACC)
    tl.store(out_ptr + token.to(tl.int64) * rows + row, t, mask=here)


def supports(tensors: Sequence[torch.Tensor]) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    return refused(*tensors)


def predictor_in(
    x: torch.Tensor, a: torch.Tensor, a0: torch.Tensor, a_scale: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """t [B, r]; see the package for the mathematics, shapes and dtypes."""
    rows, columns = a.shape
    wide = wider(x.dtype)
    t = torch.empty((len(x), rows), dtype=wide, device=x.device) if out is None else out
    if t.numel() == 0:
        return t
    x = x if x.stride(1) == 1 else x.contiguous()
    a = a if a.stride(1) == 1 else a.contiguous()
    tokens = next_power_of_2(len(x))
    with device_guard(x):
        predictor_in_kernel[(rows,)](
            x,
            a,
            a0 if a_scale is None else a_scale,
            a0,
            t,
            len(x),
            rows,
            columns,
            x.stride(0),
            a.stride(0),
            1 if a_scale is None else a_scale.stride(0),
            a0.stride(0),
            HAS_SCALE=a_scale is not None,
            ACC=accumulator(wide),
            BLOCK_M=tokens,
            BLOCK_K=min(ELEMENTS // tokens, next_power_of_2(columns)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return t
