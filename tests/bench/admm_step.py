"""`admm_step` beside its four lines in eager torch."""

from __future__ import annotations

import torch

from rewright.kernels.admm_step import admm_step
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Square matrices of small and large models."""
    sides = (4096, 8192) if device == "cuda" else (512, 1024, 2048)
    return [_job(side, device) for side in sides]


def _job(side: int, device: str) -> Job:
    target, weight, dual = torch.randn(3, side, side, device=device).unbind(0)
    keep = torch.rand(side, side, device=device) > 0.5
    # Called again and again the dual only grows by the weights, a finite number of times.
    mine, theirs = dual.clone(), dual.clone()
    return Job(
        label=f"{side}x{side} float32",
        call=lambda: admm_step(target, weight, mine, keep),
        # target, weight and dual read, dual and right-hand side written, mask read
        moved=side * side * (5 * 4 + 1),
        flops=3 * side * side,
        bound="copy",
        dtype=torch.float32,
        peer_name="eager torch",
        peer=lambda: eager(target, weight, theirs, keep),
    )


def eager(target: torch.Tensor, weight: torch.Tensor, dual: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The step as it is written on paper."""
    total = weight + dual
    kept = torch.where(keep, total, 0.0)
    dual += weight - kept
    return target + kept - dual
