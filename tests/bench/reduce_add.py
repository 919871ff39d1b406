"""`reduce_add` beside torch's sum and additions."""

from __future__ import annotations

import torch

from rewright.kernels.reduce_add import reduce_add
from tests.bench.harness import Job
from tests.bench.predictor_in import dtype_of

# Parts, rows and width.
SIZES = {"cpu": ((1, 1, 2048), (8, 4, 2048)), "cuda": ((264, 1, 4096), (264, 8, 4096))}


def jobs(device: str) -> list[Job]:
    """What two programs for each of 132 multiprocessors leave; one part alone on a CPU."""
    return [_job(*size, device) for size in SIZES[device]]


def summed(partial: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Operation by operation."""
    return (partial.sum(dim=0) + bias + residual).to(residual.dtype)


def _job(parts: int, rows: int, width: int, device: str) -> Job:
    dtype = dtype_of(device)
    partial = torch.randn(parts, rows, width, device=device)
    bias = torch.randn(width, device=device).to(dtype)
    residual = torch.randn(rows, width, device=device).to(dtype)
    return Job(
        label=f"{parts}x{rows}x{width}",
        call=lambda: reduce_add(partial, bias, residual, dtype),
        moved=partial.nbytes + bias.nbytes + 2 * residual.nbytes,
        flops=partial.numel() + 2 * residual.numel(),
        bound="copy",
        dtype=torch.float32,
        peer_name="sum and additions",
        peer=lambda: summed(partial, bias, residual),
    )
