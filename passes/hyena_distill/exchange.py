"""Better minima: a pair of poles more where the error asks for one, then two states less where they are missed least.

The error has many local minima over the poles of a filter that no recurrence of the order comes near to. A fit that is
polished with a pair more, and again after its least two states are taken away, is often in a better one.
"""

from __future__ import annotations

import math

import torch

from rewright.passes.hyena_distill.orthogonal import factor
from rewright.passes.hyena_distill.polish import Polished, polish
from rewright.passes.hyena_distill.residues import solve
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States

# A round that lowers the error by less than this part is a filter's last.
_GAIN = 1e-3
# Ratio of the decays at which a new pair is sought, and the largest of them.
_SPACING, _FASTEST = 3.0, 1.5


def exchange(best: Polished, samples: torch.Tensor, rounds: int, steps: int, rules: Rules) -> Polished:
    """At most `rounds` rounds from `best` for `samples` [C, n], n >= order + 2; the error of no filter rises.

    Each polish takes at most `steps` steps.
    """
    active = torch.arange(len(samples), device=samples.device)
    for _ in range(rounds):
        part, own, held = samples[active], best.rows(active), rules.rows(active)
        larger = polish(_more(own, part, rules.limit), part, steps, held)
        smaller = polish(fewer(larger.states, part, held), part, steps, held)
        best = best.put(active, own.better(smaller))
        active = active[smaller.errors < own.errors * (1 - _GAIN)]
        if len(active) == 0:
            break
    return best


def _more(found: Polished, samples: torch.Tensor, limit: float) -> States:
    """The states with a pair before them: of those on a grid, the one that is most like the error."""
    states, length = found.states, samples.shape[1]
    time = torch.arange(length, dtype=torch.float64, device=samples.device)
    rest = samples - states.sum(found.coefficients, length)
    period = 2 << length.bit_length()
    top, new_decay, new_angle = (samples.new_full((len(samples),), -1.0) for _ in range(3))
    decay = 1 / limit
    while decay < _FASTEST:
        power = torch.fft.rfft(rest * (-decay * time).exp(), period).abs().square()
        power = power * (math.expm1(-2 * decay) / math.expm1(-2 * decay * length))
        # a pair on the real axis has one column's worth
        power[:, [0, -1]] *= 0.5
        score, place = power.max(dim=1)
        better = score > top
        top = torch.where(better, score, top)
        new_decay = torch.where(better, decay, new_decay)
        angle = place.to(torch.float64).clamp(0.5, period / 2 - 0.5) * (2 * math.pi / period)
        new_angle = torch.where(better, angle, new_angle)
        decay *= _SPACING
    return States(
        torch.cat([new_decay[:, None].expand(-1, 2), states.decay], dim=1),
        torch.cat([new_angle[:, None].expand(-1, 2), states.angle], dim=1),
        states.pairs + 1,
    )


def fewer(states: States, samples: torch.Tensor, rules: Rules) -> States:
    """Without the pair, or the two real poles, whose loss raises the least squares error least.

    Without columns S it rises by c_S^T ((X^T X)^-1)_SS^-1 c_S (the surgeon's formula). Two real poles are those that
    would be missed least one by one.
    """
    order = states.order
    found = factor(states, samples, rules, slopes=False)
    coefficients, _ = solve(found, order)
    eye = torch.eye(order, dtype=samples.dtype, device=samples.device)
    inverse = torch.linalg.solve_triangular(found.triangle, eye.expand_as(found.triangle), upper=True)
    spread = inverse @ inverse.transpose(1, 2)
    own = spread.diagonal(dim1=1, dim2=2)
    column = torch.arange(order, device=samples.device)
    singles = column >= 2 * states.pairs[:, None]
    alone = torch.where(singles, coefficients.square() / own, float("inf"))
    two = alone.argsort(dim=1, stable=True)[:, :2]
    pairs = order // 2
    first = torch.cat([column[0 : 2 * pairs : 2].expand(len(samples), -1), two[:, :1]], dim=1)
    second = torch.cat([column[1 : 2 * pairs : 2].expand(len(samples), -1), two[:, 1:]], dim=1)
    a, b = own.gather(1, first), own.gather(1, second)
    c = spread.flatten(1).gather(1, first * order + second)
    x, y = coefficients.gather(1, first), coefficients.gather(1, second)
    cost = (b * x * x - 2 * c * x * y + a * y * y) / (a * b - c * c)
    there = torch.cat([column[:pairs] < states.pairs[:, None], order - 2 * states.pairs[:, None] >= 2], dim=1)
    # where rounding leaves no number, the states are as good as dependent
    cost = torch.where(there, torch.where(cost.isfinite(), cost, -1.0), float("inf"))
    pick = cost.argmin(dim=1, keepdim=True)
    gone = (column == first.gather(1, pick)) | (column == second.gather(1, pick))
    kept = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : order - 2]
    taken = (pick[:, 0] < pairs).to(torch.int64)
    return States(states.decay.gather(1, kept), states.angle.gather(1, kept), states.pairs - taken)
