"""`thresholded_linear` with `reduce_add` beside the dense product."""

from __future__ import annotations

import torch
from torch.nn import functional

from rewright.kernels.reduce_add import reduce_add
from rewright.kernels.thresholded_linear import thresholded_linear
from tests.bench.harness import Job
from tests.bench.predictor_in import dtype_of

# Rows, columns, outputs, and the share of columns that is read.
SIZES = {
    "cpu": ((1, 2048, 2048, 0.25), (1, 2048, 2048, 0.5), (4, 2048, 2048, 0.5)),
    "cuda": ((1, 4096, 4096, 0.5), (1, 4096, 28672, 0.5), (1, 14336, 4096, 0.25), (8, 4096, 4096, 0.5)),
}


def jobs(device: str) -> list[Job]:
    """Matrices of a layer of Llama 8B; smaller ones on a CPU."""
    return [_job(*size, device) for size in SIZES[device]]


def _job(rows: int, width: int, outputs: int, density: float, device: str) -> Job:
    dtype = dtype_of(device)
    weight = torch.randn(width, outputs, device=device).to(dtype)
    dense = weight.t().contiguous()
    # the same columns in every row
    read = torch.rand(width, device=device) < density
    x = (torch.where(read, 1.5, 0.01) * torch.ones(rows, 1, device=device)).to(dtype)
    threshold = torch.ones(width, device=device)
    return Job(
        label=f"{rows}x{width}x{outputs} {density:g}",
        call=lambda: reduce_add(thresholded_linear(x, weight, threshold), None, None, dtype),
        moved=int(read.sum()) * outputs * weight.element_size() + x.nbytes + rows * outputs * weight.element_size(),
        flops=2 * rows * int(read.sum()) * outputs,
        bound="copy",
        dtype=dtype,
        peer_name="dense product",
        peer=lambda: functional.linear(x, dense),
    )
