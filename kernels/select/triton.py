"""`keep_largest` and `keep_of` on a GPU.

A whole tensor is searched by radix: four passes over the bits of the floats, eight at a time, find the threshold, and
nothing waits for the host. Short patterns are ranked by comparing within them; of long ones, a program each finds the
threshold bit by bit. Then equals of the threshold go in the order of their places.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, interpreter
from rewright.kernels.select.reference import columns_first

BLOCK = 1024
WARPS = 4
# Programs that count digits, each of them many blocks.
COUNTERS = 1024
# Patterns up to this length are ranked by comparing within them.
SHORT = 32
TILE = 32


@triton.jit
def _key(x, WIDE: tl.constexpr):
    # Integers in the order of the floats: of the negative ones all bits but the sign turned over. -0.0 becomes 0.0.
    if WIDE:
        bits = (x.to(tl.float64) + 0.0).to(tl.int64, bitcast=True)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def count_kernel(
    score_ptr, state_ptr, table_ptr, count, SHIFT: tl.constexpr, TOP: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    prefix = tl.load(state_ptr)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([256], tl.int32)
    for _ in range(tl.program_id(0), tl.cdiv(count, BLOCK), tl.num_programs(0)):
        inside = place < count
        key = _key(tl.load(score_ptr + place, mask=inside, other=0.0), WIDE)
        if TOP:
            digit = (key >> SHIFT) + 128
        else:
            inside &= (key >> (SHIFT + 8)).to(tl.int64) == prefix
            digit = (key >> SHIFT) & 255
        total += tl.histogram(digit.to(tl.int32), 256, mask=inside)
        place += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.atomic_add(table_ptr + tl.arange(0, 256), total, mask=total > 0)


@triton.jit
def digit_kernel(state_ptr, table_ptr, TOP: tl.constexpr):
    # The digit at which the running count reaches the rank, and the rank within that digit.
    rank = tl.load(state_ptr + 1)
    upto = tl.cumsum(tl.load(table_ptr + tl.arange(0, 256)), axis=0).to(tl.int64)
    digit = tl.sum((upto < rank).to(tl.int64), axis=0)
    if TOP:
        tl.store(state_ptr, digit - 128)
    else:
        tl.store(state_ptr, tl.load(state_ptr) * 256 + digit)
    tl.store(state_ptr + 1, rank - tl.max(tl.where(upto < rank, upto, 0), axis=0))


@triton.jit
def ties_kernel(score_ptr, state_ptr, ties_ptr, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = _key(tl.load(score_ptr + place, mask=inside, other=0.0), WIDE).to(tl.int64)
    tl.store(ties_ptr + tl.program_id(0), tl.sum((inside & (key == tl.load(state_ptr))).to(tl.int32), axis=0))


@triton.jit
def above_kernel(score_ptr, state_ptr, ties_ptr, keep_ptr, count, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    key = _key(tl.load(score_ptr + place, mask=inside, other=0.0), WIDE).to(tl.int64)
    threshold = tl.load(state_ptr)
    tied = (inside & (key == threshold)).to(tl.int32)
    # `ties` holds how many there are up to each block's end.
    before = tl.load(ties_ptr + tl.program_id(0)) - tl.sum(tied, axis=0)
    late = before + tl.cumsum(tied, axis=0) > tl.load(state_ptr + 1)
    tl.store(keep_ptr + place, ((key > threshold) | ((tied != 0) & late)).to(tl.uint8), mask=inside)


@triton.jit
def rank_kernel(
    score_ptr, keep_ptr, rows, columns, prune, of, score_row, score_column, keep_row, keep_column,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    column = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < columns)
    first = column // of * of
    mine = tl.load(score_ptr + row * score_row + column * score_column, mask=inside, other=0.0).to(ACC)
    below = tl.zeros([BLOCK, BLOCK], tl.int32)
    for step in range(of):
        at = score_ptr + row * score_row + (first + step) * score_column
        other = tl.load(at, mask=inside, other=0.0).to(ACC)
        below += ((other < mine) | ((other == mine) & (first + step < column))).to(tl.int32)
    tl.store(keep_ptr + row * keep_row + column * keep_column, (below >= prune).to(tl.uint8), mask=inside)


@triton.jit
def segment_kernel(
    score_ptr, keep_ptr, columns, prune, of, keep_row, keep_column,
    WIDE: tl.constexpr, LEAST: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * of
    lane = tl.arange(0, BLOCK)
    score_at = score_ptr + row * columns + first + lane
    # The greatest key with fewer than `prune` keys below it, from the sign to the last bit.
    threshold = tl.full([], LEAST, tl.int64)
    short = prune
    for bit in range(BITS + 1):
        step = tl.full([], 1, tl.int64) << (BITS - bit)
        tried = tl.where(bit == 0, tl.full([], 0, tl.int64), threshold + tl.where(bit == 0, 0, step))
        below = 0
        for start in range(0, of, BLOCK):
            inside = lane < of - start
            key = _key(tl.load(score_at + start, mask=inside, other=0.0), WIDE).to(tl.int64)
            below += tl.sum((inside & (key < tried)).to(tl.int32), axis=0)
        enough = below < prune
        threshold = tl.where(enough, tried, threshold)
        short = tl.where(enough, prune - below, short)
    keep_at = keep_ptr + row * keep_row + (first + lane) * keep_column
    seen = 0
    for start in range(0, of, BLOCK):
        inside = lane < of - start
        key = _key(tl.load(score_at + start, mask=inside, other=0.0), WIDE).to(tl.int64)
        tied = (inside & (key == threshold)).to(tl.int32)
        late = seen + tl.cumsum(tied, axis=0) > short
        kept = (key > threshold) | ((tied != 0) & late)
        tl.store(keep_at + tl.cast(keep_column, tl.int64) * start, kept.to(tl.uint8), mask=inside)
        seen += tl.sum(tied, axis=0)


def supports(score: torch.Tensor) -> str | None:
    """None, or why the kernels cannot take these scores."""
    if score.numel() >= 1 << 31:
        return "the counts are 32-bit"
    if score.dtype == torch.float64 and not interpreter():
        return "float64 is for the interpreter only"
    return None


def keep_largest(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest; see the package for shapes and dtypes."""
    if prune in (0, score.numel()):
        return torch.full(score.shape, prune == 0, device=score.device)
    count = score.numel()
    score = score.contiguous()
    keep = torch.empty(score.shape, dtype=torch.uint8, device=score.device)
    wide = score.dtype == torch.float64
    digits = 8 if wide else 4
    # The threshold's bits found so far, and the rank still to go among the scores that begin with them.
    state = torch.full((2,), prune, dtype=torch.int64, device=score.device)
    table = torch.zeros((digits, 256), dtype=torch.int32, device=score.device)
    blocks = cdiv(count, BLOCK)
    ties = torch.empty(blocks, dtype=torch.int32, device=score.device)
    options = {"num_warps": WARPS, "enable_fp_fusion": False}
    with device_guard(score):
        for digit in range(digits):
            counted = table[digit]
            top = digit == 0
            shift = 8 * (digits - 1 - digit)
            grid = (min(blocks, COUNTERS),)
            count_kernel[grid](score, state, counted, count, SHIFT=shift, TOP=top, WIDE=wide, BLOCK=BLOCK, **options)
            digit_kernel[(1,)](state, counted, TOP=top, **options)
        ties_kernel[(blocks,)](score, state, ties, count, WIDE=wide, BLOCK=BLOCK, **options)
        upto = ties.cumsum(0)
        above_kernel[(blocks,)](score, state, upto, keep, count, WIDE=wide, BLOCK=BLOCK, **options)
    return keep.view(torch.bool)


