"""The fit from Hankel matrices to polished poles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rewright.passes.hyena_distill.bound import half, weighted
from rewright.passes.hyena_distill.hankel import Hankel, leading
from rewright.passes.hyena_distill.polish import Polished, polish
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.start import shift_poles
from rewright.passes.hyena_distill.states import States, from_poles


def longest(length: int) -> float:
    """Steps in which a mode of a filter of `length` samples may shrink to 1 / e at most."""
    return 4.0 * length


def closed_form(
    samples: torch.Tensor, order: int, refine: int, *, limit: float, horizon: int | None, seed: int
) -> Polished:
    """Recurrences of `order` states for `samples` [C, n], n > order, of norm 1 each.

    Poles come from the half window's Hankel matrix, plain and with the weights of the bound, or from the whole one with
    zeros after it where the `horizon` is one; each start is polished for at most `refine` steps, and the best is kept.
    Modes shrink by 1 / `limit` a step at least.
    """
    best: Polished | None = None
    for states in _starts(samples, order, limit, horizon, seed):
        found = polish(states, samples, refine, limit, horizon=horizon)
        best = found if best is None else best.better(found)
    assert best is not None
    return best


def _starts(samples: torch.Tensor, order: int, limit: float, horizon: int | None, seed: int) -> Iterator[States]:
    length = samples.shape[1]
    if horizon is not None:
        yield shift_poles(leading(Hankel(samples, length), order, seed), order, limit)
    yield shift_poles(leading(Hankel(samples, half(length)), order, seed), order, limit)
    matrix, pairs = weighted(samples, order, seed)
    yield shift_poles(pairs, order, limit, matrix.weights)


def interpolated(samples: torch.Tensor, limit: float) -> Polished:
    """Recurrences of n states that are `samples` [C, n] exactly: Fourier sums that shrink by e^4 in a period."""
    channels, length = samples.shape
    turn = torch.arange(length, dtype=torch.float64, device=samples.device)
    turn = torch.where(turn > length / 2, turn - length, turn) * (2 * math.pi / length)
    size = torch.full_like(turn, math.exp(-4 / length))
    poles = torch.polar(size, turn)
    real = torch.sin(turn).abs() < 1e-9
    poles = torch.where(real, poles.real + 0j, poles)
    states = from_poles(poles.expand(channels, -1), limit)
    return Polished(states, *residues(states, samples))
