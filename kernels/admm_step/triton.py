"""`admm_step` on a GPU: one pass over four matrices, bound by memory."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter

BLOCK = 1024
WARPS = 4


@triton.jit
def admm_step_kernel(
    target_ptr, weight_ptr, dual_ptr, keep_ptr, rhs_ptr, columns,
    target_row, target_column, weight_row, weight_column, dual_row, dual_column, keep_row, keep_column,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dual_at = dual_ptr + row * dual_row + column * dual_column
    target = tl.load(target_ptr + row * target_row + column * target_column, mask=inside, other=0.0).to(ACC)
    weight = tl.load(weight_ptr + row * weight_row + column * weight_column, mask=inside, other=0.0).to(ACC)
    keep = tl.load(keep_ptr + row * keep_row + column * keep_column, mask=inside, other=0) != 0
    total = tl.load(dual_at, mask=inside, other=0.0).to(ACC) + weight
    tl.store(dual_at, tl.where(keep, 0.0, total), mask=inside)
    tl.store(rhs_ptr + row * columns + column, tl.where(keep, target + total, target - total), mask=inside)


def supports(target: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take this target."""
    if target.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


def admm_step(target: torch.Tensor, weight: torch.Tensor, dual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The right-hand side, with `dual` brought up to date; see the package for the mathematics, shapes and dtypes."""
    rows, columns = target.shape
    rhs = torch.empty((rows, columns), dtype=target.dtype, device=target.device)
    if rhs.numel():
        mask = keep.view(torch.uint8)
        with device_guard(target):
            admm_step_kernel[(rows, cdiv(columns, BLOCK))](
                target,
                weight,
                dual,
                mask,
                rhs,
                columns,
                *target.stride(),
                *weight.stride(),
                *dual.stride(),
                *mask.stride(),
                ACC=tl.float64 if target.dtype == torch.float64 else tl.float32,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=False,
            )
    return rhs
