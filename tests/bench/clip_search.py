"""`clip_search` beside the same search as one writes it first: each share over all rows, a tensor at every step."""

from __future__ import annotations

import torch

from rewright.kernels.clip_search import clip_search
from tests.bench.harness import Job

SHARES = tuple(1 - 0.025 * step for step in range(25))
# Divide, round, two to clamp, multiply, subtract, square, weigh and add, for each share.
STEPS = 9


def jobs(device: str) -> list[Job]:
    """Groups of 32 and 128 columns at 512 to 14336 rows."""
    rows = (4096, 14336) if device == "cuda" else (512, 1024, 4096)
    return [_job(r, size, device) for size in (32, 128) for r in rows]


def _job(rows: int, size: int, device: str) -> Job:
    weight = torch.randn(size, rows, device=device).t()
    keep = torch.rand(size, rows, device=device).t() > 0.5
    importance = torch.rand(size, device=device)
    numbers = rows * size
    return Job(
        label=f"{rows}x{size} float32, 25 shares",
        call=lambda: clip_search(
            weight, keep, importance, bits=4, symmetric=True, shares=SHARES, stored=torch.bfloat16
        ),
        # weight and mask read, scale and zero point written
        moved=numbers * (4 + 1) + rows * 8,
        flops=numbers * len(SHARES) * STEPS,
        bound="copy",
        dtype=torch.float32,
        peer_name="eager loop over shares",
        peer=lambda: eager(weight.t(), keep.t(), importance, 4, SHARES),
    )


def eager(
    columns: torch.Tensor, keep: torch.Tensor, importance: torch.Tensor, bits: int, shares: tuple[float, ...]
) -> torch.Tensor:
    """The scales of symmetric grids for (columns, rows)."""
    first, last = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    reach = (columns * keep).abs().amax(dim=0)
    best = torch.full_like(reach, torch.inf)
    chosen = torch.zeros_like(reach)
    for share in shares:
        scale = (reach * share * 2 / (last - first)).to(torch.bfloat16).float()
        miss = (columns / scale).round().clamp(first, last) * scale - columns
        error = ((miss * keep).square() * importance[:, None]).sum(dim=0)
        better = error < best
        chosen = torch.where(better, scale, chosen)
        best = torch.where(better, error, best)
    return chosen
