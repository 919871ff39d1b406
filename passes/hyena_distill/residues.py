"""Residues by least squares where the poles are known."""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.orthogonal import Factor, factor
from rewright.passes.hyena_distill.rules import PLAIN, Rules
from rewright.passes.hyena_distill.states import States


def solve(found: Factor, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [C, d] of the first `order` columns of a factorisation, and the error [C] that they leave."""
    triangle = found.triangle[:, :order, :order]
    coefficients = torch.linalg.solve_triangular(triangle, found.inside[:, :order, None], upper=True)[:, :, 0]
    return coefficients, torch.hypot(found.inside[:, order:].norm(dim=1), found.outside)


def residues(states: States, samples: torch.Tensor, rules: Rules = PLAIN) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [C, d] of the states' columns for `samples` [C, n], n >= d, and the errors [C] by `rules`."""
    return solve(factor(states, samples, rules, slopes=False), states.order)
