"""`modal_chunk_prefill` beside a convolution by torch.fft with filters that are there already."""

from __future__ import annotations

import torch

from rewright.kernels.modal_chunk_prefill import modal_chunk_prefill
from tests.bench.harness import Job
from tests.bench.vandermonde import modes

# Batch, channels and samples, all with 8 entries.
SIZES = {"cpu": ((1, 64, 8192), (4, 64, 2048)), "cuda": ((8, 4096, 8192), (1, 2048, 1 << 17))}


def jobs(device: str) -> list[Job]:
    """Prompts of a layer; half precision on a GPU."""
    return [_job(*size, device) for size in SIZES[device]]


def _job(batch: int, channels: int, times: int, device: str) -> Job:
    logs, residues = modes(channels, 8, device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    u, h0 = torch.randn(batch, channels, times, device=device).to(dtype), torch.randn(channels, device=device)
    response = torch.randn(channels, times, device=device)
    return Job(
        label=f"{batch}x{channels}x{times} {str(dtype).removeprefix('torch.')}",
        call=lambda: modal_chunk_prefill(u, logs, residues, h0),
        moved=2 * u.nbytes,
        flops=2 * u.numel() * (32 + 4 * 8),
        bound="copy",
        dtype=torch.float32,
        peer_name="torch.fft without a state",
        peer=lambda: convolved(u, response),
    )


def convolved(u: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """The causal convolution, by transforms of twice the length."""
    times = u.shape[2]
    spectrum = torch.fft.rfft(u.float(), 2 * times) * torch.fft.rfft(response, 2 * times)
    return torch.fft.irfft(spectrum, 2 * times)[..., :times].to(u.dtype)
