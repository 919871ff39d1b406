"""The definition of `pack_bitmask` and `unpack_bitmask`: booleans by column, spread from and gathered into bytes."""

from __future__ import annotations

import torch

# The eight bits of every byte, lowest first, as eight bytes of 0 or 1.
_BITS = (torch.arange(256)[:, None] >> torch.arange(8)).bitwise_and_(1).to(torch.uint8).view(torch.int64).view(256)


def columns_of(mask: torch.Tensor) -> torch.Tensor:
    """Which columns a mask keeps: uint8 (..., n) to bool (..., 8 n)."""
    table = _BITS.to(mask.device)
    return table[mask.to(torch.int32)].view(torch.bool)


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
        # zeros are counted from the left until there are enough
        keep |= (~keep).cumsum(dim=2, dtype=torch.int32) <= spare[:, :, None]
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=codes.device)
    mask = (keep.view(rows, groups, group // 8, 8) * weights).sum(dim=3, dtype=torch.uint8)
    kept = (records[keep] + 8).view(torch.uint8).view(rows, groups, nnz // 2, 2)
    return mask, kept[..., 0] | (kept[..., 1] << 4)


def unpack_bitmask(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """uint8 (O, G, group/8) and (O, G, nnz/2) to (O, I) int8; see the package."""
    rows, groups, width = mask.shape
    halves = values.contiguous().view(-1).to(torch.int16)
    halves |= halves << 4
    halves &= 0x0F0F
    kept = halves.view(torch.int8)
    kept -= 8
    codes = torch.zeros(rows, groups * width * 8, dtype=torch.int8, device=mask.device)
    return codes.masked_scatter_(columns_of(mask.contiguous()).view(codes.shape), kept)
