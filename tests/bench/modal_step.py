"""`modal_step` beside the same token in torch's complex numbers, operation by operation."""

from __future__ import annotations

import torch

from rewright.kernels.modal_step import modal_step
from tests.bench.harness import Job

# Batch and width, all with 8 entries and a short convolution of 3.
SIZES = {"cpu": ((1, 256), (16, 512)), "cuda": ((32, 2048), (64, 4096))}


def jobs(device: str) -> list[Job]:
    """One layer's token; half precision on a GPU."""
    return [_job(*size, device) for size in SIZES[device]]


def arguments(batch: int, width: int, device: str) -> tuple[torch.Tensor, ...]:
    """What `modal_step` takes."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    halves = normal(batch, 3 * width), normal(batch, 3 * width, 2), normal(3 * width, 3), normal(3 * width)
    wide = normal(batch, width, 8, 2), 0.3 * normal(width, 8, 2), normal(width, 8, 2), normal(width)
    return *(t.to(dtype) for t in halves), *wide


def _job(batch: int, width: int, device: str) -> Job:
    mine, theirs = arguments(batch, width, device), arguments(batch, width, device)
    z, recent, _, _, state, *_ = mine
    return Job(
        label=f"{batch}x{width} {str(z.dtype).removeprefix('torch.')}",
        call=lambda: modal_step(*mine),
        # The state and what is remembered are read and written, the rest is read, or written, once.
        moved=state.nbytes + recent.nbytes + sum(t.nbytes for t in mine) + z.nbytes // 3,
        flops=batch * width * (12 * 8 + 20),
        bound="copy",
        dtype=torch.float32,
        peer_name="eager complex",
        peer=lambda: eager(*theirs),
    )


def eager(
    z: torch.Tensor,
    recent: torch.Tensor,
    taps: torch.Tensor,
    bias: torch.Tensor,
    state: torch.Tensor,
    poles: torch.Tensor,
    residues: torch.Tensor,
    h0: torch.Tensor,
) -> torch.Tensor:
    """y by the steps of a plain implementation, with the state updated in place."""
    window = torch.cat((recent, z[:, :, None]), dim=2)
    recent.copy_(window[:, :, 1:])
    outer, inner, value = ((window * taps).sum(dim=2) + bias).chunk(3, dim=1)
    u = inner * value
    x = torch.view_as_complex(state)
    y = h0 * u + (x * torch.view_as_complex(residues)).sum(dim=2).real
    x.copy_(x * torch.view_as_complex(poles) + u[:, :, None])
    return outer * y.to(z.dtype)
