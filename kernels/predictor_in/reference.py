"""The definition of `predictor_in`."""

from __future__ import annotations

import torch

from rewright.kernels.neurons import product


@torch.no_grad()
def predictor_in(
    x: torch.Tensor, a: torch.Tensor, a0: torch.Tensor, a_scale: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """t [B, r]; see the package for the mathematics, shapes and dtypes."""
    t = product(x, a, a_scale, a0)
    return t if out is None else out.copy_(t)
