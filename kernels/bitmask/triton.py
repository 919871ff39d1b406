"""`pack_bitmask` and `unpack_bitmask` on a GPU: a few records to a program, a column of a group to a lane.

Which byte a kept column goes to is its rank, a running count along the group; both are bound by memory.
"""

# The arguments of a jit function are Triton's own values, which no annotation describes; triton ships no types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl

from rewright.kernels.launch import cdiv, device_guard, next_power_of_2

# Lanes of a program, and the most columns that it looks at at once.
TILE = 1024
MOST = 1024


@triton.jit
def _larger(left, right):
    return tl.maximum(left, right)


@triton.jit
def pack_kernel(
    codes_ptr, mask_ptr, values_ptr, records, groups, group, nnz, codes_row, codes_column,
    RECORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    there = record < records
    source = codes_ptr + (record // groups) * codes_row + (record % groups) * group * codes_column
    bit = (1 << tl.arange(0, 8)).to(tl.int32)
    filled = tl.zeros([RECORDS], tl.int32)
    for start in range(0, group, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = there[:, None] & (column < group)
        code = tl.load(source[:, None] + column.to(tl.int64) * codes_column, mask=inside, other=0)
        filled += tl.sum((code != 0).to(tl.int32), axis=1)
    # how many columns whose code is 0 are kept, from the left
    spare = (nnz - filled)[:, None]
    zeros = tl.zeros([RECORDS, 1], tl.int32)
    kept = tl.zeros([RECORDS, 1], tl.int32)
    last = tl.full([RECORDS, 1], -1, tl.int32)
    for start in range(0, group, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = there[:, None] & (column < group)
        at = source[:, None] + column.to(tl.int64) * codes_column
        code = tl.load(at, mask=inside, other=0).to(tl.int32)
        empty = (inside & (code == 0)).to(tl.int32)
        # among the zeros, this one's place or that of the last before it
        place = zeros + tl.cumsum(empty, axis=1)
        keep = inside & ((code != 0) | (place <= spare))
        rank = kept + tl.cumsum(keep.to(tl.int32), axis=1) - 1
        # a byte is written by its second code, which looks for the first among the columns before it
        before = tl.load(at - codes_column, mask=inside & (column > 0), other=0).to(tl.int32)
        kept_before = inside & (column > 0) & ((before != 0) | (place - empty <= spare))
        known = tl.where(kept_before, column * 16 + before + 8, -1)
        low = tl.maximum(tl.associative_scan(known, 1, _larger), last)
        byte = ((low & 15) | ((code + 8) << 4)).to(tl.uint8)
        target = values_ptr + record[:, None] * (nnz // 2) + rank // 2
        tl.store(target, byte, mask=keep & (rank % 2 == 1) & (rank < nnz))
        bits = tl.reshape(keep.to(tl.int32), [RECORDS, BLOCK // 8, 8]) * bit[None, None, :]
        width = start // 8 + tl.arange(0, BLOCK // 8)
        target = mask_ptr + record[:, None] * (group // 8) + width[None, :]
        tl.store(target, tl.sum(bits, axis=2).to(tl.uint8), mask=there[:, None] & (width < group // 8)[None, :])
        zeros += tl.sum(empty, axis=1)[:, None]
        kept += tl.sum(keep.to(tl.int32), axis=1)[:, None]
        last = tl.maximum(last, tl.max(known, axis=1)[:, None])


@triton.jit
def unpack_kernel(
    mask_ptr, values_ptr, codes_ptr, records, group, nnz, RECORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    record = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    there = (record < records)[:, None]
    kept = tl.zeros([RECORDS, 1], tl.int32)
    for start in range(0, group, BLOCK):
        column = (start + tl.arange(0, BLOCK))[None, :]
        inside = there & (column < group)
        bits = tl.load(mask_ptr + record[:, None] * (group // 8) + column // 8, mask=inside, other=0).to(tl.int32)
        bit = (bits >> (column % 8)) & 1
        rank = kept + tl.cumsum(bit, axis=1) - bit
        # a mask that keeps more than there are codes for finds none past the end
        found = inside & (bit == 1) & (rank < nnz)
        byte = tl.load(values_ptr + record[:, None] * (nnz // 2) + rank // 2, mask=found, other=0).to(tl.int32)
        code = tl.where(found, ((byte >> (4 * (rank % 2))) & 15) - 8, 0)
        tl.store(codes_ptr + record[:, None] * group + column, code.to(tl.int8), mask=inside)
        kept += tl.sum(bit, axis=1)[:, None]


def tile(group: int) -> dict[str, int]:
    """Records and columns of a program, for groups of this size."""
    block = min(max(8, next_power_of_2(group)), MOST)
    return {"RECORDS": max(1, TILE // block), "BLOCK": block}


def pack_bitmask(codes: torch.Tensor, group: int, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, I) int8 to uint8 (O, G, group/8) and (O, G, nnz/2); see the package."""
    rows, columns = codes.shape
    groups = columns // group
    mask = torch.empty((rows, groups, group // 8), dtype=torch.uint8, device=codes.device)
    values = torch.empty((rows, groups, nnz // 2), dtype=torch.uint8, device=codes.device)
    if mask.numel():
        sizes = tile(group)
        with device_guard(codes):
            pack_kernel[(cdiv(rows * groups, sizes["RECORDS"]),)](
                codes, mask, values, rows * groups, groups, group, nnz, *codes.stride(), **sizes, enable_fp_fusion=False
            )
    return mask, values


def unpack_bitmask(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """uint8 (O, G, group/8) and (O, G, nnz/2) to (O, I) int8; see the package."""
    rows, groups, width = mask.shape
    group = 8 * width
    codes = torch.empty((rows, groups * group), dtype=torch.int8, device=mask.device)
    if codes.numel():
        sizes = tile(group)
        with device_guard(mask):
            unpack_kernel[(cdiv(rows * groups, sizes["RECORDS"]),)](
                mask.contiguous(),
                values.contiguous(),
                codes,
                rows * groups,
                group,
                2 * values.shape[2],
                **sizes,
                enable_fp_fusion=False,
            )
    return codes
