"""`w4a16_gemv` on a GPU: a program takes a few rows of W and goes through a stretch of their columns once.

Threads read four words of codes at a time. Codes become float32 without a conversion: the bits of a code are put into
the mantissa of 2^23, and 2^23 and the zero point, shifted alike, are taken off again. What a shift left over is a power
of two, which x is divided by beforehand; all of that is exact. Partial sums are kept by unit of words under one scale
and multiplied by it once a unit; they are joined at the end, in an order that the shapes alone set.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter, next_power_of_2


class Config(NamedTuple):
    """Rows of W and words of codes in a tile, warps."""

    rows: int
    words: int
    warps: int


# Rows of x, padded to a power of two -> the tile: 1 KiB of codes a row and step, fewer where more sums are kept.
CONFIGS = {1: Config(4, 256, 4), 2: Config(4, 256, 4), 4: Config(4, 128, 4), 8: Config(4, 128, 4)}
REDUCE = 256
# Below so many programs, columns are split among several.
PROGRAMS = 1024
MOST_PARTS = 16


@triton.jit
def decode(word, place, BITS: tl.constexpr):
    """The codes of int32 words at their places, as float32 2^23 + (unsigned code) * 2^(bits * (place mod 16/bits))."""
    half = word.to(tl.uint32, bitcast=True) >> (place // (16 // BITS) * 16).to(tl.uint32)
    mask = (((1 << BITS) - 1) << (place % (16 // BITS) * BITS)).to(tl.uint32)
    return ((half & mask) | 0x4B000000).to(tl.float32, bitcast=True)


@triton.jit
def w4a16_gemv_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    tokens, rows, columns, words, group_units, span,
    x_row, packed_row, scale_row, scale_column, zero_row, zero_column, bias_stride,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    in_row = row < rows
    in_token = (token < tokens)[:, None, None, None]
    inner = tl.arange(0, UNIT)
    place = tl.arange(0, CODES)
    # What the place of a code in its word multiplies it by.
    weight_of = (1 << (place % (16 // BITS) * BITS)).to(tl.float32)
    x_at = x_ptr + token.to(tl.int64)[:, None, None, None] * x_row
    packed_at = packed_ptr + row[:, None, None] * packed_row
    total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_U], ACC)
    first = part * span
    for start in range(first, first + span, BLOCK_U):
        unit = start + tl.arange(0, BLOCK_U)
        word = unit[:, None] * UNIT + inner[None, :]
        in_word = word < words
        codes = tl.load(packed_at + word[None, :, :], mask=in_row[:, None, None] & in_word[None, :, :], other=0)
        column = word[:, :, None] * CODES + place[None, None, :]
        x = tl.load(x_at + column[None, :, :, :], mask=in_token & (column < columns)[None, :, :, :], other=0.0)
        x = x.to(ACC) * (1.0 / weight_of)[None, None, None, :]
        group = unit // group_units
        known = in_row[:, None] & (unit * UNIT < words)[None, :]
        scale = tl.load(scale_ptr + row[:, None] * scale_row + group[None, :] * scale_column, mask=known, other=0.0)
        offset = tl.full([BLOCK_N, BLOCK_U], 1 << (BITS - 1), tl.float32)
        if HAS_ZERO:
            zero = tl.load(zero_ptr + row[:, None] * zero_row + group[None, :] * zero_column, mask=known, other=0)
            offset += zero.to(tl.float32)
        shift = 8388608.0 + offset[:, :, None, None] * weight_of[None, None, None, :]
        weight = decode(codes[:, :, :, None], place[None, None, None, :], BITS) - shift
        sums = tl.sum(tl.sum(weight.to(ACC)[None, :, :, :, :] * x[:, None, :, :, :], axis=4), axis=3)
        total += sums * scale.to(ACC)[None, :, :]
    joined = tl.sum(total, axis=2)
    if HAS_BIAS:
        joined += tl.load(bias_ptr + row * bias_stride, mask=in_row, other=0.0).to(ACC)[None, :]
    out = (part * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + out, joined, mask=(token < tokens)[:, None] & in_row[None, :])


@triton.jit
def join_kernel(part_ptr, bias_ptr, out_ptr, rows, count, parts, bias_stride, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(part_ptr + tl.cast(part, tl.int64) * count + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % rows * bias_stride, mask=inside, other=0.0).to(total.dtype)
    tl.store(out_ptr + at, total, mask=inside)


def supports(x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int) -> str | None:
    """None, or why the kernel cannot take these operands."""
    if any(t is not None and t.dtype == torch.float64 for t in (x, scale, bias)) and not interpreter():
        return "float64 is for the interpreter only"
    groups = scale.shape[1]
    if groups > 1 and x.shape[1] // groups % (32 // bits):
        return f"groups of {x.shape[1] // groups} columns do not begin at a word of codes"
    return None


def unit(columns: int, groups: int, bits: int) -> int:
    """How many consecutive words, at most four, are always under one scale."""
    words = columns // groups * bits // 32
    return 4 if groups == 1 else next(size for size in (4, 2, 1) if words % size == 0)


def parts(rows: int, units: int, tile: Config, size: int) -> tuple[int, int]:
    """Among how many programs the columns of a row are split, and how many units each takes."""
    block = tile.words // size
    steps = cdiv(units, block)
    wanted = min(cdiv(PROGRAMS, cdiv(rows, tile.rows)), MOST_PARTS, steps)
    each = cdiv(steps, wanted)
    return cdiv(steps, each), each * block


def w4a16_gemv(
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
        return y.zero_() if bias is None else y.copy_(bias)
    x = x if x.stride(1) == 1 else x.contiguous()
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    size = unit(columns, scale.shape[1], bits)
    units = cdiv(words, size)
    padded = next_power_of_2(tokens)
    tile = CONFIGS[padded]
    count, span = parts(rows, units, tile, size)
    acc = torch.promote_types(x.dtype, torch.float32)
    out = y if count == 1 else torch.empty((count, tokens, rows), dtype=acc, device=x.device)
    bias_stride = 1 if bias is None else bias.stride(0)
    with device_guard(x):
        w4a16_gemv_kernel[(cdiv(rows, tile.rows), count)](
            x,
            packed,
            scale,
            scale if zero is None else zero,
            scale if bias is None else bias,
            out,
            tokens,
            rows,
            columns,
            words,
            cdiv(units, scale.shape[1]),
            span,
            x.stride(0),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            bias_stride,
            HAS_ZERO=zero is not None,
            HAS_BIAS=bias is not None and count == 1,
            BITS=bits,
            UNIT=size,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK_M=padded,
            BLOCK_N=tile.rows,
            BLOCK_U=tile.words // size,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        if count > 1:
            numbers = tokens * rows
            join_kernel[(cdiv(numbers, REDUCE),)](
                out,
                out if bias is None else bias,
                y,
                rows,
                numbers,
                count,
                bias_stride,
                HAS_BIAS=bias is not None,
                BLOCK=REDUCE,
                enable_fp_fusion=False,
            )
    return y
