"""`modal_fit_step` beside torch's autograd through the sum of exponentials."""

from __future__ import annotations

import torch

from rewright.kernels.modal_fit_step import modal_fit_step
from tests.bench.harness import Job
from tests.bench.vandermonde import exponentials, modes

# Channels, entries and length.
SIZES = {"cpu": ((64, 8, 2048), (64, 8, 8192)), "cuda": ((4096, 8, 8192), (4096, 16, 8192))}


def jobs(device: str) -> list[Job]:
    """Filters of a layer."""
    return [_job(*size, device) for size in SIZES[device]]


def _job(channels: int, entries: int, length: int, device: str) -> Job:
    logs, residues = modes(channels, entries, device)
    target = torch.randn(channels, length, device=device)
    return Job(
        label=f"{channels}x{entries}x{length}",
        call=lambda: modal_fit_step(target, logs, residues),
        moved=target.nbytes,
        flops=12 * channels * entries * length,
        bound="copy",
        dtype=torch.float32,
        peer_name="autograd of exponentials",
        peer=lambda: eager(target, logs, residues),
    )


def eager(
    target: torch.Tensor, logs: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss and gradients."""
    leaves = logs.clone().requires_grad_(), residues.clone().requires_grad_()
    loss = (exponentials(*leaves, target.shape[1]) - target).square().sum(dim=1)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)
