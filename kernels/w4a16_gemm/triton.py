"""`w4a16_gemm` and its gradient on a GPU: weights are decoded in registers, between the load and the product.

The codes of a thread's words are woven into eight columns that lie together, which go to the product's operand at once.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard
from rewright.kernels.w4a16_gemv.triton import MAGIC, decode, join, split, step_of


class Config(NamedTuple):
    """Rows of x, rows of W and words of a row of W in a tile, warps, pipeline stages."""

    block_m: int
    block_n: int
    words: int
    warps: int
    stages: int


# Up to 16 and 64 rows of x, where reading W is the work and its columns are split among programs; then more.
NARROW = Config(16, 64, 16, 4, 4)
MIDDLE = Config(64, 64, 8, 4, 3)
WIDE = Config(128, 128, 8, 8, 3)
# float32 without TF32 runs on the plain units.
FULL = Config(32, 64, 4, 4, 2)
DX = Config(128, 64, 16, 8, 3)
DX_FULL = Config(32, 32, 8, 4, 2)
# AMD's shared memory is smaller.
SMALL = Config(64, 64, 8, 4, 2)
PROGRAMS = 256


@triton.jit
def _scaled(codes, offset, scale, magic, PLACE: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr):
    """The weights at a place of words, in DOT. They are exact before they are rounded to it, once."""
    STEP: tl.constexpr = step_of(PLACE, BITS)
    level = decode(codes, magic, PLACE, BITS) - (8388608.0 + offset * STEP)
    # A scale below 2^-100 may lose bits here; no weight that counts has one.
    if tl.float64 == DOT:
        return level.to(tl.float64) * (scale.to(tl.float64) * (1.0 / STEP))
    return (level * (scale.to(DOT).to(tl.float32) * (1.0 / STEP))).to(DOT)


@triton.jit
def _woven(
    codes, offset, scale, magic, FIRST: tl.constexpr, STRIDE: tl.constexpr, BITS: tl.constexpr, DOT: tl.constexpr
):
    """The weights at places FIRST, FIRST + STRIDE, .. of words, in the order of columns."""
    if STRIDE * BITS == 32:
        weight = _scaled(codes, offset, scale, magic, FIRST, BITS, DOT)
    else:
        even = _woven(codes, offset, scale, magic, FIRST, 2 * STRIDE, BITS, DOT)
        odd = _woven(codes, offset, scale, magic, FIRST + STRIDE, 2 * STRIDE, BITS, DOT)
        weight = tl.interleave(even, odd)
    return weight


@triton.jit
def _grid(
    scale_at, zero_at, word, words, scale_column, zero_column,
    HAS_ZERO: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
):  # fmt: skip
    """The scale of each word of each row, and its zero point as what to take off an unsigned code."""
    known = word < words
    group = word // GROUP_WORDS if GROUP_WORDS else word * 0
    scale = tl.load(scale_at + group * scale_column, mask=known, other=0.0)
    offset = tl.full(scale.shape, 1 << (BITS - 1), tl.float32)
    if HAS_ZERO:
        offset += tl.load(zero_at + group * zero_column, mask=known, other=0).to(tl.float32)
    return scale, offset


@triton.jit(do_not_specialize=["magic"])
def w4a16_gemm_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    tokens, rows, words, span, magic,
    x_row, x_column, packed_row, scale_row, scale_column, zero_row, zero_column, bias_stride,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    part = tl.program_id(2)
    row = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # What lies past the last row is the last again, and not stored.
    source = tl.minimum(row, rows - 1)[:, None]
    lane = tl.arange(0, BLOCK_W)
    k = tl.arange(0, BLOCK_W * CODES)
    x_at = x_ptr + tl.minimum(token, tokens - 1)[:, None] * x_row
    packed_at = packed_ptr + source * packed_row
    scale_at = scale_ptr + source * scale_row
    zero_at = zero_ptr + source * zero_row
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    first = part * span
    scale, offset = _grid(
        scale_at, zero_at, (first + lane)[None, :], words, scale_column, zero_column, HAS_ZERO, BITS, GROUP_WORDS
    )
    for start in range(first, min(first + span, words), BLOCK_W):
        word = (start + lane)[None, :]
        codes = tl.load(packed_at + word, mask=word < words, other=0).to(tl.uint32, bitcast=True)
        column = (start * CODES + k).to(tl.int64)
        x = tl.load(x_at + column[None, :] * x_column, mask=(column < words * CODES)[None, :], other=0.0)
        # What the next step multiplies by is on its way during this one: two bytes are too few to be loaded ahead.
        after, shifted = _grid(
            scale_at, zero_at, word + BLOCK_W, words, scale_column, zero_column, HAS_ZERO, BITS, GROUP_WORDS
        )
        weight = _woven(codes, offset, scale, magic, 0, 1, BITS, DOT)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee", out_dtype=ACC)
        scale, offset = after, shifted
    if HAS_BIAS:
        total += tl.load(bias_ptr + tl.minimum(row, rows - 1) * bias_stride).to(ACC)[None, :]
    at = (part * tokens.to(tl.int64) + token)[:, None] * rows + row[None, :]
    tl.store(out_ptr + at, total, mask=(token < tokens)[:, None] & (row < rows)[None, :])


@triton.jit(do_not_specialize=["magic"])
def w4a16_gemm_dx_kernel(
    dy_ptr, packed_ptr, scale_ptr, zero_ptr, dx_ptr,
    tokens, rows, words, magic,
    dy_row, dy_column, packed_row, scale_row, scale_column, zero_row, zero_column,
    HAS_ZERO: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    token = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) * BLOCK_W
    word = (first + tl.arange(0, BLOCK_W))[None, :]
    line = tl.arange(0, BLOCK_N).to(tl.int64)
    dy_at = dy_ptr + tl.minimum(token, tokens - 1)[:, None] * dy_row
    total = tl.zeros([BLOCK_M, BLOCK_W * CODES], ACC)
    source = tl.minimum(line, rows - 1)[:, None]
    scale, offset = _grid(
        scale_ptr + source * scale_row, zero_ptr + source * zero_row,
        word, words, scale_column, zero_column, HAS_ZERO, BITS, GROUP_WORDS,
    )  # fmt: skip
    for start in range(0, rows, BLOCK_N):
        row = start + line
        dy = tl.load(dy_at + row[None, :] * dy_column, mask=(row < rows)[None, :], other=0.0)
        source = tl.minimum(row, rows - 1)[:, None]
        codes = tl.load(packed_ptr + source * packed_row + word, mask=word < words, other=0)
        source = tl.minimum(row + BLOCK_N, rows - 1)[:, None]
        after, shifted = _grid(
            scale_ptr + source * scale_row, zero_ptr + source * zero_row,
            word, words, scale_column, zero_column, HAS_ZERO, BITS, GROUP_WORDS,
        )  # fmt: skip
        weight = _woven(codes.to(tl.uint32, bitcast=True), offset, scale, magic, 0, 1, BITS, DOT)
        total = tl.dot(dy, weight, total, input_precision="ieee", out_dtype=ACC)
        scale, offset = after, shifted
    columns = words * CODES
    column = first * CODES + tl.arange(0, BLOCK_W * CODES).to(tl.int64)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    tl.store(dx_ptr + token[:, None] * columns + column[None, :], total, mask=inside)


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
    tile = tile_of(tokens, x)
    block_w = max(1, tile.words * bits // 4)
    count, span = 1, words
    if tokens <= MIDDLE.block_m:
        count, span = split(words, block_w, cdiv(rows, tile.block_n), PROGRAMS)
    acc = torch.promote_types(x.dtype, torch.float32)
    out = y if count == 1 else torch.empty((count, tokens, rows), dtype=acc, device=x.device)
    with device_guard(x):
        w4a16_gemm_kernel[(cdiv(tokens, tile.block_m), cdiv(rows, tile.block_n), count)](
            x,
            packed,
            scale,
            scale if zero is None else zero,
            scale if bias is None else bias,
            out,
            tokens,
            rows,
            words,
            span,
            MAGIC,
            *x.stride(),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            1 if bias is None else bias.stride(0),
            HAS_ZERO=zero is not None,
            HAS_BIAS=bias is not None and count == 1,
            BITS=bits,
            GROUP_WORDS=0 if scale.shape[1] == 1 else words // scale.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_W=block_w,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **_types(x.dtype),
        )
        if count > 1:
            join(out, bias, y)
    return y


def tile_of(tokens: int, x: torch.Tensor) -> Config:
    """The tile for so many rows of x."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return FULL
    if tokens <= NARROW.block_m:
        return NARROW
    if torch.version.hip is not None:
        return SMALL
    return MIDDLE if tokens <= MIDDLE.block_m else WIDE


def w4a16_gemm_dx(
    dy: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, bits: int
) -> torch.Tensor:
    """(M, K) in the dtype of dy; see the package for the mathematics, shapes and dtypes."""
    tokens, rows = dy.shape
    words = packed.shape[1]
    columns = words * 32 // bits
    dx = torch.empty((tokens, columns), dtype=dy.dtype, device=dy.device)
    if dx.numel() == 0 or rows == 0:
        return dx.zero_()
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    tile = DX_FULL
    if dy.dtype in (torch.float16, torch.bfloat16):
        tile = DX if torch.version.hip is None else SMALL
    block_w = max(1, tile.words * bits // 4)
    with device_guard(dy):
        w4a16_gemm_dx_kernel[(cdiv(words, block_w), cdiv(tokens, tile.block_m))](
            dy,
            packed,
            scale,
            scale if zero is None else zero,
            dx,
            tokens,
            rows,
            words,
            MAGIC,
            *dy.stride(),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            HAS_ZERO=zero is not None,
            BITS=bits,
            GROUP_WORDS=0 if scale.shape[1] == 1 else words // scale.shape[1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_W=block_w,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **_types(dy.dtype),
        )
    return dx
