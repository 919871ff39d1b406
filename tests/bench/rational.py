"""`rational` with its gradient beside torch's autograd through the quotients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rewright.kernels.rational import rational
from tests.bench.harness import Job

# Channels, entries and points.
SIZES = {"cpu": ((16, 8, 2048), (64, 16, 2048)), "cuda": ((4096, 16, 4096), (256, 64, 1 << 16))}


def jobs(device: str) -> list[Job]:
    """Responses on the unit circle, with the gradients of all poles and residues."""
    return [_job(*size, device) for size in SIZES[device]]


def _job(channels: int, entries: int, points: int, device: str) -> Job:
    angle = torch.linspace(0, 3.14, points, device=device)
    circle = torch.stack((angle.cos(), angle.sin()), dim=-1)
    leaves = [0.5 * torch.randn(channels, n, 2, device=device) for n in (entries, entries, 1)]
    poles, residues, direct = (t.squeeze(1).requires_grad_() for t in leaves)
    upstream = torch.randn(channels, points, 2, device=device)

    def run(op: Callable[..., torch.Tensor]) -> Callable[[], object]:
        given = circle, poles, residues, direct
        return lambda: torch.autograd.grad(op(*given), (poles, residues, direct), upstream)

    return Job(
        label=f"{channels}x{entries}x{points}",
        call=run(rational),
        moved=2 * upstream.nbytes,
        flops=45 * channels * entries * points,
        bound="matmul",
        dtype=torch.float32,
        peer_name="autograd of quotients",
        peer=run(quotients),
    )


def quotients(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """All quotients at once."""
    x, p, r, d = (torch.view_as_complex(t) for t in (points, poles, residues, direct))
    return torch.view_as_real(d[:, None] + (r[:, None] / (x[None, :, None] - p[:, None])).sum(dim=2))
