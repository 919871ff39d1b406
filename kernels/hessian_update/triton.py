"""`hessian_update` on a GPU: one program a tile of the lower triangle, which also writes the tile's mirror image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter

# Half precision runs on tensor cores; float32 without TF32 runs on plain units and wants smaller tiles.
# (columns of a tile, tokens a step, warps, stages)
HALF_CONFIG = (128, 32, 8, 3)
FULL_CONFIG = (64, 16, 8, 2)
SMALL_CONFIG = (32, 32, 4, 2)


@triton.jit
def hessian_update_kernel(
    h_ptr, x_ptr, alpha, tokens, columns, h_row, h_column, x_row, x_column,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_i = tl.program_id(0).to(tl.int64)
    tile_j = tl.program_id(1).to(tl.int64)
    if tile_j > tile_i:
        return
    i = tile_i * BLOCK + tl.arange(0, BLOCK)
    j = tile_j * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    left = x_ptr + i[:, None] * x_column
    right = x_ptr + j[None, :] * x_column
    total = tl.zeros([BLOCK, BLOCK], ACC)
    for start in range(0, tokens, BLOCK_K):
        token = k + start
        here = token < tokens
        a = tl.load(left + token[None, :] * x_row, mask=(i < columns)[:, None] & here[None, :], other=0.0)
        b = tl.load(right + token[:, None] * x_row, mask=here[:, None] & (j < columns)[None, :], other=0.0)
        total = tl.dot(a.to(DOT), b.to(DOT), total, input_precision="ieee", out_dtype=ACC)
    # A tile on the diagonal mirrors its own lower half.
    lower = (i[:, None] >= j[None, :]) & (i < columns)[:, None]
    old = h_ptr + i[:, None] * h_row + j[None, :] * h_column
    total = tl.load(old, mask=lower, other=0.0) + alpha * total
    tl.store(old, total, mask=lower)
    mirror = h_ptr + j[None, :] * h_row + i[:, None] * h_column
    tl.store(mirror, total, mask=lower & (i[:, None] > j[None, :]))


def supports(H: torch.Tensor, X: torch.Tensor) -> str | None:
    """None, or why the kernel cannot take these tensors."""
    if torch.float64 in (H.dtype, X.dtype) and not interpreter():
        return "float64 is for the interpreter only"
    return None


def hessian_update(H: torch.Tensor, X: torch.Tensor, alpha: float) -> None:
    """H += alpha X^T X, in place; see the package for shapes and dtypes."""
    tokens, columns = X.shape
    if tokens == 0 or columns == 0:
        return
    acc = tl.float64 if H.dtype == torch.float64 else tl.float32
    half = X.dtype in (torch.float16, torch.bfloat16) and acc is tl.float32
    dot = acc if not half else tl.float16 if X.dtype == torch.float16 else tl.bfloat16
    block, block_k, warps, stages = HALF_CONFIG if half else FULL_CONFIG
    if columns <= 64:
        block, block_k, warps, stages = SMALL_CONFIG
    tiles = cdiv(columns, block)
    with device_guard(H):
        hessian_update_kernel[(tiles, tiles)](
            H,
            X,
            alpha,
            tokens,
            columns,
            *H.stride(),
            *X.stride(),
            DOT=dot,
            ACC=acc,
            BLOCK=block,
            BLOCK_K=block_k,
            num_warps=warps,
            num_stages=stages,
        )
