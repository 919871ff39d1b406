"""`w4a16_gemv` on a GPU: a program takes a few rows of W and goes through a stretch of their columns once.

A thread holds one word of codes of each row, and the inputs of its columns, so that sums stay with the thread until
the end and nothing is exchanged; a warp reads 128 consecutive bytes of a row. Codes become float32 without a
conversion: the bits of a code are put into the mantissa of 2^23, and 2^23 and the zero point, shifted alike, are taken
off again. What a shift left over is a power of two, which x is divided by beforehand; all of that is exact. A word's
sum is multiplied by its scale. The order of all sums is set by shapes alone.
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
    """Rows of W in a tile, which is a word a thread wide; warps."""

    rows: int
    warps: int


# By the rows of x, padded to a power of two. `tile_of` has half the rows where a word takes more registers.
CONFIGS = {1: Config(8, 4), 2: Config(8, 4), 4: Config(8, 4), 8: Config(4, 4)}
LANES = 32
REDUCE = 256
# Below so many programs, columns are split among several.
PROGRAMS = 1024
MOST_PARTS = 16


# The bits of 2^23. A kernel gets them as an argument: a constant would be put into a register again for each code.
MAGIC = 0x4B000000


@triton.jit
def step_of(PLACE: tl.constexpr, BITS: tl.constexpr):
    """The power of two that `decode` leaves on a code."""
    half: tl.constexpr = 16 // BITS
    return 1 << (PLACE % half + (PLACE // half if BITS < 8 else 0)) * BITS


@triton.jit
def decode(word, magic, PLACE: tl.constexpr, BITS: tl.constexpr):
    """The code at a place of uint32 words, as float32 2^23 + (unsigned code) * step_of(PLACE, BITS)."""
    half = word >> (PLACE // (16 // BITS) * (16 - BITS if BITS < 8 else 16))
    return (half & (((1 << BITS) - 1) * step_of(PLACE, BITS)) | magic).to(tl.float32, bitcast=True)


@triton.jit
def pick(x, place, PLACE: tl.constexpr):
    """x[..., PLACE], as a sum of bits and zeros: a thread holds that axis whole, so nothing is left to compute."""
    if x.dtype == tl.float64:
        bits = tl.where(place == PLACE, x.to(tl.int64, bitcast=True), 0)
    else:
        bits = tl.where(place == PLACE, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=len(x.shape) - 1).to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["magic"], do_not_specialize_on_alignment=["packed_ptr"])
def w4a16_gemv_kernel(
    x_ptr, packed_ptr, scale_ptr, zero_ptr, bias_ptr, out_ptr,
    tokens, rows, words, span, magic,
    x_row, packed_row, scale_row, scale_column, zero_row, zero_column, bias_stride,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, BITS: tl.constexpr, GROUP_WORDS: tl.constexpr,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    CODES: tl.constexpr = 32 // BITS
    part = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    in_row = row < rows
    # Rows past the last are the last again, and not stored: loads then need no predicate of their own.
    source = tl.minimum(row, rows - 1)[:, None]
    place = tl.arange(0, CODES)[None, None, :]
    lane = tl.arange(0, BLOCK_W)
    x_at = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64)[:, None, None] * x_row + place
    packed_at = packed_ptr + source * packed_row
    scale_at = scale_ptr + source * scale_row
    zero_at = zero_ptr + source * zero_row
    total = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], ACC)
    first = part * span
    for start in range(first, min(first + span, words), BLOCK_W):
        word = (start + lane)[None, :]
        known = word < words
        codes = tl.load(packed_at + word, mask=known, other=0).to(tl.uint32, bitcast=True)
        x = tl.load(x_at + (word * CODES)[:, :, None], mask=known[:, :, None], other=0.0).to(ACC)
        group = word // GROUP_WORDS if GROUP_WORDS else word * 0
        scale = tl.load(scale_at + group * scale_column, mask=known, other=0.0)
        offset = tl.full([BLOCK_N, BLOCK_W], 1 << (BITS - 1), tl.float32)
        if HAS_ZERO:
            offset += tl.load(zero_at + group * zero_column, mask=known, other=0).to(tl.float32)
        sums = tl.zeros([BLOCK_M, BLOCK_N, BLOCK_W], ACC)
        for at in tl.static_range(CODES):
            level = decode(codes, magic, at, BITS) - (8388608.0 + offset * step_of(at, BITS))
            sums += level.to(ACC)[None, :, :] * (pick(x, place, at) * (1.0 / step_of(at, BITS)))[:, None, :]
        total += sums * scale.to(ACC)[None, :, :]
    joined = tl.sum(total, axis=2)
    if HAS_BIAS:
        joined += tl.load(bias_ptr + row * bias_stride, mask=in_row, other=0.0).to(ACC)[None, :]
    out = (part * tokens + token).to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out_ptr + out, joined, mask=(token < tokens)[:, None] & in_row[None, :])


@triton.jit
def join_kernel(
    part_ptr, bias_ptr, out_ptr, rows, count, parts, bias_stride, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(part_ptr + tl.cast(part, tl.int64) * count + at, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + at % rows * bias_stride, mask=inside, other=0.0).to(total.dtype)
    tl.store(out_ptr + at, total, mask=inside)


def supports(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, bits: int
) -> str | None:
    """None, or why no kernel can take these operands; `w4a16_gemm` asks the same."""
    groups, columns = scale.shape[1], packed.shape[1] * 32 // bits
    if groups > 1 and columns // groups % (32 // bits):
        return f"groups of {columns // groups} columns do not begin at a word of codes"
    return no_float64(x, scale, bias)


def no_float64(*operands: torch.Tensor | None) -> str | None:
    """None, or that an operand is float64, which the interpreter alone takes."""
    if any(t is not None and t.dtype == torch.float64 for t in operands) and not interpreter():
        return "float64 is for the interpreter only"
    return None


def tile_of(tokens: int, bits: int, zero: bool) -> Config:
    """The tile for so many rows of x, a power of two."""
    tile = CONFIGS[tokens]
    return tile._replace(rows=tile.rows // 2) if zero or bits == 2 else tile


def split(words: int, block: int, programs: int, wanted: int) -> tuple[int, int]:
    """Among how many programs the words of a row are split, and how many each takes, to have `wanted` in all."""
    steps = cdiv(words, block)
    each = cdiv(steps, min(cdiv(wanted, programs), MOST_PARTS, steps))
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
        return y.zero_() if bias is None else y.copy_(bias.expand_as(y))
    x = x if x.stride(1) == 1 else x.contiguous()
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    padded = next_power_of_2(tokens)
    tile = tile_of(padded, bits, zero is not None)
    count, span = split(words, tile.warps * LANES, cdiv(rows, tile.rows), PROGRAMS)
    acc = torch.promote_types(x.dtype, torch.float32)
    out = y if count == 1 else torch.empty((count, tokens, rows), dtype=acc, device=x.device)
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
            words,
            span,
            MAGIC,
            x.stride(0),
            packed.stride(0),
            *scale.stride(),
            *((1, 1) if zero is None else zero.stride()),
            1 if bias is None else bias.stride(0),
            HAS_ZERO=zero is not None,
            HAS_BIAS=bias is not None and count == 1,
            BITS=bits,
            GROUP_WORDS=0 if scale.shape[1] == 1 else words // scale.shape[1],
            ACC=tl.float64 if acc == torch.float64 else tl.float32,
            BLOCK_M=padded,
            BLOCK_N=tile.rows,
            BLOCK_W=tile.warps * LANES,
            num_warps=tile.warps,
            enable_fp_fusion=True,
        )
        if count > 1:
            join(out, bias, y)
    return y


def join(parts: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """Sum (parts, M, N) over the parts, in their order, and the bias into y (M, N)."""
    count, tokens, rows = parts.shape
    numbers = tokens * rows
    join_kernel[(cdiv(numbers, REDUCE),)](
        parts,
        parts if bias is None else bias,
        y,
        rows,
        numbers,
        count,
        1 if bias is None else bias.stride(0),
        HAS_BIAS=bias is not None,
        BLOCK=REDUCE,
        enable_fp_fusion=False,
    )
