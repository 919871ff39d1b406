"""`w4a16_gemm` and its gradient beside the product by a bfloat16 matrix, which is cuBLAS on a GPU."""

from __future__ import annotations

import itertools

import torch

from rewright.kernels.w4a16_gemm import w4a16_gemm, w4a16_gemm_dx
from tests.bench.harness import Job
from tests.bench.w4a16_gemv import GROUP, matrix, several


def jobs(device: str) -> list[Job]:
    """From few rows, where reading the matrix is the work, to many, where multiplying is."""
    n, k = (4096, 14336) if device == "cuda" else (1024, 4096)
    forward = (16, 64, 1024, 4096) if device == "cuda" else (16, 128)
    return [_forward(m, n, k, device) for m in forward] + [_gradient(m, n, k, device) for m in forward[-1:]]


def _forward(m: int, n: int, k: int, device: str) -> Job:
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    size = n * k // 2 + n * k // GROUP * 2
    held = itertools.cycle([matrix(n, k, device) for _ in range(several(size, device))])
    dense = [torch.randn(n, k, device=device).to(torch.bfloat16) for _ in range(several(2 * n * k, device))]
    weights = itertools.cycle(dense)
    return Job(
        label=f"{n}x{k} by {m} bfloat16",
        call=lambda: w4a16_gemm(x, *next(held)),
        moved=size + x.nbytes + m * n * 2,
        flops=2 * m * n * k,
        bound="copy" if m <= 64 else "matmul",
        dtype=torch.bfloat16,
        peer_name="product by a bfloat16 matrix",
        peer=lambda: torch.nn.functional.linear(x, next(weights)),
    )


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
