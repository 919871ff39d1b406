"""`bitmask_w4_gemv` on a GPU: a program takes a few rows of W and goes through a stretch of their groups once.

A thread holds one word of mask, up to four bytes, of each row. The bits set before it in its group say where its codes
begin; those of a byte's eight columns are among the next eight nibbles, of which each kept column takes the first.
Codes become float32 as in `w4a16_gemv`. Nothing but the counts of bits is exchanged between threads.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2
from rewright.kernels.w4a16_gemv.triton import LANES, MAGIC, PROGRAMS, Config, join, no_float64, pick, split

# By the rows of x, padded to a power of two: rows of W in a tile, warps.
# `tile_of` has one for float32.
CONFIGS = {1: Config(4, 4), 2: Config(4, 4), 4: Config(2, 4), 8: Config(2, 4)}
# A group of more words of mask than a tile of this many has no kernel.
MOST_WORDS = 1024


@triton.jit
def _byte_counts(word):
    """Bits set in each byte of uint32 words, in that byte."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (fours + (fours >> 4)) & 0x0F0F0F0F


@triton.jit
def _window(values_at, begin, length, known, UNIT: tl.constexpr):
    """Eight nibbles of a record from the begin-th on, as uint32; 0 past its `length` units of UNIT bytes."""
    first = begin // (2 * UNIT)
    window = tl.zeros(begin.shape, tl.uint64)
    for at in tl.static_range(2 if UNIT == 4 else 5):
        piece = tl.load(values_at + first + at, mask=known & (first + at < length), other=0)
        window |= piece.to(tl.uint64) << (8 * UNIT * at)
    return (window >> (begin % (2 * UNIT) * 4).to(tl.uint64)).to(tl.uint32)


@triton.jit(do_not_specialize=["magic"])
def bitmask_w4_gemv_kernel(
    x_ptr, mask_ptr, values_ptr, scale_ptr, bias_ptr, out_ptr,
    tokens, rows, groups, width, length, span, magic,
    x_row, mask_row, values_row, scale_row, scale_column, bias_stride,
    HAS_BIAS: tl.constexpr, BYTES: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    # Rows past the last are the last again, and not stored.
    source = tl.minimum(row, rows - 1)[:, None, None]
    lane = tl.arange(0, BLOCK_W)
    place = tl.arange(0, 8)[None, None, None, :]
    mask_at = mask_ptr + source * mask_row
    values_at = values_ptr + source * values_row
    scale_at = scale_ptr + tl.minimum(row, rows - 1)[:, None] * scale_row
    x_at = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None, None, None] * x_row + place
    total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_W], ACC)
    first = part * span
    for start in range(first, min(first + span, groups), BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        word = (group[:, None] * width + lane[None, :])[None, :, :]
        known = ((group < groups)[:, None] & (lane < width)[None, :])[None, :, :]
        bits = tl.load(mask_at + word, mask=known, other=0).to(tl.uint32)
        counts = _byte_counts(bits)
        upto = counts * 0x01010101
        before = tl.cumsum((upto >> 24).to(tl.int32), axis=2) - (upto >> 24).to(tl.int32)
        record = values_at + group[None, :, None] * length
        sums = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_G, BLOCK_W], ACC)
        for at in range(BYTES):
            byte = (bits >> (8 * at)) & 0xFF
            window = _window(record, before + (((upto - counts) >> (8 * at)) & 0xFF).to(tl.int32), length, known, UNIT)
            x = tl.load(x_at + ((word * BYTES + at) * 8)[:, :, :, None], mask=known[:, :, :, None], other=0.0).to(ACC)
            for column in tl.static_range(8):
                stays = (byte & (1 << column)) != 0
                level = ((window & 0xF) | magic).to(tl.float32, bitcast=True) - 8388616.0
                weight = tl.where(stays, level, 0.0).to(ACC)
                sums += weight[None, :, :, :] * pick(x, place, column)[:, None, :, :]
                window = tl.where(stays, window >> 4, window)
        scale = tl.load(scale_at + group[None, :] * scale_column, mask=(group < groups)[None, :], other=0.0)
        total += sums * scale.to(ACC)[None, :, :, None]
    joined = tl.sum(tl.sum(total, axis=3), axis=2)
    in_row = row < rows
    if HAS_BIAS:
        joined += tl.load(bias_ptr + row * bias_stride, mask=in_row, other=0.0).to(ACC)[None, :]
    out = (part * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + out, joined, mask=(token < tokens)[:, None] & in_row[None, :])


def supports(x: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """None, or why the kernel cannot take these operands."""
    words = mask.shape[2] // _bytes(mask.shape[2], 4)
    if words > MOST_WORDS:
        return f"it holds at most {MOST_WORDS} words of a group's mask and the group has {words}"
    return no_float64(x, scale, bias)


def _bytes(length: int, most: int) -> int:
    """The greatest power of two, at most `most`, that divides a length."""
    return next(size for size in (4, 2, 1) if size <= most and length % size == 0)


def bitmask_w4_gemv(
    x: torch.Tensor, mask: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """(M, N) in the dtype of x; see the package for the mathematics, shapes and dtypes."""
    tokens, columns = x.shape
    rows, groups, length = mask.shape
    y = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    if columns == 0:
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = x if x.stride(1) == 1 else x.contiguous()
    size = _bytes(length, 4)
    unsigned = {4: torch.uint32, 2: torch.uint16, 1: torch.uint8}
    words = mask.contiguous().view(unsigned[size])
    width = words.shape[2]
    unit = 4 if values.shape[2] % 4 == 0 else 1
    units = values.contiguous().view(unsigned[unit])
    padded = next_power_of_2(tokens)
    tile = tile_of(padded, x.dtype == torch.float32)
    block_w, block_g = blocks(width, tile)
    count, span = split(groups, block_g, cdiv(rows, tile.rows), PROGRAMS)
    acc = torch.promote_types(x.dtype, torch.float32)
    out = y if count == 1 else torch.empty((count, tokens, rows), dtype=acc, device=x.device)
    with device_guard(x):
        bitmask_w4_gemv_kernel[(cdiv(rows, tile.rows), count)](
            x,
            words,
            units,
            scale,
            scale if bias is None else bias,
            out,
            tokens,
            rows,
            groups,
            width,
            units.shape[2],
            span,
            MAGIC,
            x.stride(0),
            groups * width,
            groups * units.shape[2],
            *scale.stride(),
            1 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None and count == 1,
            BYTES=size,
            UNIT=unit,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK_M=padded,
            BLOCK_N=tile.rows,
            BLOCK_G=block_g,
            BLOCK_W=block_w,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        if count > 1:
            join(out, bias, y)
    return y


def tile_of(tokens: int, full: bool) -> Config:
    """The tile for so many rows of x, a power of two, in float32 or less."""
    tile = CONFIGS[tokens]
    return tile._replace(rows=1) if full else tile


def blocks(width: int, tile: Config) -> tuple[int, int]:
    """Words of a group, padded to a power of two, and groups in a tile, which is a word a thread where it can be."""
    block_w = next_power_of_2(width)
    return block_w, max(1, tile.warps * LANES // block_w)
