"""`thresholded_linear` on a GPU: a program takes some outputs and its share of the columns of x.

What is not past its threshold is masked where the matrix is loaded: its row lies together, and no byte of it crosses.
Shares depend on shapes and the device alone, and nobody has to be told how many columns are read.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter, next_power_of_2
from rewright.kernels.neurons import wider
from rewright.kernels.poles import accumulator, refused


class Config(NamedTuple):
    """Columns of x at once, and outputs."""

    columns: int
    outputs: int


# By the rows of x, padded to a power of two: 16 sums a thread.
CONFIGS = {1: Config(8, 512), 2: Config(4, 512), 4: Config(4, 256), 8: Config(2, 256), 16: Config(2, 128)}
WARPS = 8
# Programs for each multiprocessor, and columns that are worth a program.
PROGRAMS, FEWEST = 2, 64
# In the interpreter there is no device to ask.
INTERPRETED = 3


@triton.jit
def thresholded_linear_kernel(
    x_ptr, w_ptr, threshold_ptr, out_ptr, tokens, columns, outputs, x_row, x_column, w_row, threshold_stride,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    part, parts = tl.program_id(1), tl.num_programs(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    token = tl.arange(0, BLOCK_M)
    here = token < tokens
    several = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token.to(tl.int64)[:, None] * x_row
    begin, end = part * columns // parts, (part + 1) * columns // parts
    total = tl.zeros([BLOCK_M, BLOCK_K, BLOCK_N], ACC)
    for first in range(begin, end, BLOCK_K):
        k = first + several
        known = k < end
        x = tl.load(x_at + k[None, :] * x_column, mask=here[:, None] & known[None, :], other=0.0).to(ACC)
        past = tl.load(threshold_ptr + k * threshold_stride, mask=known, other=float("inf")).to(ACC)
        read = tl.max(((tl.abs(x) > past[None, :]) & here[:, None]).to(tl.int32), axis=0) > 0
        w_at = w_ptr + k.to(tl.int64)[:, None] * w_row + n[None, :]
        w = tl.load(w_at, mask=read[:, None] & inside[None, :], other=0.0).to(ACC)
        total += x[:, :, None] * w[None, :, :]
    out_at = out_ptr + (part.to(tl.int64) * tokens + token[:, None]) * outputs + n[None, :]
    tl.store(out_at, tl.sum(total, axis=1), mask=here[:, None] & inside[None, :])


def supports(tensors: Sequence[torch.Tensor]) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    return refused(*tensors)


def parts_of(x: torch.Tensor, outputs: int) -> int:
    """Into how many shares the columns of x go."""
    if interpreter():
        return INTERPRETED
    blocks = cdiv(outputs, CONFIGS[next_power_of_2(max(1, len(x)))].outputs)
    programs = PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count
    return max(1, min(programs // blocks, cdiv(x.shape[1], FEWEST)))


def thresholded_linear(
    x: torch.Tensor, weight_t: torch.Tensor, threshold: torch.Tensor, out: torch.Tensor | None
) -> torch.Tensor:
    """`partial`; see the package for the mathematics, shapes and dtypes."""
    columns, outputs = weight_t.shape
    if out is None:
        shape = (parts_of(x, outputs), len(x), outputs)
        out = torch.empty(shape, dtype=wider(x.dtype), device=x.device)
    if out.numel() == 0:
        return out
    weight_t = weight_t if weight_t.stride(1) == 1 else weight_t.contiguous()
    tokens = next_power_of_2(len(x))
    tile = CONFIGS[tokens]
    with device_guard(x):
        thresholded_linear_kernel[(cdiv(outputs, tile.outputs), len(out))](
            x,
            weight_t,
            threshold,
            out,
            len(x),
            columns,
            outputs,
            x.stride(0),
            x.stride(1),
            weight_t.stride(0),
            threshold.stride(0),
            ACC=accumulator(out.dtype),
            BLOCK_M=tokens,
            BLOCK_K=tile.columns,
            BLOCK_N=min(tile.outputs, next_power_of_2(outputs)),
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return out
