"""The definition of `pack_bitmask` and `unpack_bitmask`.

Both take four columns at a time. Their bits of the mask, and those before them, say where in the stream of kept codes
theirs begin and how many they are; a table says how four codes are drawn together, or spread again.
"""

from __future__ import annotations

import functools

import torch

# Weights that are packed or unpacked at a time, few enough for what leads to them to stay in a cache.
BLOCK = 1 << 18


def counts(mask: torch.Tensor) -> torch.Tensor:
    """How many columns each group of a mask keeps: uint8 (O, G, n) to int32 (O, G)."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dim=2, dtype=torch.int32)


def pack_bitmask(codes: torch.Tensor, group: int, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, I) int8 to uint8 (O, G, group/8) and (O, G, nnz/2); see the package."""
    rows, columns = codes.shape
    groups = columns // group
    mask = torch.empty(rows, groups, group // 8, dtype=torch.uint8, device=codes.device)
    values = torch.empty(rows, groups, nnz // 2, dtype=torch.uint8, device=codes.device)
    if mask.numel():
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            records = codes[start : start + step].reshape(-1, group)
            bits, stream = _gather(records, nnz)
            mask[start : start + step] = bits.view(-1, groups, group // 8)
            values[start : start + step] = stream.view(-1, groups, nnz // 2)
    return mask, values


def _gather(records: torch.Tensor, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and stream of some records, (records, group) int8."""
    keep = records != 0
    spare = nnz - keep.sum(dim=1, dtype=torch.int32)
    if bool(spare.any()):
        # zeros are counted from the left until there are enough
        keep |= (~keep).cumsum(dim=1, dtype=torch.int32) <= spare[:, None]
    # four bytes to a word, whose low bits, or halves, are then drawn together
    kept = keep.view(torch.int32)
    kept = kept | (kept >> 7)
    bits = (kept | (kept >> 14)) & 0xF
    fours = (records + 8).view(torch.int32)
    fours |= fours >> 4
    fours &= 0x00FF00FF
    fours |= fours >> 8
    fours &= 0xFFFF
    fours |= bits << 16
    found = _drawn(str(records.device)).index_select(0, fours.view(-1)).to(torch.int64)
    narrow = bits.to(torch.uint8)
    first = _begin(narrow, nnz, torch.int64)
    # eight codes to a word; the last that begin in one may end in the next
    stream = torch.zeros(len(records) * nnz // 8 + 2, dtype=torch.int64, device=records.device)
    stream.scatter_add_(0, first >> 3, found << ((first & 7) << 2))
    stream[1:] += stream[:-1] >> 32
    values = stream.to(torch.int32).view(torch.uint8)[: len(records) * nnz // 2]
    return narrow[:, 0::2] | (narrow[:, 1::2] << 4), values


def _begin(bits: torch.Tensor, nnz: int, dtype: torch.dtype) -> torch.Tensor:
    """Where in the stream the codes of each four columns begin: uint8 (records, group/4) to `dtype`, flat."""
    count = _count(bits)
    first = count.cumsum(dim=1, dtype=dtype)
    first -= count
    first += (torch.arange(len(bits), dtype=dtype, device=bits.device) * nnz)[:, None]
    return first.view(-1)


def _count(bits: torch.Tensor) -> torch.Tensor:
    """How many of the low four bits are set."""
    pairs = bits - ((bits >> 1) & 5)
    return (pairs & 3) + ((pairs >> 2) & 3)


def unpack_bitmask(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """uint8 (O, G, group/8) and (O, G, nnz/2) to (O, I) int8; see the package."""
    rows, groups, width = mask.shape
    columns = groups * width * 8
    codes = torch.empty(rows, columns, dtype=torch.int8, device=mask.device)
    if not codes.numel():
        return codes
    step = max(1, BLOCK // columns)
    for start in range(0, rows, step):
        codes[start : start + step] = _spread(mask[start : start + step], values[start : start + step])
    return codes


def _spread(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Some rows of `unpack_bitmask`."""
    rows, groups, width = mask.shape
    records, nnz = rows * groups, 2 * values.shape[2]
    fours = mask.reshape(-1).to(torch.int16)
    fours |= fours << 4
    bits = (fours & 0x0F0F).view(torch.uint8).view(records, 2 * width)
    first = _begin(bits, nnz, torch.int32)
    stream = torch.zeros(records * nnz // 2 + 2, dtype=torch.int32, device=mask.device)
    stream[:-2] = values.reshape(-1)
    # four codes that begin in the middle of a byte end in the third
    threes = stream[:-2] | (stream[1:-1] << 8) | (stream[2:] << 16)
    # no codes are left where the last columns keep none
    found = threes.index_select(0, (first >> 1).clamp_(max=len(threes) - 1))
    found >>= (first & 1) << 2
    bits = bits.view(-1).to(torch.int32)
    found &= (1 << (_count(bits) << 2)) - 1
    found |= bits << 16
    return _spreads(str(mask.device)).index_select(0, found).view(torch.int8).view(rows, -1)


@functools.cache
def _spreads(device: str) -> torch.Tensor:
    """Four signed codes, as the bytes of an int32, by [mask << 16 | the codes that it keeps]; 2^20 of them.

    Only what a mask can keep is filled in, a twelfth, so the rest takes no memory.
    """
    table = torch.empty(16, 1 << 16, dtype=torch.int32)
    for mask in range(16):
        kept = [column for column in range(4) if mask >> column & 1]
        stream = torch.arange(16 ** len(kept))
        codes = torch.zeros(len(stream), 4, dtype=torch.int8)
        for rank, column in enumerate(kept):
            codes[:, column] = (stream >> (4 * rank) & 15) - 8
        table[mask, : len(stream)] = codes.view(torch.int32).view(-1)
    return table.view(-1).to(device)


@functools.cache
def _drawn(device: str) -> torch.Tensor:
    """Of four codes as they are stored those that a mask keeps, in the low bits, by [mask << 16 | the codes]."""
    codes = torch.arange(1 << 16, dtype=torch.int32)
    table = torch.zeros(16, 1 << 16, dtype=torch.int32)
    for mask in range(16):
        kept = [column for column in range(4) if mask >> column & 1]
        for rank, column in enumerate(kept):
            table[mask] |= (codes >> (4 * column) & 15) << (4 * rank)
    return table.view(-1).to(device)
