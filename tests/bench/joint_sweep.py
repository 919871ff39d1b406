"""`joint_sweep` beside the loop as papers print it: right-looking, eager, every later column at every step."""

from __future__ import annotations

import torch

from rewright.kernels.joint_sweep import joint_sweep
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Blocks of 32 and 128 columns at 512 to 14336 rows."""
    rows = (4096, 14336) if device == "cuda" else (512, 1024, 2048, 4096)
    return [_job(r, width, device) for width in (32, 128) for r in rows]


def _job(rows: int, width: int, device: str) -> Job:
    weight = torch.randn(width, rows, device=device).t()
    factor = torch.eye(width, device=device) + torch.randn(width, width, device=device).triu(1) / 16
    scale = weight.abs().amax(dim=1) / 7.5
    keep = torch.rand(width, rows, device=device).t() > 0.5
    plain = weight.contiguous()
    numbers = rows * width
    return Job(
        label=f"{rows}x{width} float32",
        call=lambda: joint_sweep(weight, factor, scale, keep=keep, low=-8, high=7),
        # weight read, value and error written, mask read, codes written
        moved=numbers * (3 * 4 + 2) + factor.nbytes,
        flops=numbers * (width + 8),
        bound="copy",
        dtype=torch.float32,
        peer_name="eager right-looking loop",
        peer=lambda: eager(plain, factor, scale, keep, -8, 7),
    )


def eager(
    weight: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, keep: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, values and errors by the textbook loop on row-major storage."""
    w = weight.clone()
    codes, value, error = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for j in range(w.shape[1]):
        column = w[:, j]
        z = torch.where(keep[:, j], column, 0.0)
        code = torch.clamp(torch.round(z / scale), low, high)
        q = code * scale
        e = (column - q) / factor[j, j]
        w[:, j:] -= e.unsqueeze(1) @ factor[j, j:].unsqueeze(0)
        codes[:, j], value[:, j], error[:, j] = code, q, e
    return codes.to(torch.int8), value, error
