"""`bitmask_w4_gemv` of half the weights beside `w4a16_gemv` of all of them, which moves a third more bytes."""

from __future__ import annotations

import itertools

import torch

from rewright.kernels.bitmask_w4_gemv import bitmask_w4_gemv
from rewright.kernels.w4a16_gemv import w4a16_gemv
from tests.bench.harness import Job
from tests.bench.w4a16_gemv import GROUP, matrix, several


def jobs(device: str) -> list[Job]:
    """Half of each group of 128, by 1 and 8 rows."""
    shapes = ((4096, 14336), (14336, 4096)) if device == "cuda" else ((1024, 4096),)
    return [_job(m, n, k, device) for n, k in shapes for m in (1, 8)]


def _records(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = k // GROUP
    keep = torch.rand(n, groups, GROUP, device=device).argsort(dim=2) < GROUP // 2
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
    mask = (keep.view(n, groups, GROUP // 8, 8) * weights).sum(dim=3, dtype=torch.uint8)
    values = torch.randint(0, 256, (n, groups, GROUP // 4), device=device).to(torch.uint8)
    return mask, values, (torch.rand(n, groups, device=device) / 64).to(torch.bfloat16)


def _job(m: int, n: int, k: int, device: str) -> Job:
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    size = n * (k // GROUP) * (GROUP // 8 + GROUP // 4 + 2)
    records = itertools.cycle([_records(n, k, device) for _ in range(several(size, device))])
    whole = itertools.cycle([matrix(n, k, device) for _ in range(several(size, device))])
    return Job(
        label=f"{n}x{k} by {m} bfloat16",
        call=lambda: bitmask_w4_gemv(x, *next(records)),
        moved=size + x.nbytes + m * n * 2,
        flops=m * n * k,
        bound="copy",
        dtype=torch.bfloat16,
        peer_name="w4a16_gemv of all weights",
        peer=lambda: w4a16_gemv(x, *next(whole)),
    )
