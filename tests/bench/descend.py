"""`descend` beside the loop as papers print it: every later column's gradient at every step."""

from __future__ import annotations

import torch

from rewright.kernels.descend import descend
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """Blocks of 32 and 128 columns at 512 to 14336 rows."""
    rows = (4096, 14336) if device == "cuda" else (512, 1024, 2048, 4096)
    return [_job(r, width, device) for width in (32, 128) for r in rows]


def _job(rows: int, width: int, device: str) -> Job:
    weight = torch.randn(width, rows, device=device).t()
    inputs = torch.randn(4 * width, width, device=device)
    hessian = inputs.t() @ inputs / len(inputs)
    scale = weight.abs().amax(dim=1) / 7.5
    keep = torch.rand(width, rows, device=device).t() > 0.5
    value = ((weight / scale[:, None]).round().clamp(-8, 7) * scale[:, None] * keep).t().contiguous().t()
    gradient = (hessian @ (value - weight).t()).t()
    plain = value.contiguous(), gradient.contiguous()
    numbers = rows * width
    return Job(
        label=f"{rows}x{width} float32",
        call=lambda: descend(value, gradient, hessian, scale, keep=keep, low=-8, high=7),
        # value and gradient read, value written, mask read, codes written
        moved=numbers * (3 * 4 + 2) + hessian.nbytes,
        flops=numbers * (width + 8),
        bound="copy",
        dtype=torch.float32,
        peer_name="eager right-looking loop",
        peer=lambda: eager(*plain, hessian, scale, keep, -8, 7),
    )


def eager(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    keep: torch.Tensor,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and values by the textbook loop on row-major storage."""
    q, slope, codes = value.clone(), gradient.clone(), torch.zeros_like(value)
    for j in range(q.shape[1]):
        z = torch.where(keep[:, j], q[:, j] - slope[:, j] / hessian[j, j], 0.0)
        code = torch.clamp(torch.round(z / scale), low, high)
        new = code * scale
        slope[:, j:] += (new - q[:, j]).unsqueeze(1) @ hessian[j, j:].unsqueeze(0)
        codes[:, j], q[:, j] = code, new
    return codes.to(torch.int8), q
