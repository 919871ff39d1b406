"""Poles of least error, by variable projection (Golub and Pereyra 1973, in Kaufman's form).

Residues are eliminated, and Levenberg's and Marquardt's method goes over log(-Re log p) and Im log p. Every quantity of
a step is in the triangular factor of the basis and its slopes: nothing of the window's length is formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rewright.passes.hyena_distill.normal import quick
from rewright.passes.hyena_distill.orthogonal import Factor, factor
from rewright.passes.hyena_distill.residues import residues, solve
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States

# A step changes a decay by this factor at most (in its logarithm), and an angle by that much (radians).
_DECAY_STEP, _ANGLE_STEP = 2.0, 0.3
# Relative falls of the error below which a filter is done after so many in a row.
_FALL, _PATIENCE = 1e-7, 3
_DAMPING_START, _DAMPING_END = 1e-2, 1e8


@dataclass(slots=True)
class Polished:
    """`coefficients` [C, d] of the columns of `states`, `errors` [C] l2."""

    states: States
    coefficients: torch.Tensor
    errors: torch.Tensor

    def better(self, other: Polished) -> Polished:
        """Of each filter the better of two fits of equal order."""
        chosen = (other.errors < self.errors).nonzero()[:, 0]
        return self.put(chosen, other.rows(chosen))

    def rows(self, chosen: torch.Tensor) -> Polished:
        return Polished(self.states.rows(chosen), self.coefficients[chosen], self.errors[chosen])

    def put(self, chosen: torch.Tensor, others: Polished) -> Polished:
        """These with other fits for the chosen channels."""
        return Polished(
            self.states.put(chosen, others.states),
            self.coefficients.index_put((chosen,), others.coefficients),
            self.errors.index_put((chosen,), others.errors),
        )


def polish(states: States, samples: torch.Tensor, steps: int, rules: Rules) -> Polished:
    """At most `steps` steps from `states` for `samples` [C, n]; the error of no filter rises but for rounding."""
    found = factor(states, samples, rules, slopes=True)
    coefficients, errors = solve(found, states.order)
    best = Polished(states, coefficients, errors)
    active = torch.arange(samples.shape[0], device=samples.device)
    work = _Work(samples, rules, states, found, coefficients, errors)
    for _ in range(steps):
        going = work.going()
        if not bool(going.all()):
            best = best.put(active, work.fit())
            active, work = active[going], work.rows(going)
        if active.numel() == 0:
            break
        work.step()
    best = best.put(active, work.fit())
    # what normal equations found is solved for again
    return Polished(best.states, *residues(best.states, samples, rules))


class _Work:
    """The filters that still move."""

    def __init__(
        self,
        samples: torch.Tensor,
        rules: Rules,
        states: States,
        found: Factor,
        coefficients: torch.Tensor,
        errors: torch.Tensor,
        damping: torch.Tensor | None = None,
        idle: torch.Tensor | None = None,
    ) -> None:
        self.samples, self.rules, self.states, self.found = samples, rules, states, found
        self.coefficients, self.errors = coefficients, errors
        self.damping = torch.full_like(errors, _DAMPING_START) if damping is None else damping
        self.idle = torch.zeros_like(errors) if idle is None else idle

    def rows(self, chosen: torch.Tensor) -> _Work:
        found = Factor(self.found.triangle[chosen], self.found.inside[chosen], self.found.outside[chosen])
        return _Work(
            self.samples[chosen],
            self.rules.rows(chosen),
            self.states.rows(chosen),
            found,
            self.coefficients[chosen],
            self.errors[chosen],
            self.damping[chosen],
            self.idle[chosen],
        )

    def fit(self) -> Polished:
        return Polished(self.states, self.coefficients, self.errors)

    def going(self) -> torch.Tensor:
        return (self.idle < _PATIENCE) & (self.damping < _DAMPING_END) & (self.errors > 0)

    def step(self) -> None:
        longest = self.rules.limit
        decay_step, angle_step = self._direction(longest)
        decay = (self.states.decay * decay_step.exp()).clamp_min(1 / longest).clamp_max(700.0)
        angle = (self.states.angle + angle_step).abs()
        angle = torch.where(angle > math.pi, 2 * math.pi - angle, angle)
        trial = States(decay, angle, self.states.pairs)
        found = quick(trial, self.samples, self.rules, self.errors)
        coefficients, errors = solve(found, trial.order)
        better = errors < self.errors
        fall = torch.where(better, 1 - errors / self.errors.clamp_min(1e-300), 0.0)
        self.idle = torch.where(better & (fall >= _FALL), 0.0, torch.where(better, self.idle + 1, self.idle))
        self.damping = torch.where(better, (self.damping / 5).clamp_min(1e-12), self.damping * 4)
        one, two = better[:, None], better[:, None, None]
        self.states = States(
            torch.where(one, decay, self.states.decay), torch.where(one, angle, self.states.angle), trial.pairs
        )
        self.found = Factor(
            torch.where(two, found.triangle, self.found.triangle),
            torch.where(one, found.inside, self.found.inside),
            torch.where(better, found.outside, self.found.outside),
        )
        self.coefficients = torch.where(one, coefficients, self.coefficients)
        self.errors = torch.where(better, errors, self.errors)

    def _direction(self, longest: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Changes of log decay and of the angle, [C, d] each, equal in both columns of a pair."""
        states, order = self.states, self.states.order
        kinds, partners = states.kinds(), states.partners()
        slopes = self.found.triangle[:, order:, order:]
        rest = self.found.inside[:, order:]
        across = partners[:, None].expand(-1, slopes.shape[1], -1)
        other = self.coefficients.gather(1, partners)
        # the first column of a pair stands for its decay, the second for its angle
        own = torch.where(kinds == 2, other, self.coefficients)
        beside = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, other, -self.coefficients))
        jacobian = slopes * own[:, None] + slopes.gather(2, across) * beside[:, None]
        jacobian = jacobian * torch.where(kinds == 2, 1.0, -states.decay)[:, None]
        downhill = (jacobian.transpose(1, 2) @ rest[:, :, None])[:, :, 0]
        stuck = (kinds != 2) & (states.decay <= (1 + 1e-12) / longest) & (downhill < 0)
        lengths = jacobian.norm(dim=1)
        lengths = torch.where(stuck | (lengths == 0), float("inf"), lengths)
        scaled = jacobian / lengths[:, None]
        eye = torch.eye(order, dtype=scaled.dtype, device=scaled.device)
        damped = torch.cat([scaled, self.damping.sqrt()[:, None, None] * eye], dim=1)
        Q, R = torch.linalg.qr(damped)
        aim = Q[:, : rest.shape[1]].transpose(1, 2) @ rest[:, :, None]
        moves = torch.linalg.solve_triangular(R, aim, upper=True)[:, :, 0] / lengths
        # lengths count steps of t / n
        moves = moves / self.samples.shape[1]
        first = torch.where(kinds == 2, moves.gather(1, partners), moves)
        second = torch.where(kinds == 2, moves, torch.where(kinds == 1, moves.gather(1, partners), 0.0))
        return first.clamp(-_DECAY_STEP, _DECAY_STEP), second.clamp(-_ANGLE_STEP, _ANGLE_STEP)
