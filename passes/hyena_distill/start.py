"""Poles from the leading eigenvectors of a filter's Hankel matrix, by shift invariance.

The rows of the vectors' span O obey O_(i + 1) = O_i A where the filter is a recurrence, and nearly so where it is near
one; the eigenvalues of A are the poles (Ho and Kalman 1966; Kung 1978; ESPRIT).
"""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.hankel import Leading
from rewright.passes.hyena_distill.states import States, from_poles


def transition(pairs: Leading, order: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """A [C, d, d] that takes each row of the span of the first d vectors to the next in the sense of least squares.

    `weights` [m] are those that scaled the Hankel matrix, which also weigh the rows here.
    """
    vectors = pairs.vectors[:, :, :order]
    here, there = vectors[:, :-1], vectors[:, 1:]
    if weights is not None:
        there = there * (weights[:-1] / weights[1:])[:, None]
    # columns are orthonormal with the last row in them: the Gram matrix without it has an inverse of one more rank
    last = vectors[:, -1:]
    mixed = here.transpose(1, 2) @ there
    left = (1 - last.square().sum(dim=2, keepdim=True)).clamp_min(1e-12)
    return mixed + last.transpose(1, 2) @ (last @ mixed) / left


def shift_poles(pairs: Leading, order: int, longest: float, weights: torch.Tensor | None = None) -> States:
    """States of `order` real columns, or of as many as the matrix has rows, from leading eigenpairs."""
    A = transition(pairs, min(order, pairs.vectors.shape[2]), weights)
    return from_poles(torch.linalg.eigvals(A), longest)
