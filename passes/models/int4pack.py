"""torch's product of bfloat16 rows and 4-bit weights on a CPU, and the weights back out of its layout.

The layout is the processor's own (blocks of 64 output rows with AVX512, of 32 with AVX2, the last rows otherwise), so
nothing of it is written down here. Matrices that spell their own rows and columns are packed once, the order is read
off them and held to a matrix that it was not read off; where that fails there is no product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

# Output rows that every processor packs on their own, whole.
UNIT = 64
# Rows of activations up to which the product is faster than decoding the matrix and multiplying by that; measured.
MOST_ROWS = 48
GROUPS = (256, 128, 64, 32)
# Codes that are unfolded at once: while decoding, for speed, and while packing, for the memory.
BLOCK, PACKED = 1 << 19, 1 << 16


@dataclass(frozen=True)
class Run:
    """Equal blocks on end: how many, output rows in each, and in which order the nibbles of a column have them.

    "halves": the low nibbles have the first half of the rows; "pairs": each byte has a row and the next; else the place
    of each row among the low nibbles and then the high ones.
    """

    count: int
    height: int
    order: str | torch.Tensor


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


def unpack(packed: torch.Tensor, rows: tuple[int, int], columns: tuple[int, int], out: torch.Tensor) -> torch.Tensor:
    """Codes of output rows and columns [start, stop), from a UNIT on: into `out`, int8 (columns, rows), in -8..7."""
    at = rows[0]
    for run in _runs(rows[1] - rows[0]):
        height = run.count * run.height
        # half a byte a code
        block = packed[at : at + height].view(run.count, -1, run.height // 2)[:, slice(*columns)].transpose(0, 1)
        part = out[:, at - rows[0] : at - rows[0] + height].view(-1, run.count, run.height)
        if run.order == "pairs":
            pairs = part.view(torch.int16)
            pairs.copy_(block)
            pairs |= pairs << 4
        else:
            # sixteen nibbles at a time; what is above each is cut off below
            words = block.view(torch.int64)
            low, high = part.view(torch.int64).chunk(2, dim=2)
            low.copy_(words)
            torch.bitwise_right_shift(words, 4, out=high)
            if isinstance(run.order, torch.Tensor):
                part.copy_(part[..., run.order])
        at += height
    out.view(torch.int64).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return out.sub_(8)


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
        found.append(Run(units * len(whole), whole[0].height, whole[0].order))
    return found + list(_blocks(rest) or () if rest else ())


@cache
def _blocks(rows: int) -> tuple[Run, ...] | None:
    """How at most UNIT rows are packed, None where it is not understood; a whole UNIT in equal blocks."""
    columns = 4
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    digits = [_convert(digit.to(torch.int32).contiguous()).flatten() for digit in (row % 16, row // 16, column)]
    for height in (64, 32, 16):
        sizes = [min(height, rows - at) for at in range(0, rows, height)]
        orders = [_block(digits, height * place, size, columns) for place, size in enumerate(sizes)]
        known = tuple(Run(1, size, order) for size, order in zip(sizes, orders, strict=True) if order is not None)
        if len(known) == len(sizes):
            return known
    return None


def _block(digits: list[torch.Tensor], at: int, size: int, columns: int) -> str | torch.Tensor | None:
    """The order of rows [at, at + size), if they are a block; `digits` are packed digits of rows and of columns."""
    planes = []
    for digit in digits:
        block = digit[at * columns // 2 : (at + size) * columns // 2].view(columns, size // 2).long()
        planes.append(torch.cat([block & 15, block >> 4], dim=1))
    rows, counted = planes[0] + 16 * planes[1] - at, torch.arange(columns)[:, None].expand(columns, size)
    order = torch.argsort(rows[0])
    in_order = torch.arange(size)
    if not torch.equal(rows[:, order], in_order.expand(columns, size)) or not torch.equal(planes[2], counted):
        return None
    if torch.equal(order, in_order):
        return "halves"
    return "pairs" if torch.equal(order, in_order.view(2, -1).t().flatten()) else order


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
        found = unpack(packed, (0, rows), (0, columns), torch.empty(columns, rows, dtype=torch.int8))
        return torch.equal(found, codes.t()) and torch.equal(product, wanted)
    except RuntimeError:
        # what torch raises where this processor, or this build, has no such product
        return False
