"""`bitmask_w4_gemv` on a GPU: a program takes a few rows of W and goes through a stretch of their groups once.

A mask is read as words of up to four bytes. Counting their bits says which of the group's codes the first kept column
of a byte has; the codes of its eight columns are the eight nibbles from there on, and the bits of the byte below a
column say which of those it has.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter, next_power_of_2
from rewright.kernels.w4a16_gemv.triton import MOST_PARTS, PROGRAMS, REDUCE, join_kernel

# Bytes of mask in a tile, rows of W, warps.
BYTES = 128
ROWS = 4
WARPS = 4
# A group of more bytes of mask than this has no kernel.
MOST_BYTES = 4096


@triton.jit
def _byte_counts(word):
    """Bits set in each byte of uint32 words, in that byte."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (fours + (fours >> 4)) & 0x0F0F0F0F


@triton.jit
def _eighths(byte):
    """Bit p of a byte to bit 4p of a word, for uint32."""
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    return (spread | (spread << 3)) & 0x11111111


@triton.jit
def bitmask_w4_gemv_kernel(
    x_ptr, mask_ptr, values_ptr, scale_ptr, bias_ptr, out_ptr,
    tokens, rows, groups, width, kept, span,
    x_row, mask_row, values_row, scale_row, scale_column, bias_stride,
    HAS_BIAS: tl.constexpr, BYTES: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    in_row = row < rows
    in_token = token < tokens
    word = tl.arange(0, BLOCK_W)
    byte = tl.arange(0, BYTES)
    place = tl.arange(0, 8)
    mask_at = mask_ptr + row[:, None, None] * mask_row
    values_at = values_ptr + row[:, None, None, None] * values_row
    x_at = x_ptr + token.to(tl.int64)[:, None, None, None, None] * x_row
    total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_G], ACC)
    first = part * span
    for start in range(first, first + span, BLOCK_G):
        group = start + tl.arange(0, BLOCK_G)
        inside = (group < groups)[:, None] & (word < width)[None, :]
        at = group[:, None] * width + word[None, :]
        bits = tl.load(mask_at + at[None, :, :], mask=in_row[:, None, None] & inside[None, :, :], other=0)
        bits = bits.to(tl.uint32)
        counts = _byte_counts(bits)
        upto = counts * 0x01010101
        whole = (upto >> 24).to(tl.int32)
        before = tl.cumsum(whole, axis=2) - whole
        shift = (8 * byte).to(tl.uint32)[None, None, None, :]
        begin = before[:, :, :, None] + (((upto - counts)[:, :, :, None] >> shift) & 0xFF).to(tl.int32)
        eight = (bits[:, :, :, None] >> shift) & 0xFF
        keep = _eighths(eight)
        # Nibble p: how many columns of the byte are kept before its p-th.
        ahead = keep * 0x11111111 - keep
        nibble = begin[:, :, :, :, None] + ((ahead[:, :, :, :, None] >> (4 * place).to(tl.uint32)) & 0xF).to(tl.int32)
        stays = ((eight[:, :, :, :, None] >> place.to(tl.uint32)) & 1) != 0
        # A mask with too many bits must not lead out of the record.
        inner = stays & (nibble < 2 * kept)
        record = values_at + group[None, :, None, None] * kept
        pair = tl.load(record[:, :, :, :, None] + nibble // 2, mask=inner, other=0).to(tl.int32)
        code = ((pair >> (nibble % 2 * 4)) & 0xF) - 8
        weight = tl.where(inner, code.to(ACC), 0.0)
        column = (at[:, :, None] * BYTES + byte[None, None, :])[:, :, :, None] * 8 + place[None, None, None, :]
        here = in_token[:, None, None, None, None] & inside[None, :, :, None, None]
        x = tl.load(x_at + column[None, :, :, :, :], mask=here, other=0.0).to(ACC)
        sums = tl.sum(tl.sum(weight[None, :, :, :, :, :] * x[:, None, :, :, :, :], axis=5), axis=4)
        known = in_row[:, None] & (group < groups)[None, :]
        scale = tl.load(scale_ptr + row[:, None] * scale_row + group[None, :] * scale_column, mask=known, other=0.0)
        total += tl.sum(sums, axis=3) * scale.to(ACC)[None, :, :]
    joined = tl.sum(total, axis=2)
    if HAS_BIAS:
        joined += tl.load(bias_ptr + row * bias_stride, mask=in_row, other=0.0).to(ACC)[None, :]
    out = (part * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + out, joined, mask=in_token[:, None] & in_row[None, :])


def supports(x: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> str | None:
    """None, or why the kernel cannot take these operands."""
    if any(t is not None and t.dtype == torch.float64 for t in (x, scale, bias)) and not interpreter():
        return "float64 is for the interpreter only"
    if mask.shape[2] > MOST_BYTES:
        return f"it holds at most {8 * MOST_BYTES} columns of a group and the group has {8 * mask.shape[2]}"
    return None


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
    size = 4 if length % 4 == 0 else 2 if length % 2 == 0 else 1
    words = mask.contiguous().view({4: torch.uint32, 2: torch.uint16, 1: torch.uint8}[size])
    values = values.contiguous()
    width = length // size
    block_w = next_power_of_2(width)
    block_g = max(1, BYTES // (block_w * size))
    steps = cdiv(groups, block_g)
    wanted = min(cdiv(PROGRAMS, cdiv(rows, ROWS)), MOST_PARTS, steps)
    span = cdiv(steps, wanted) * block_g
    count = cdiv(groups, span)
    acc = torch.promote_types(x.dtype, torch.float32)
    out = y if count == 1 else torch.empty((count, tokens, rows), dtype=acc, device=x.device)
    bias_stride = 1 if bias is None else bias.stride(0)
    with device_guard(x):
        bitmask_w4_gemv_kernel[(cdiv(rows, ROWS), count)](
            x,
            words,
            values,
            scale,
            scale if bias is None else bias,
            out,
            tokens,
            rows,
            groups,
            width,
            values.shape[2],
            span,
            x.stride(0),
            groups * width,
            groups * values.shape[2],
            *scale.stride(),
            bias_stride,
            HAS_BIAS=bias is not None and count == 1,
            BYTES=size,
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK_M=next_power_of_2(tokens),
            BLOCK_N=ROWS,
            BLOCK_G=block_g,
            BLOCK_W=block_w,
            num_warps=WARPS,
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
