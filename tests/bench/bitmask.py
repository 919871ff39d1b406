"""`pack_bitmask` and `unpack_bitmask` beside what boolean indexing makes of them."""

from __future__ import annotations

import torch

from rewright.kernels.bitmask import pack_bitmask, unpack_bitmask
from tests.bench.harness import Job

RECORDS = ((128, 64), (32, 16))


def jobs(device: str) -> list[Job]:
    """A matrix of half kept codes in two sizes of groups, both ways."""
    side = 8192 if device == "cuda" else 2048
    return [job for group, nnz in RECORDS for job in _both(side, group, nnz, device)]


def spread(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Codes of kept columns put where a mask has them, a column at a time."""
    bit = torch.arange(8, dtype=torch.uint8, device=mask.device)
    keep = (mask[..., None] >> bit & 1).bool().flatten(1)
    halves = torch.stack((values & 15, values >> 4), dim=3).view(torch.int8) - 8
    return torch.zeros(keep.shape, dtype=torch.int8, device=mask.device).masked_scatter_(keep, halves)


def gathered(codes: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask and kept codes of groups none of whose kept codes is 0."""
    keep = codes != 0
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=codes.device)
    mask = (keep.view(len(codes), -1, group // 8, 8) * weights).sum(dim=3, dtype=torch.uint8)
    kept = (codes[keep] + 8).view(torch.uint8).view(-1, 2)
    return mask, (kept[:, 0] | kept[:, 1] << 4).view(*mask.shape[:2], -1)


def _both(side: int, group: int, nnz: int, device: str) -> list[Job]:
    keep = torch.rand(side, side // group, group, device=device).argsort(dim=2) < nnz
    codes = torch.randint(1, 8, (side, side), device=device).to(torch.int8) * keep.view(side, side)
    mask, values = pack_bitmask(codes, group, nnz)
    shape = f"{side}x{side} {nnz} of {group}"
    moved = codes.nbytes + mask.nbytes + values.nbytes
    return [
        Job(
            label=f"pack_bitmask {shape}",
            call=lambda: pack_bitmask(codes, group, nnz),
            moved=moved,
            flops=0,
            bound="copy",
            dtype=torch.int8,
            peer_name="boolean indexing",
            peer=lambda: gathered(codes, group),
        ),
        Job(
            label=f"unpack_bitmask {shape}",
            call=lambda: unpack_bitmask(mask, values),
            moved=moved,
            flops=0,
            bound="copy",
            dtype=torch.int8,
            peer_name="masked_scatter",
            peer=lambda: spread(mask, values),
        ),
    ]
