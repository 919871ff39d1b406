"""`hessian_update` on a GPU: one program a tile of the lower triangle, then one pass that mirrors it.

Mirroring in the first kernel would save reading H again, but its epilogue then spills registers.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter


class Config(NamedTuple):
    """Rows and columns of a tile of H, tokens a step, warps, pipeline stages."""

    block_i: int
    block_j: int
    block_k: int
    warps: int
    stages: int


# Tensor cores want the wide tile; its registers suffice only where loads and stores are vectors.
WIDE = Config(128, 64, 32, 8, 3)
HALF = Config(64, 64, 32, 4, 3)
# float32 without TF32 runs on the plain units.
FULL = Config(64, 64, 16, 8, 2)
SMALL = Config(32, 32, 32, 4, 2)
MIRROR = 32
# 128 of these in a tile stay below 2^31.
MAX_STRIDE = 1 << 24


@triton.jit
def hessian_update_kernel(
    h_ptr, x_ptr, alpha, tokens, columns, h_row, h_column, x_row, x_column,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_i = tl.program_id(0).to(tl.int64) * BLOCK_I
    first_j = tl.program_id(1).to(tl.int64) * BLOCK_J
    if first_j >= first_i + BLOCK_I:
        return
    # Offsets inside a tile are 32-bit (`supports` sees to it) and the tile's own base 64-bit: fewer registers.
    i = tl.arange(0, BLOCK_I)
    j = tl.arange(0, BLOCK_J)
    k = tl.arange(0, BLOCK_K)
    in_i = (i < columns - first_i)[:, None]
    in_j = (j < columns - first_j)[None, :]
    left = x_ptr + first_i * x_column
    right = x_ptr + first_j * x_column
    total = tl.zeros([BLOCK_I, BLOCK_J], ACC)
    for start in range(0, tokens, BLOCK_K):
        here = k < tokens - start
        a = tl.load(left + (i[:, None] * x_column + k[None, :] * x_row), mask=in_i & here[None, :], other=0.0)
        b = tl.load(right + (k[:, None] * x_row + j[None, :] * x_column), mask=here[:, None] & in_j, other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision="ieee", out_dtype=ACC)
        left += tl.cast(x_row, tl.int64) * BLOCK_K
        right += tl.cast(x_row, tl.int64) * BLOCK_K
    old = h_ptr + first_i * h_row + first_j * h_column + (i[:, None] * h_row + j[None, :] * h_column)
    tl.store(old, tl.load(old, mask=in_i & in_j, other=0.0) + alpha * total, mask=in_i & in_j)


@triton.jit
def mirror_kernel(h_ptr, columns, h_row, h_column, BLOCK: tl.constexpr):
    tile_i = tl.program_id(0).to(tl.int64)
    tile_j = tl.program_id(1).to(tl.int64)
    if tile_j > tile_i:
        return
    i = (tile_i * BLOCK + tl.arange(0, BLOCK))[:, None]
    j = (tile_j * BLOCK + tl.arange(0, BLOCK))[None, :]
    lower = (i > j) & (i < columns)
    tl.store(h_ptr + j * h_row + i * h_column, tl.load(h_ptr + i * h_row + j * h_column, mask=lower), mask=lower)


def supports(H: torch.Tensor, X: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    if torch.float64 in (H.dtype, X.dtype) and not interpreter():
        return "float64 is for the interpreter only"
    if max(*H.stride(), *X.stride()) >= MAX_STRIDE:
        return "a stride does not fit the kernel's 32-bit offsets"
    return None


def config(H: torch.Tensor, X: torch.Tensor) -> Config:
    """The tile for these tensors."""
    if H.shape[0] <= 64:
        return SMALL
    if not is_half(H, X):
        return FULL
    aligned = all(t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.data_ptr() % 16 == 0 for t in (H, X))
    return WIDE if aligned else HALF


def is_half(H: torch.Tensor, X: torch.Tensor) -> bool:
    """True when the products can be taken in half precision and summed in float32."""
    return H.dtype == torch.float32 and X.dtype in (torch.float16, torch.bfloat16)


def hessian_update(H: torch.Tensor, X: torch.Tensor, alpha: float) -> None:
    """H += alpha X^T X, in place; see the package for shapes and dtypes."""
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    acc = tl.float64 if H.dtype == torch.float64 else tl.float32
    half = tl.float16 if X.dtype == torch.float16 else tl.bfloat16
    tile = config(H, X)
    grid = (cdiv(columns, tile.block_i), cdiv(columns, tile.block_j))
    with device_guard(H):
        hessian_update_kernel[grid](
            H,
            X,
            alpha,
            tokens,
            columns,
            *H.stride(),
            *X.stride(),
            DOT=half if is_half(H, X) else acc,
            ACC=acc,
            BLOCK_I=tile.block_i,
            BLOCK_J=tile.block_j,
            BLOCK_K=tile.block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
        tiles = cdiv(columns, MIRROR)
        mirror_kernel[(tiles, tiles)](H, columns, *H.stride(), BLOCK=MIRROR, enable_fp_fusion=False)
