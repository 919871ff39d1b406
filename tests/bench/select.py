"""`keep_largest` beside `torch.kthvalue`, and `keep_of` beside a stable sort."""

from __future__ import annotations

import torch

from rewright.kernels.select import keep_largest, keep_of
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Half of a matrix, plain and with zeros in it; patterns and whole rows."""
    side = 8192 if device == "cuda" else 1024
    score = torch.rand(side, side, device=device)
    zeros = score * (torch.rand(side, side, device=device) > 0.3)
    patterns = ((2, 4), (8, 16), (16, 32), (side // 2, side))
    return [_largest(score, "half"), _largest(zeros, "half, 30 % zeros"), *(_of(score, *pair) for pair in patterns)]


def _largest(score: torch.Tensor, label: str) -> Job:
    prune = score.numel() // 2
    return Job(
        label=f"{score.shape[0]}x{score.shape[1]} {label}",
        call=lambda: keep_largest(score, prune),
        moved=score.nbytes + score.numel(),
        flops=0,
        bound="copy",
        dtype=torch.float32,
        peer_name="torch.kthvalue and a comparison, or a stable torch.argsort",
        peer=lambda: score > score.flatten().kthvalue(prune).values,
    )


def _of(score: torch.Tensor, keep: int, of: int) -> Job:
    return Job(
        label=f"{score.shape[0]}x{score.shape[1]} {keep} of {of}",
        call=lambda: keep_of(score, keep, of),
        moved=score.nbytes + score.numel(),
        flops=0,
        bound="copy",
        dtype=torch.float32,
        peer_name="stable torch.argsort",
        peer=lambda: sorted_out(score, keep, of),
    )


def sorted_out(score: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """The mask by a sort of every pattern."""
    parts = score.reshape(-1, of)
    order = parts.argsort(dim=1, stable=True)
    return torch.ones_like(parts, dtype=torch.bool).scatter_(1, order[:, : of - keep], False).view(score.shape)
