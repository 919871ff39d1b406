"""`sparse_mlp` beside the dense MLP, by the share of neurons that are listed."""

from __future__ import annotations

import itertools

import torch

from rewright.kernels.predictor_out import predictor_out
from rewright.kernels.sparse_mlp import sparse_mlp
from tests.bench.harness import Job
from tests.bench.predictor_in import dtype_of
from tests.bench.w4a16_gemv import several

# Width and neurons: an MLP of OPT-125M, of OPT-1.3B, and of OPT-6.7B.
SIZES = {"cpu": ((768, 3072),), "cuda": ((2048, 8192), (4096, 16384))}


def jobs(device: str) -> list[Job]:
    """One token and several; half precision on a GPU."""
    shares = ((1, 0.1), (1, 0.25), (1, 0.5), (8, 0.3))
    return [_job(rows, *size, device, share) for size in SIZES[device] for rows, share in shares]


def dense(x: torch.Tensor, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """All neurons."""
    return torch.relu(torch.nn.functional.linear(x, up, bias)) @ down


def lists(neurons: int, share: float, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of a share of the neurons, drawn at random."""
    drawn = torch.rand(neurons, 1, device=device)
    return predictor_out(torch.ones(1, 1, device=device), -drawn, torch.zeros(neurons, device=device), share)


def _job(rows: int, width: int, neurons: int, device: str, share: float) -> Job:
    dtype = dtype_of(device)
    x = torch.randn(rows, width, device=device).to(dtype)
    # Every neuron is active, so that every row of both matrices is read.
    bias = torch.full((neurons,), 8.0, device=device).to(dtype)

    def matrix() -> torch.Tensor:
        return (torch.randn(neurons, width, device=device) / width**0.5).to(dtype)

    copies = several(4 * neurons * width, device)
    held = itertools.cycle([(matrix(), matrix()) for _ in range(copies)])
    chosen = itertools.cycle([lists(neurons, share, device) for _ in range(8)])

    def call() -> torch.Tensor:
        return sparse_mlp(x, *next(held), bias, *next(chosen), "relu")

    return Job(
        label=f"{share:.0%} of {width}x{neurons} by {rows}",
        call=call,
        moved=round(share * 2 * neurons * width * dtype.itemsize) + 2 * x.nbytes,
        flops=round(share * 4 * rows * neurons * width),
        bound="copy",
        dtype=dtype,
        peer_name="all neurons",
        peer=lambda: dense(x, *next(held), bias),
    )
