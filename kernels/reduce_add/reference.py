"""The definition of `reduce_add`."""

from __future__ import annotations

import torch


@torch.no_grad()
def reduce_add(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    dtype: torch.dtype,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """y [B, d]; see the package for the mathematics, shapes and dtypes."""
    y = partial[0] if len(partial) == 1 else partial.sum(dim=0)
    for term in (bias, residual):
        if term is not None:
            y = y + term
    if out is not None:
        return out.copy_(y)
    # One part alone is the caller's.
    return y.to(dtype, copy=len(partial) == 1 and bias is None and residual is None)
