"""The fit from Hankel matrices to polished poles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rewright.passes.hyena_distill.bound import half, weighted
from rewright.passes.hyena_distill.exchange import exchange
from rewright.passes.hyena_distill.hankel import Hankel, leading
from rewright.passes.hyena_distill.interpolate import interpolate
from rewright.passes.hyena_distill.polish import Polished, polish
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.start import shift_poles
from rewright.passes.hyena_distill.states import States, from_poles

# Relative errors above which the minimum that a polish ends in is one of many.
_ROUGH = 1e-3
# Times the steps of a polish that the best one goes on for below that.
_SLOW = 3
# For those above: steps of the interpolation, and rounds of exchanged poles with the steps of their polishes.
_INTERPOLATIONS, _ROUNDS, _SHORT = 20, 6, 20
# Decay a step above which a start's pole may be the work of rounding, and most of it over all poles of a ring.
_TAME, _RING = 2.0, 16.0


def longest(length: int) -> float:
    """Steps in which a mode of a filter of `length` samples may shrink to 1 / e at most."""
    return 4.0 * length


def closed_form(samples: torch.Tensor, order: int, refine: int, rules: Rules, seed: int) -> Polished:
    """Recurrences of `order` states for `samples` [C, n], n > order, of norm 1 each.

    Poles come from the half window's Hankel matrix, plain and with the weights of the bound, and from the whole one
    with zeros after it where `rules` have a horizon. Each start is polished for at most `refine` steps, and the best is
    kept. That of a smooth filter, whose minimum is a long valley, takes more steps; what stays rough more starts.
    """
    starts = [_tamed(states, samples, rules) for states in _starts(samples, order, rules, seed)]
    best = _best([polish(states, samples, refine, rules) for states in starts])
    if refine == 0:
        return best
    smooth = (best.errors <= _ROUGH).nonzero()[:, 0]
    if len(smooth):
        begun = best.rows(smooth)
        more = polish(begun.states, samples[smooth], _SLOW * refine, rules.rows(smooth))
        best = best.put(smooth, begun.better(more))
    rough = (best.errors > _ROUGH).nonzero()[:, 0]
    if len(rough) == 0:
        return best
    part, better, held = samples[rough], best.rows(rough), rules.rows(rough)
    for states in starts:
        moved = interpolate(states.rows(rough), part, _INTERPOLATIONS, held)
        better = better.better(polish(moved.states, part, refine, held))
    if part.shape[1] > order + 2:
        better = exchange(better, part, _ROUNDS, min(refine, _SHORT), held)
    return best.put(rough, better)


def _best(fits: list[Polished]) -> Polished:
    best = fits[0]
    for other in fits[1:]:
        best = best.better(other)
    return best


def _tamed(states: States, samples: torch.Tensor, rules: Rules) -> States:
    """With the poles near zero on a ring instead, where that leaves less error.

    A delay has its poles at zero: what rounding makes of them has powers that differ in nothing but the first samples.
    """
    wild = (states.decay > _TAME).any(dim=1).nonzero()[:, 0]
    if len(wild) == 0:
        return states
    part = states.rows(wild)
    both = [part, from_poles(_ring(part), rules.limit)]
    fits = [Polished(one, *residues(one, samples[wild], rules.rows(wild))) for one in both]
    return states.put(wild, _best(fits).states)


def _ring(states: States) -> torch.Tensor:
    """Poles [C, d] with those that decay faster than _TAME at the roots of z^k = -rho^k, k being their number."""
    poles, near = states.poles(), states.decay > _TAME
    count = near.sum(dim=1, keepdim=True).clamp_min(1)
    place = 2 * (near.cumsum(dim=1) - 1) + 1
    angle = math.pi * place.to(torch.float64) / count
    sine = torch.where(place == count, 0.0, angle.sin())
    size = (-(_RING / count).clamp_max(_TAME)).exp()
    return torch.where(near, torch.complex(size * angle.cos(), size * sine), poles)


def _starts(samples: torch.Tensor, order: int, rules: Rules, seed: int) -> Iterator[States]:
    length = samples.shape[1]
    if rules.horizon is not None:
        yield shift_poles(leading(Hankel(samples, length), order, seed), order, rules.limit)
    yield shift_poles(leading(Hankel(samples, half(length)), order, seed), order, rules.limit)
    matrix, pairs = weighted(samples, order, seed)
    yield shift_poles(pairs, order, rules.limit, matrix.weights)


def interpolated(samples: torch.Tensor, rules: Rules) -> Polished:
    """Recurrences of n states that are `samples` [C, n] exactly: Fourier sums that shrink by e^4 in a period."""
    channels, length = samples.shape
    turn = torch.arange(length, dtype=torch.float64, device=samples.device)
    turn = torch.where(turn > length / 2, turn - length, turn) * (2 * math.pi / length)
    size = torch.full_like(turn, math.exp(-4 / length))
    poles = torch.polar(size, turn)
    real = torch.sin(turn).abs() < 1e-9
    poles = torch.where(real, poles.real + 0j, poles)
    states = from_poles(poles.expand(channels, -1), rules.limit)
    return Polished(states, *residues(states, samples, rules))
