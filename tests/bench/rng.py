"""`random_bits` beside torch's own generator."""

from __future__ import annotations

import torch

from rewright.kernels.rng import random_bits
from tests.bench.harness import Job


def jobs(device: str) -> list[Job]:
    """One long draw."""
    count = 1 << (26 if device == "cuda" else 20)
    target = torch.empty(count, dtype=torch.int32, device=device)
    return [
        Job(
            label=f"{count} words",
            call=lambda: random_bits(count, seed=1, device=device),
            moved=target.nbytes,
            flops=0,
            bound="copy",
            dtype=torch.int32,
            peer_name="torch.Tensor.random_",
            peer=lambda: target.random_(),
        )
    ]
