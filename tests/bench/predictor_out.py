"""`predictor_out` beside the product by a float matrix, and the list of what is above 0 that torch makes."""

from __future__ import annotations

import itertools

import torch

from rewright.kernels.predictor_out import predictor_out
from tests.bench.harness import Job
from tests.bench.predictor_in import dtype_of, factor
from tests.bench.w4a16_gemv import several

# Rank and neurons: a predictor of OPT-1.3B, and of OPT-6.7B.
SIZES = {"cpu": ((128, 8192),), "cuda": ((128, 8192), (256, 16384))}


def jobs(device: str) -> list[Job]:
    """One token and several; half precision on a GPU, with codes or without."""
    return [
        _job(rows, *size, device, coded)
        for size in SIZES[device]
        for rows, coded in ((1, False), (1, True), (8, False))
    ]


def listed(t: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The active neurons, operation by operation; torch waits for the device to count them."""
    return (torch.nn.functional.linear(t, b, c) > 0).any(dim=0).nonzero()


def _job(rows: int, rank: int, neurons: int, device: str, coded: bool) -> Job:
    dtype = dtype_of(device)
    t = torch.randn(rows, rank, device=device)
    # About a tenth of the neurons for a row.
    c = torch.full((neurons,), -1.3, device=device)
    given = [factor(neurons, rank, device, coded) for _ in range(several(neurons * rank, device))]
    held = itertools.cycle(given)
    dense = itertools.cycle([factor(neurons, rank, device, False)[0] for _ in given])
    narrow, plain = t.to(dtype), c.to(dtype)

    def call() -> object:
        b, scale = next(held)
        return predictor_out(t, b, c, 0.0, scale)

    return Job(
        label=f"{rows}x{rank} to {neurons} {str(given[0][0].dtype).removeprefix('torch.')}",
        call=call,
        moved=given[0][0].nbytes + c.nbytes + t.nbytes + neurons * 4,
        flops=2 * rows * rank * neurons,
        bound="copy",
        dtype=dtype,
        peer_name="product, any, nonzero",
        peer=lambda: listed(narrow, next(dense), plain),
    )
