"""Residues by least squares where the poles are known."""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.orthogonal import Factor, factor
from rewright.passes.hyena_distill.states import States

# Of a column's length: below it, what is new in a column is rounding.
_RANK = 1e-15


def solve(found: Factor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [C, d] of the first `order` columns of a factorisation, and the l2 error [C] they leave."""
    triangle = found.triangle[:, :order, :order]
    lengths = triangle.norm(dim=1)
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    least = _RANK * lengths.amax(dim=1, keepdim=True).clamp_min(1e-300)
    safe = torch.where(diagonal.abs() < least, torch.where(diagonal < 0, -least, least), diagonal)
    triangle = triangle + torch.diag_embed(safe - diagonal)
    coefficients = torch.linalg.solve_triangular(triangle, found.inside[:, :order, None], upper=True)[:, :, 0]
    rest = found.inside[:, order:]
    return coefficients, torch.hypot(rest.norm(dim=1), found.outside)


def residues(states: States, samples: torch.Tensor, *, horizon: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [C, d] of the states' columns for `samples` [C, n], n >= d, and the l2 errors [C]."""
    return solve(factor(states, samples, slopes=False, horizon=horizon), states.order)
