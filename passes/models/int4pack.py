"""torch's product of bfloat16 rows and 4-bit weights on a CPU, and the weights back out of its layout.

The layout is the processor's own (blocks of 64 output rows with AVX512, of 32 with AVX2, the last rows otherwise), so
nothing of it is written down here. Matrices that spell their own rows and columns are packed once, the order is read
off them and held to a matrix that it was not read off; where that fails there is no product.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

# Output rows that every processor packs on their own, whole.
UNIT = 64
# Rows of activations up to which the product is faster than decoding the matrix and multiplying by that; measured.
MOST_ROWS = 48
GROUPS = (256, 128, 64, 32)
# Codes that are unfolded at once: while decoding, as many as a cache holds, and while packing, for the memory.
BLOCK, PACKED = 1 << 18, 1 << 16

# A run of equal blocks: how many, output rows in each, and where in a block each row is, None when in order.
Run = tuple[int, int, torch.Tensor | None]


def group_for(rows: int, columns: int, group: int) -> int | None:
    """The group size to multiply (rows, columns) codes with scales of `group` columns by; None where it cannot be."""
    fits = next((size for size in GROUPS if group % size == 0), None)
    if rows % 16 or rows == 0 or fits is None or columns % fits or not _usable(rows % UNIT):
        return None
    return fits


def pack(codes: Callable[[int, int], torch.Tensor], packed: torch.Tensor) -> torch.Tensor:
    """Fill `packed`, uint8 (rows, columns / 2), with the product's form of 4-bit codes, and return it.

    `codes(start, stop)` gives int8 rows in -8..7; it is not asked for rows again once they are filled.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    step = UNIT * max(1, PACKED // (UNIT * columns))
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        packed[start:stop] = _convert(codes(start, stop).to(torch.int32).add_(8))
    return packed


def unpack(packed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Codes of output rows [start, stop), int8 (columns, stop - start) in -8..7; `start` is a multiple of UNIT."""
    columns = 2 * packed.shape[1]
    found, at = [], start
    for count, height, order in _runs(stop - start):
        block = packed[at : at + count * height].view(torch.int32).view(count, columns, -1)
        halves = [block & 0x0F0F0F0F, (block >> 4) & 0x0F0F0F0F]
        codes = torch.cat(halves, dim=-1).view(torch.int8)
        if order is not None:
            codes = codes[..., order]
        found.append(codes.transpose(0, 1).reshape(columns, count * height))
        at += count * height
    return (found[0] if len(found) == 1 else torch.cat(found, dim=1)).sub_(8)


def multiply(rows: torch.Tensor, packed: torch.Tensor, group: int, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    """`rows` bfloat16 (m, columns) by the matrix: bfloat16 (m, output rows), sums in float32.

    `scales_and_zeros` bfloat16 (groups, output rows, 2): a weight is code * scale + zero.
    """
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, scales_and_zeros)
    return product


def _convert(codes: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed


def _runs(rows: int) -> list[Run]:
    """The blocks of that many output rows, from the first."""
    units, rest = divmod(rows, UNIT)
    found: list[Run] = []
    if units:
        whole = _blocks(UNIT)
        assert whole is not None
        # a unit is packed in equal blocks, so units on end are too
        found.append((units * whole[0][0], whole[0][1], whole[0][2]))
    if rest:
        found += _blocks(rest) or []
    return found


@cache
def _blocks(rows: int) -> tuple[Run, ...] | None:
    """How at most UNIT rows are packed, None where it is not understood."""
    columns = 4
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    digits = [_convert(digit.to(torch.int32).contiguous()).flatten() for digit in (row % 16, row // 16, column)]
    for height in (64, 32, 16):
        blocks, at = [], 0
        while at < rows:
            size = min(height, rows - at)
            low, high, column_of = (_nibbles(digit, at, size, columns) for digit in digits)
            rows_of = low + 16 * high - at
            order = torch.argsort(rows_of[0])
            if not torch.equal(rows_of[:, order], torch.arange(size).expand(columns, size)):
                break
            if not torch.equal(column_of, torch.arange(columns)[:, None].expand(columns, size)):
                break
            blocks.append((1, size, None if torch.equal(order, torch.arange(size)) else order))
            at += size
        if at >= rows and (rows < UNIT or len({size for _, size, _ in blocks}) == 1):
            return ((len(blocks), height, blocks[0][2]),) if rows == UNIT else tuple(blocks)
    return None


def _nibbles(packed: torch.Tensor, at: int, size: int, columns: int) -> torch.Tensor:
    """Low nibbles, then high ones, of a block of `size` rows, int64 (columns, size)."""
    block = packed[at * columns // 2 : (at + size) * columns // 2].view(columns, size // 2).long()
    return torch.cat([block & 15, block >> 4], dim=1)


@cache
def _usable(rest: int) -> bool:
    """Whether this torch has the product, and blocks of UNIT rows and a last one of `rest` are understood."""
    operations: Any = torch.ops.aten
    if not hasattr(operations, "_weight_int4pack_mm_for_cpu"):
        return False
    draws = torch.Generator().manual_seed(0)
    rows, columns, group = 2 * UNIT + rest, 96, 32
    codes = torch.randint(-8, 8, (rows, columns), generator=draws, dtype=torch.int8)
    scales = torch.zeros(columns // group, rows, 2, dtype=torch.bfloat16)
    scales[..., 0] = 1
    given = torch.randint(-2, 3, (3, columns), generator=draws).to(torch.bfloat16)
    try:
        if _blocks(UNIT) is None or (rest and _blocks(rest) is None):
            return False
        packed = pack(lambda start, stop: codes[start:stop], torch.empty(rows, columns // 2, dtype=torch.uint8))
        product = multiply(given, packed, group, scales)
        wanted = (given.float() @ codes.float().t()).to(torch.bfloat16)
        return torch.equal(unpack(packed, 0, rows), codes.t()) and torch.equal(product, wanted)
    except (RuntimeError, NotImplementedError):
        return False
