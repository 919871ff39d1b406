"""`hessian_update` beside a full `torch.mm`; FLOPs are counted for the half that has to be computed."""

from __future__ import annotations

import torch

from rewright.kernels.hessian_update import hessian_update
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Calibration chunks at the widths of small and large models."""
    gpu = device == "cuda"
    dtypes = (torch.bfloat16, torch.float32) if gpu else (torch.float32,)
    shapes = ((4096, 4096), (4096, 14336)) if gpu else ((256, 512), (1024, 512), (1024, 1408), (1024, 4096))
    return [_job(tokens, columns, dtype, device) for dtype in dtypes for tokens, columns in shapes]


def _job(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Job:
    X = torch.randn(tokens, columns, device=device).to(dtype)
    H = torch.zeros(columns, columns, device=device)
    return Job(
        label=f"X {tokens}x{columns} {str(dtype).removeprefix('torch.')}",
        call=lambda: hessian_update(H, X, 2.0 / tokens),
        moved=X.nbytes + 2 * H.nbytes,
        flops=tokens * columns * (columns + 1),
        bound="matmul",
        dtype=dtype,
        peer_name="torch.mm(X.t(), X)",
        peer=lambda: torch.mm(X.t(), X),
    )
