"""Balanced truncation, a baseline: the classical reduction, of a filter that is followed by zeros.

With S = U E U^T the Hankel matrix of all samples and zeros, |E|^(1/2) U^T and U |E|^(1/2) are a balanced realisation,
of which the leading states are kept (Moore 1981; Kung 1978). Its residues are its own, not those of least error.
"""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.hankel import Hankel, leading
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.start import transition
from rewright.passes.hyena_distill.states import States, from_poles


def balanced(samples: torch.Tensor, order: int, *, limit: float, seed: int) -> Polished:
    """Balanced truncations to `order` states of `samples` [C, n], n >= order.

    Modes shrink by 1 / `limit` a step at least, which moves none but those that rounding took there.
    """
    length = samples.shape[1]
    pairs = leading(Hankel(samples, length), order, seed)
    A = transition(pairs, order)
    # x_(t + 1) = A x_t in the coordinates of U: C is its first row, B the first column of E U^T
    first = pairs.vectors[:, 0]
    values, modes = torch.linalg.eig(A)
    inputs = torch.linalg.solve(modes, (pairs.values * first).to(modes.dtype)[:, :, None])[:, :, 0]
    weights = (first.to(modes.dtype)[:, None] @ modes)[:, 0] * inputs
    states = from_poles(values, limit)
    coefficients = _columns(values, weights, states)
    errors = (samples - states.sum(coefficients, length)).square().sum(dim=1).sqrt()
    return Polished(states, coefficients, errors)


def _columns(values: torch.Tensor, weights: torch.Tensor, states: States) -> torch.Tensor:
    """Coefficients of the states' columns: of a pair with weight w at p and w̄ at p̄ they are 2 Re w and 2 Im w."""
    rank = torch.where(values.imag == 0, 1, torch.where(values.imag > 0, 0, 2))
    order = rank.argsort(dim=1, stable=True)
    kinds = states.kinds()
    column = torch.arange(states.order, device=values.device)
    entry = torch.where(kinds > 0, column // 2, column - states.pairs[:, None])
    own = weights.gather(1, order.gather(1, entry))
    return torch.where(kinds == 0, own.real, torch.where(kinds == 1, 2 * own.real, 2 * own.imag))
