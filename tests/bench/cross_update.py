"""`cross_update` beside a plain `torch.mm`."""

from __future__ import annotations

import torch

from rewright.kernels.cross_update import cross_update
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Calibration chunks at the widths of small and large models."""
    gpu = device == "cuda"
    dtypes = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
    shapes = ((4096, 4096), (4096, 14336)) if gpu else ((256, 512), (1024, 512), (1024, 1408))
    return [_job(tokens, columns, dtype, device) for dtype in dtypes for tokens, columns in shapes]


def _job(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Job:
    left = torch.randn(tokens, columns, device=device).to(dtype)
    right = torch.randn(tokens, columns, device=device).to(dtype)
    total = torch.zeros(columns, columns, device=device)
    return Job(
        label=f"{tokens}x{columns} {str(dtype).removeprefix('torch.')}",
        call=lambda: cross_update(total, left, right, 1.0 / tokens),
        moved=left.nbytes + right.nbytes + 2 * total.nbytes,
        flops=2 * tokens * columns * columns,
        bound="matmul",
        dtype=dtype,
        peer_name="torch.mm(left.t(), right)",
        peer=lambda: torch.mm(left.t(), right),
    )
