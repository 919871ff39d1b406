"""`vp_gram` beside the products of the basis itself."""

from __future__ import annotations

import torch

from rewright.kernels.vp_gram import vp_gram
from tests.bench.harness import Job
from tests.bench.vandermonde import modes

# Channels, entries and length.
SIZES = {"cpu": ((64, 8, 2048), (512, 8, 8192)), "cuda": ((4096, 8, 8192), (4096, 16, 8192))}


def jobs(device: str) -> list[Job]:
    """Filters of a layer; what is moved is the matrices that come out. The peer is given at most 64 of them."""
    return [_job(*size, device) for size in SIZES[device]]


def _job(channels: int, entries: int, length: int, device: str) -> Job:
    logs = modes(channels, entries, device)[0].double()
    few = logs[:64] if device == "cpu" else logs
    return Job(
        label=f"{channels}x{entries}x{length} float64",
        call=lambda: vp_gram(logs, length),
        moved=3 * channels * (2 * entries) ** 2 * 8,
        flops=400 * channels * entries * entries,
        bound="copy",
        dtype=torch.float64,
        peer_name="products of the basis (of 64 channels on a CPU)",
        peer=lambda: products(few, length),
    )


def products(logs: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The three matrices by sums over all steps."""
    times = torch.arange(length, dtype=logs.dtype, device=logs.device)
    powers = torch.exp(torch.view_as_complex(logs)[..., None] * times)
    basis = torch.cat((powers.real, -powers.imag), dim=1)
    return [(basis * times**moment) @ basis.transpose(1, 2) for moment in range(3)]
