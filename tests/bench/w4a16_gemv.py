"""`w4a16_gemv` beside the product by a bfloat16 matrix, which is cuBLAS on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from rewright.kernels.w4a16_gemv import w4a16_gemv
from tests.bench.harness import Bound, Job

GROUP = 128
# So many bytes of matrices are gone through in turn that no cache holds the next.
ROOM = {"cuda": 1 << 28, "cpu": 1 << 25}


def jobs(device: str) -> list[Job]:
    """Matrices of a layer of a model of 8 billion weights, by 1 to 8 rows; smaller ones on a CPU."""
    shapes = ((4096, 14336), (14336, 4096), (4096, 4096)) if device == "cuda" else ((1024, 4096),)
    return [job(w4a16_gemv, m, n, k, device, "copy") for n, k in shapes for m in (1, 4, 8)]


def matrix(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and scales of random weights."""
    packed = torch.randint(-(1 << 31), 1 << 31, (n, k // 8), device=device).to(torch.int32)
    return packed, (torch.rand(n, k // GROUP, device=device) / 64).to(torch.bfloat16)


def several(nbytes: int, device: str) -> int:
    """How many matrices of so many bytes to go through."""
    return max(1, -(-ROOM[device] // nbytes))


def job(call: Callable[..., object], m: int, n: int, k: int, device: str, bound: Bound) -> Job:
    """One product of m rows by 4-bit codes, `call(x, packed, scale)`, beside that by as large a bfloat16 matrix."""
    x = torch.randn(m, k, device=device).to(torch.bfloat16)
    size = n * k // 2 + n * k // GROUP * 2
    held = itertools.cycle([matrix(n, k, device) for _ in range(several(size, device))])
    dense = [torch.randn(n, k, device=device).to(torch.bfloat16) for _ in range(several(2 * n * k, device))]
    weights = itertools.cycle(dense)
    return Job(
        label=f"{n}x{k} by {m} bfloat16",
        call=lambda: call(x, *next(held)),
        moved=size + x.nbytes + m * n * 2,
        flops=2 * m * n * k,
        bound=bound,
        dtype=torch.bfloat16,
        peer_name="product by a bfloat16 matrix",
        peer=lambda: torch.nn.functional.linear(x, next(weights)),
    )
