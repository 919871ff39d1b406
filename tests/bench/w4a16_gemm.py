"""`w4a16_gemm` and its gradient beside the product by a bfloat16 matrix, which is cuBLAS on a GPU."""

from __future__ import annotations

import torch

from rewright.kernels.w4a16_gemm import w4a16_gemm, w4a16_gemm_dx
from tests.bench.harness import Job
from tests.bench.w4a16_gemv import job, matrix


def jobs(device: str) -> list[Job]:
    """From few rows, where reading the matrix is the work, to many, where multiplying is."""
    n, k = (4096, 14336) if device == "cuda" else (1024, 4096)
    forward = (16, 64, 1024, 4096) if device == "cuda" else (16, 128)
    products = [job(w4a16_gemm, m, n, k, device, "copy" if m <= 64 else "matmul") for m in forward]
    return products + [_gradient(m, n, k, device) for m in forward[-1:]]


def _gradient(m: int, n: int, k: int, device: str) -> Job:
    dy = torch.randn(m, n, device=device).to(torch.bfloat16)
    packed, scale = matrix(n, k, device)
    dense = torch.randn(n, k, device=device).to(torch.bfloat16)
    return Job(
        label=f"{n}x{k} by {m} bfloat16 gradient",
        call=lambda: w4a16_gemm_dx(dy, packed, scale),
        moved=packed.nbytes + scale.nbytes + dy.nbytes + m * k * 2,
        flops=2 * m * n * k,
        bound="matmul",
        dtype=torch.bfloat16,
        peer_name="product by a bfloat16 matrix",
        peer=lambda: dy @ dense,
    )
