"""`cross_update` on a GPU: one program a tile of the sum."""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.hessian_update.triton import FULL, HALF, MAX_STRIDE, SMALL, WIDE, Config
from rewright.kernels.launch import cdiv, device_guard, interpreter


@triton.jit
def cross_update_kernel(
    total_ptr, left_ptr, right_ptr, alpha, tokens, a, b,
    total_row, total_column, left_row, left_column, right_row, right_column,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Offsets inside a tile are 32-bit (`supports` sees to it) and the tile's own base 64-bit: fewer registers.
    first_i = tl.program_id(0).to(tl.int64) * BLOCK_I
    first_j = tl.program_id(1).to(tl.int64) * BLOCK_J
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    k = tl.arange(0, BLOCK_K)
    in_i = (i < a - first_i)[:, None]
    in_j = (j < b - first_j)[None, :]
    left = left_ptr + first_i * left_column
    right = right_ptr + first_j * right_column
    total = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    for start in range(0, tokens, BLOCK_K):
        here = k < tokens - start
        x = tl.load(left + (i[:, None] * left_column + k[None, :] * left_row), mask=in_i & here[None, :], other=0.0)
        y = tl.load(right + (k[:, None] * right_row + j[None, :] * right_column), mask=here[:, None] & in_j, other=0.0)
        total = tl.dot(x.to(DOT), y.to(DOT), total, input_precision="ieee", out_dtype=ACC)
        left += tl.cast(left_row, tl.int64) * BLOCK_K
        right += tl.cast(right_row, tl.int64) * BLOCK_K
    old = (
        total_ptr + first_i * total_row + first_j * total_column + (i[:, None] * total_row + j[None, :] * total_column)
    )
    tl.store(old, tl.load(old, mask=in_i & in_j, other=0.0) + alpha * total, mask=in_i & in_j)


def supports(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    if torch.float64 in (total.dtype, left.dtype, right.dtype) and not interpreter():
        return "float64 is for the interpreter only"
    if max(*total.stride(), *left.stride(), *right.stride()) >= MAX_STRIDE:
        return "a stride does not fit the kernel's 32-bit offsets"
    return None


def config(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> Config:
    """The tile for these tensors, of those that `hessian_update` takes."""
    if min(total.shape) <= 64:
        return SMALL
    if not is_half(total, left, right):
        return FULL
    tensors = (total, left, right)
    aligned = all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    return WIDE if aligned else HALF


def is_half(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
    """True when the products can be taken in half precision and summed in float32."""
    half = left.dtype in (torch.float16, torch.bfloat16)
    return total.dtype == torch.float32 and left.dtype == right.dtype and half


def cross_update(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, alpha: float) -> None:
    """total += alpha left^T right, in place; see the package for shapes and dtypes."""
    a, b = total.shape
    if len(left) == 0 or a == 0 or b == 0:
        return
    acc = tl.float64 if total.dtype == torch.float64 else tl.float32
    half = tl.float16 if left.dtype == torch.float16 else tl.bfloat16
    tile = config(total, left, right)
    with device_guard(total):
        cross_update_kernel[(cdiv(a, tile.block_i), cdiv(b, tile.block_j))](
            total,
            left,
            right,
            alpha,
            len(left),
            a,
            b,
            *total.stride(),
            *left.stride(),
            *right.stride(),
            DOT=half if is_half(total, left, right) else acc,
            ACC=acc,
            BLOCK_I=tile.block_i,
            BLOCK_J=tile.block_j,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