def keep_of(score: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """The `keep` largest of every `of` columns; see the package for shapes and dtypes."""
    rows, columns = score.shape
    if columns_first(score):
        kept = torch.empty((columns, rows), dtype=torch.uint8, device=score.device).t()
    else:
        kept = torch.empty((rows, columns), dtype=torch.uint8, device=score.device)
    if keep in (0, of):
        kept.fill_(keep != 0)
    elif score.numel():
        wide = score.dtype == torch.float64
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        with device_guard(score):
            if of <= SHORT:
                rank_kernel[(cdiv(rows, TILE), cdiv(columns, TILE))](
                    score,
                    kept,
                    rows,
                    columns,
                    of - keep,
                    of,
                    *score.stride(),
                    *kept.stride(),
                    ACC=tl.float64 if wide else tl.float32,
                    BLOCK=TILE,
                    **options,
                )
            else:
                segment_kernel[(rows, columns // of)](
                    score.contiguous(),
                    kept,
                    columns,
                    of - keep,
                    of,
                    *kept.stride(),
                    WIDE=wide,
                    **limits(wide),
                    BLOCK=BLOCK,
                    **options,
                )
    return kept.view(torch.bool)


def limits(wide: bool) -> dict[str, int]:
    """The least key and the number of bits beside the sign."""
    return {"LEAST": -(1 << 63), "BITS": 63} if wide else {"LEAST": -(1 << 31), "BITS": 31}
