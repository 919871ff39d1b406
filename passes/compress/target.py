"""What a matrix is fitted to: the dense model's output, from the inputs that the compressed one gives it."""

from __future__ import annotations

import torch

from rewright.passes.compress.hessian import damped_cholesky
from rewright.passes.compress.statistics import Moments

# Pulls the fit towards the source's weights, as a share of the Hessian's mean diagonal: always, and as much more as
# there are few tokens to tell a drift from chance by, for each column a token.
DAMP, SCARCE = 0.05, 5.0


def fit(weight: torch.Tensor, moments: Moments, name: str) -> torch.Tensor:
    """The weights of least |t - (W' - W) x|^2 + damp mean(diag H) |W' - W|^2, t as in `statistics`.

    `weight` (r, c) float32, stacked matrices of one input. W' = W + T (H + damp mean(diag H) I)^-1 with T = t x^T and
    damp = DAMP + SCARCE c / tokens. Returns (r, c); the weights themselves where no drift was taken or no input came.
    Raises BoundError naming the matrix when the Hessian has no factor.
    """
    assert moments.hessian is not None
    if moments.drift is None or not bool(moments.hessian.diagonal().any()):
        return weight
    wanted = moments.drift if moments.writes else torch.mm(weight, moments.drift)
    damp = DAMP + SCARCE * weight.shape[1] / max(moments.tokens, 1)
    lower, _ = damped_cholesky(moments.hessian, damp, name)
    return weight + torch.cholesky_solve(wanted.t(), lower).t()
