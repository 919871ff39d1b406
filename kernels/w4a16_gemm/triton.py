"""`w4a16_gemm` and its gradient on a GPU: weights are decoded in registers, between the load and the product.

The product is taken transposed, W x^T: an operand from registers has to be the left one. Weights are exact in float32
and rounded once to the dtype of x, to what arithmetic in that dtype gives.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter
from rewright.kernels.w4a16_gemv.triton import decode, unit


class Config(NamedTuple):
    """Rows of x, rows and columns of W in a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


NARROW = Config(16, 64, 64, 4, 3)
WIDE = Config(64, 128, 64, 4, 3)
FULL = Config(32, 64, 32, 4, 2)
DX = Config(64, 64, 64, 4, 2)
DX_FULL = Config(32, 64, 32, 4, 2)


@triton.jit
def weights(
    packed_at, scale_at, zero_at, row, unit_index, words, group_units,
    packed_row, scale_row, scale_column, zero_row, zero_column, in_row,
    HAS_ZERO: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of W, (BLOCK_N, BLOCK_K) in DOT."""
    CODES: tl.constexpr = 32 // BITS
    place = tl.arange(0, CODES)
    step = (1 << (place % (16 // BITS) * BITS)).to(tl.float32)
    word = unit_index[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    codes = tl.load(
        packed_at + row[:, None, None] * packed_row + word[None, :, :],
        mask=in_row[:, None, None] & (word < words)[None, :, :],
        other=0,
    )
    group = unit_index // group_units
    known = in_row[:, None] & (unit_index * UNIT < words)[None, :]
    scale = tl.load(scale_at + row[:, None] * scale_row + group[None, :] * scale_column, mask=known, other=0.0)
    offset = tl.full([BLOCK_N, BLOCK_K // (UNIT * CODES)], 1 << (BITS - 1), tl.float32)
    if HAS_ZERO:
        zero = tl.load(zero_at + row[:, None] * zero_row + group[None, :] * zero_column, mask=known, other=0)
        offset += zero.to(tl.float32)
    shift = 8388608.0 + offset[:, :, None, None] * step[None, None, None, :]
    level = decode(codes[:, :, :, None], place[None, None, None, :], BITS) - shift
    # Dividing the scale by a power of two instead would lose bits of the smallest ones.
    level = level * (1.0 / step)[None, None, None, :]
    if DOT == tl.float64:
        weight = level.to(tl.float64) * scale.to(tl.float64)[:, :, None, None]
    else:
        weight = level * scale.to(DOT).to(tl.float32)[:, :, None, None]
    return tl.reshape(weight.to(DOT), [BLOCK_N, BLOCK_K])


@triton.jit
def w4a16_gemm_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr,
    tokens, rows, columns, words, group_units,
    x_row, x_column, packed_row, scale_row, scale_column, zero_row, zero_column, bias_stride,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = BLOCK_K * BITS // (32 * UNIT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = row < rows
    in_token = token < tokens
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[None, :] * x_row
    total = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    for step in range(0, tl.cdiv(columns, BLOCK_K)):
        column = step * BLOCK_K + k
        x = tl.load(
            x_at + column.to(tl.int64)[:, None] * x_column,
            mask=(column < columns)[:, None] & in_token[None, :],
            other=0.0,
        )
        weight = weights(
            packed_ptr, scale_ptr, zero_ptr, row, step * UNITS + tl.arange(0, UNITS), words, group_units,
            packed_row, scale_row, scale_column, zero_row, zero_column, in_row,
            HAS_ZERO, BITS, UNIT, DOT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(weight, x.to(DOT), total, input_precision="ieee", out_dtype=ACC)
    if HAS_BIAS:
        total += tl.load(bias_ptr + row * bias_stride, mask=in_row, other=0.0).to(ACC)[:, None]
    tl.store(y_ptr + token[None, :] * rows + row[:, None], total, mask=in_row[:, None] & in_token[None, :])


@triton.jit
def w4a16_gemm_dx_kernel(
    dy_ptr, packed_ptr, scale_ptr, zero_ptr, dx_ptr,
    tokens, rows, columns, words, group_units,
    dy_row, dy_column, packed_row, scale_row, scale_column, zero_row, zero_column,
    HAS_ZERO: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    UNITS: tl.constexpr = BLOCK_K * BITS // (32 * UNIT)
    unit_index = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_token = token < tokens
    total = tl.zeros([BLOCK_M, BLOCK_K], ACC)
    for start in range(0, rows, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N).to(tl.int64)
        in_row = row < rows
        dy = tl.load(
            dy_ptr + token[:, None] * dy_row + row[None, :] * dy_column,
            mask=in_token[:, None] & in_row[None, :],
            other=0.0,
        )
        weight = weights(
            packed_ptr, scale_ptr, zero_ptr, row, unit_index, words, group_units,
            packed_row, scale_row, scale_column, zero_row, zero_column, in_row,
            HAS_ZERO, BITS, UNIT, DOT, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        total = tl.dot(dy.to(DOT), weight, total, input_precision="ieee", out_dtype=ACC)
    column = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = in_token[:, None] & (column < columns)[None, :]
    tl.store(dx_ptr + token[:, None] * columns + column[None, :], total, mask=inside)


def supports(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> str | None:
    """None, or why the kernel cannot take these operands."""
    if any(t is not None and t.dtype == torch.float64 for t in (x, scale, bias)) and not interpreter():
        return "float64 is for the interpreter only"
    groups, columns = scale.shape[1], packed.shape[1] * 32 // bits
    if groups > 1 and columns // groups % (32 // bits):
        return f"groups of {columns // groups} columns do not begin at a word of codes"
    return None


def _types(dtype: torch.dtype) -> dict[str, tl.dtype]:
    names = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
    return {"DOT": names.get(dtype, tl.float32), "ACC": tl.float64 if dtype == torch.float64 else tl.float32}


def w4a16_gemm(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""
    tokens, columns = x.shape
    rows, words = packed.shape
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    size = unit(columns, scale.shape[1], bits)
    half = x.dtype in (torch.float16, torch.bfloat16)
    tile = FULL if not half else NARROW if tokens <= 16 else WIDE
    with device_guard(x):
        w4a16_gemm_kernel[(cdiv(rows, tile.block_n), cdiv(tokens, tile.block_m))](
            x,
            packed,
            scale,
            scale if zero is None else zero,
            scale if bias is None else bias,
            y,
            tokens,
            rows,
            columns,
            words,
            cdiv(cdiv(words, size), scale.shape[1]),
            *x.stride(),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            1 if bias is None else bias.stride(0),
            HAS_ZERO=zero is not None,
            HAS_BIAS=bias is not None,
            BITS=bits,
            UNIT=size,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k * 4 // bits,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **_types(x.dtype),
        )
    return y


def w4a16_gemm_dx(
    dy: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """(M, K) in the dtype of dy; see the package for the mathematics, shapes and dtypes."""
    tokens, rows = dy.shape
    words = packed.shape[1]
    columns = words * 32 // bits
    dx = torch.empty((tokens, columns), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0:
        return dx
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    size = unit(columns, scale.shape[1], bits)
    tile = DX if dy.dtype in (torch.float16, torch.bfloat16) else DX_FULL
    block_k = tile.block_k * 4 // bits
    with device_guard(dy):
        w4a16_gemm_dx_kernel[(cdiv(columns, block_k), cdiv(tokens, tile.block_m))](
            dy,
            packed,
            scale,
            scale if zero is None else zero,
            dx,
            tokens,
            rows,
            columns,
            words,
            cdiv(cdiv(words, size), scale.shape[1]),
            *dy.stride(),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            HAS_ZERO=zero is not None,
            BITS=bits,
            UNIT=size,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=block_k,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **_types(dy.dtype),
        )
    return dx
