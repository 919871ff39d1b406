"""The definition of `pack_bitmask` and `unpack_bitmask`.

Packing counts zeros from the left and gathers what is kept. Unpacking takes four columns at a time: their bits of the
mask say where in the stream of kept codes theirs begin and how many they are, and a table says how those are spread.
"""

from __future__ import annotations

import functools

import torch

# Weights that are unpacked at a time, which bounds the memory of what leads to them.
BLOCK = 1 << 20


def counts(mask: torch.Tensor) -> torch.Tensor:
    """How many columns each group of a mask keeps: uint8 (O, G, n) to int32 (O, G)."""
    pairs = mask - ((mask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((fours + (fours >> 4)) & 0x0F).sum(dim=2, dtype=torch.int32)


def pack_bitmask(codes: torch.Tensor, group: int, nnz: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, I) int8 to uint8 (O, G, group/8) and (O, G, nnz/2); see the package."""
    rows, columns = codes.shape
    groups = columns // group
    records = codes.reshape(rows, groups, group)
    keep = records != 0
    spare = nnz - keep.sum(dim=2, dtype=torch.int32)
    if bool(spare.any()):
        keep |= (~keep).cumsum(dim=2, dtype=torch.int32) <= spare[:, :, None]
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=codes.device)
    mask = (keep.view(rows, groups, group // 8, 8) * weights).sum(dim=3, dtype=torch.uint8)
    kept = (records.masked_select(keep) + 8).view(torch.uint8).view(rows, groups, nnz // 2, 2)
    return mask, kept[..., 0] | (kept[..., 1] << 4)


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
    bits = (fours & 0x0F0F).view(torch.uint8)
    pairs = bits - ((bits >> 1) & 5)
    count = (pairs & 3) + ((pairs >> 2) & 3)
    # where in the stream the codes of each four columns begin
    first = count.view(records, 2 * width).cumsum(dim=1, dtype=torch.int32)
    first -= count.view(records, 2 * width)
    first += (torch.arange(records, dtype=torch.int32, device=mask.device) * nnz)[:, None]
    stream = torch.zeros(records * nnz // 2 + 2, dtype=torch.int32, device=mask.device)
    stream[:-2] = values.reshape(-1)
    # four codes that begin in the middle of a byte end in the third
    threes = stream[:-2] | (stream[1:-1] << 8) | (stream[2:] << 16)
    # no codes are left where the last columns keep none
    place = (first >> 1).view(-1).clamp_(max=len(threes) - 1)
    found = threes.index_select(0, place)
    found >>= (first.view(-1) & 1) << 2
    found &= (1 << (count.to(torch.int32) << 2)) - 1
    found |= bits.to(torch.int32) << 16
    return _table(str(mask.device)).index_select(0, found).view(torch.int8).view(rows, -1)


@functools.cache
def _table(device: str) -> torch.Tensor:
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
