"""What a matrix is fitted to: the dense model's output, from the inputs that the compressed one gives it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.passes.compress.hessian import damped_cholesky
from rewright.passes.compress.statistics import Moments

# Pulls the fit towards the source's weights, as a share of the Hessian's mean diagonal: always, and as much more as
# there are few tokens to tell a drift from chance by, for each column a token.
DAMP, SCARCE = 0.05, 5.0


def fit(weights: Sequence[torch.Tensor], moments: Moments, rows: Sequence[slice], name: str) -> list[torch.Tensor]:
    """The weights W' of least |t - (W' - W) x|^2 + damp mean(diag H) |W' - W|^2, t as in `statistics`.

    `weights` float32 (r, c) each, some `rows` of the stacked matrices of one input. With T = t x^T,
    W' = W + T (H + damp mean(diag H) I)^-1 and damp = DAMP + SCARCE c / tokens. The weights themselves come back where
    no drift was taken or no input came.
    Raises BoundError naming the matrix when the Hessian has no factor.
    """
    if not weights or moments.drift is None or not bool(moments.hessian.diagonal().any()):
        return list(weights)
    damp = DAMP + SCARCE * len(moments.hessian) / max(moments.tokens, 1)
    lower, _ = damped_cholesky(moments.hessian, damp, name)
    found = []
    for weight, span in zip(weights, rows, strict=True):
        wanted = moments.drift[span] if moments.writes else torch.mm(weight, moments.drift)
        found.append(weight + torch.cholesky_solve(wanted.t(), lower).t())
    return found
