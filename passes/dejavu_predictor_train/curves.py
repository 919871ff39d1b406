"""What raising a threshold costs: for every unit that may be left unread, a convex curve over the tokens.

A unit (a neuron, a group of heads) has a score on every token, and a cost of being left out there. Ordered by score,
the costs of the lowest quantiles add up to a curve; its lower convex hull has slopes that rise, so that the best
choice of all units together takes every step whose slope is below one price (a separable problem's Lagrange
multiplier).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.dejavu_predictor_train.spec import QUANTILES

# How far a threshold is from any score that it is settled on, as a share of their size.
APART = 1e-5


@dataclass(frozen=True, slots=True)
class Curves:
    """Of each unit, [units, steps]: `slopes`, cost a token-read that a step saves, rising; `thresholds`, the score at
    or below which the unit is left out when the step is taken. `share` [steps] of the tokens each step is."""

    slopes: torch.Tensor
    thresholds: torch.Tensor
    share: torch.Tensor

    @property
    def units(self) -> int:
        return len(self.slopes)

    def taken(self, price: torch.Tensor) -> torch.Tensor:
        """How many steps each unit takes at its price [units], a cost a token-read."""
        return (self.slopes <= price[:, None]).sum(1)

    def at(self, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Threshold (-inf: never left out), share of tokens that are read, and cost a token of these steps [units]."""
        before = torch.cat([self.share.new_zeros(1), self.share.cumsum(0)])
        costs = torch.cat([self.slopes.new_zeros(self.units, 1), (self.slopes * self.share).cumsum(1)], dim=1)
        thresholds = torch.cat([self.thresholds.new_full((self.units, 1), -torch.inf), self.thresholds], dim=1)
        place = steps[:, None]
        return thresholds.gather(1, place)[:, 0], 1 - before[steps], costs.gather(1, place)[:, 0]

    @property
    def whole(self) -> torch.Tensor:
        """What leaving each unit out always costs a token, [units]."""
        return (self.slopes * self.share).sum(1)


def edges(tokens: int, steps: int = QUANTILES) -> torch.Tensor:
    """How many tokens are below each step's end: all steps alike, as far as whole tokens allow."""
    count = min(steps, tokens)
    return torch.arange(1, count + 1, dtype=torch.int64) * tokens // count


def curves(scores: torch.Tensor, costs: torch.Tensor) -> Curves:
    """From scores and costs [units, tokens]. What is on every token past the last seen is never left out."""
    tokens = scores.shape[1]
    ends = edges(tokens).to(scores.device)
    ordered = scores.sort(dim=1, stable=True)
    total = costs.gather(1, ordered.indices).double().cumsum(1)[:, ends - 1]
    share = torch.diff(ends, prepend=ends.new_zeros(1)).double() / tokens
    rise = torch.diff(total, dim=1, prepend=total.new_zeros(len(total), 1)) / tokens / share
    return Curves(_hull(rise, share).float(), _between(ordered.values, ends), share.float())


def _between(scores: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Thresholds past the last score that is below them, half-way to the next, and by more than sums are rounded."""
    last = scores[:, ends - 1]
    middle = last + (scores[:, ends.clamp(max=scores.shape[1] - 1)] - last) / 2
    return middle + APART * (1 + middle.abs())


def _hull(rise: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """The slopes of the lower convex hull: isotonic regression of the slopes, weighted by the width of the steps."""
    from scipy.optimize import isotonic_regression

    found = rise.cpu().numpy()
    widths = share.cpu().numpy()
    for row in found:
        row[:] = isotonic_regression(row, weights=widths).x
    return torch.from_numpy(found).to(rise.device)
