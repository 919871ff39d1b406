"""`vandermonde` and its adjoint beside the sum of exponentials that they are, in complex numbers."""

from __future__ import annotations

import torch

from rewright.kernels.vandermonde import vandermonde, vandermonde_adjoint
from tests.bench.harness import Job

# Channels, entries and length.
SIZES = {"cpu": ((64, 8, 2048), (64, 8, 8192)), "cuda": ((4096, 8, 8192), (256, 16, 1 << 20))}


def modes(channels: int, entries: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Decays of some thousand steps and all angles; residues."""
    decay = -torch.rand(channels, entries, device=device) / 1000
    angle = 3 * (2 * torch.rand(channels, entries, device=device) - 1)
    return torch.stack((decay, angle), dim=-1), torch.randn(channels, entries, 2, device=device)


def jobs(device: str) -> list[Job]:
    """Filters of a layer at two lengths, each evaluated and folded back."""
    return [job for size in SIZES[device] for job in _pair(*size, device)]


def _pair(channels: int, entries: int, length: int, device: str) -> list[Job]:
    logs, residues = modes(channels, entries, device)
    values = torch.randn(channels, length, device=device)
    label = f"{channels}x{entries}x{length}"
    shared = {"moved": values.nbytes, "bound": "copy", "dtype": torch.float32, "peer_name": "complex exponentials"}
    sums = 4 * channels * entries * length
    return [
        Job(
            label=label,
            call=lambda: vandermonde(logs, residues, length),
            flops=sums,
            peer=lambda: exponentials(logs, residues, length),
            **shared,  # type: ignore[arg-type]  # each value is what its field takes
        ),
        Job(
            label=f"{label} adjoint",
            call=lambda: vandermonde_adjoint(logs, values),
            flops=2 * sums,
            peer=lambda: folded(logs, values),
            **shared,  # type: ignore[arg-type]  # as above
        ),
    ]


def exponentials(logs: torch.Tensor, residues: torch.Tensor, length: int) -> torch.Tensor:
    """h by exp(t log p), in the dtype of `logs`."""
    times = torch.arange(length, device=logs.device)
    weighted = torch.view_as_complex(residues)[..., None] * torch.exp(torch.view_as_complex(logs)[..., None] * times)
    return weighted.real.sum(dim=1)


def folded(logs: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and moments by exp(t log p)."""
    times = torch.arange(values.shape[1], device=logs.device)
    terms = values[:, None] * torch.exp(torch.view_as_complex(logs)[..., None] * times)
    return torch.view_as_real(terms.sum(dim=2)), torch.view_as_real((terms * times).sum(dim=2))
