"""Whether tensors hold numbers only."""

from __future__ import annotations

import torch

# Elements looked at together: what a look takes beside the tensor itself is a few times 4 MiB.
PIECE = 1 << 20


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no element of a floating-point tensor of any shape is infinite or no number."""
    return all(bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.flatten(), PIECE))
