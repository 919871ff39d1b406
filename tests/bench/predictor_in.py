"""`predictor_in` beside the product by a float matrix of the same shape, which is cuBLAS on a GPU."""

from __future__ import annotations

import itertools

import torch

from rewright.kernels.predictor_in import predictor_in
from tests.bench.harness import Job
from tests.bench.w4a16_gemv import several

# Width and rank: a predictor of OPT-1.3B, and of OPT-6.7B.
SIZES = {"cpu": ((2048, 128),), "cuda": ((2048, 128), (4096, 256))}


def jobs(device: str) -> list[Job]:
    """One token and several; half precision on a GPU, with codes or without."""
    return [
        _job(rows, *size, device, coded)
        for size in SIZES[device]
        for rows, coded in ((1, False), (1, True), (8, False))
    ]


def factor(rows: int, columns: int, device: str, coded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A factor of a predictor, and the scales of an int8 one."""
    if coded:
        codes = torch.randint(-127, 128, (rows, columns), device=device).to(torch.int8)
        return codes, torch.full((rows,), 1 / 128, device=device)
    return (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype_of(device)), None


def dtype_of(device: str) -> torch.dtype:
    """What models are decoded in there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _job(rows: int, width: int, rank: int, device: str, coded: bool) -> Job:
    dtype = dtype_of(device)
    x = torch.randn(rows, width, device=device).to(dtype)
    a0 = torch.randn(rank, device=device)
    given = [factor(rank, width, device, coded) for _ in range(several(rank * width, device))]
    held = itertools.cycle(given)
    dense = itertools.cycle([factor(rank, width, device, False)[0] for _ in given])
    plain = a0.to(dtype)

    def call() -> torch.Tensor:
        a, scale = next(held)
        return predictor_in(x, a, a0, scale)

    return Job(
        label=f"{rows}x{width} to {rank} {str(given[0][0].dtype).removeprefix('torch.')}",
        call=call,
        moved=given[0][0].nbytes + x.nbytes + rows * rank * 4,
        flops=2 * rows * width * rank,
        bound="copy",
        dtype=dtype,
        peer_name="product by a float matrix",
        peer=lambda: torch.nn.functional.linear(x, next(dense), plain),
    )
