"""Dealing out zeros or bits among matrices so that the sum of what they cost is least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

# Steps between the sparsities that a unit may get.
STEP = 0.01


@dataclass(frozen=True, slots=True)
class Unit:
    """Weights that are dealt with together: their number, and what each measured point costs, in nats a token.

    `points` are sparsities or bits, rising; costs are positive.
    """

    weights: int
    points: tuple[float, ...]
    costs: tuple[float, ...]

    def cost(self, point: float) -> float:
        """Log-linear between measured points and beyond the ends."""
        import math

        pairs = list(pairwise(zip(self.points, self.costs, strict=True)))
        (low, first), (high, second) = next((pair for pair in pairs if point <= pair[1][0]), pairs[-1])
        share = (point - low) / (high - low)
        return math.exp((1 - share) * math.log(first) + share * math.log(second))


def deal_zeros(units: Sequence[Unit], average: float) -> list[float]:
    """The sparsity of each unit, between the first and the last of its points, with this average over all weights.

    A linear programme over points STEP apart; all but one unit gets a point, the one what is left.
    """
    choices = []
    for unit in units:
        low, high = unit.points[0], unit.points[-1]
        count = round((high - low) / STEP)
        choices.append([low + (high - low) * i / count for i in range(count + 1)])
    shares = _solve(units, choices, average, whole=False)
    return [
        sum(s * p for s, p in zip(share, points, strict=True)) for share, points in zip(shares, choices, strict=True)
    ]


def deal_bits(units: Sequence[Unit], average: float) -> list[int]:
    """The bits of each unit, one of its points, with at most this average over all weights."""
    choices = [list(unit.points) for unit in units]
    shares = _solve(units, choices, average, whole=True)
    return [
        int(points[max(range(len(points)), key=share.__getitem__)])
        for share, points in zip(shares, choices, strict=True)
    ]


def _solve(
    units: Sequence[Unit], choices: Sequence[Sequence[float]], average: float, *, whole: bool
) -> list[list[float]]:
    """How much of each choice each unit takes: shares that sum to 1, or with `whole` one choice each."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(points) for points in choices]
    ends = np.cumsum([0, *sizes])
    total = sum(unit.weights for unit in units)
    costs = np.array([unit.cost(point) for unit, points in zip(units, choices, strict=True) for point in points])
    spent = np.array(
        [unit.weights * point / total for unit, points in zip(units, choices, strict=True) for point in points]
    )
    rows = np.repeat(np.arange(len(units)), sizes)
    one_each = csr_array((np.ones(ends[-1]), (rows, np.arange(ends[-1]))), shape=(len(units), int(ends[-1])))
    found = milp(
        costs / costs.max(),
        integrality=np.full(ends[-1], int(whole)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            # zeros are to be had exactly, bits at most
            LinearConstraint(csr_array(spent[None, :]), -np.inf if whole else average, average),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if found.x is None:
        raise ValueError(f"no way to deal out an average of {average:g}")
    return [list(map(float, found.x[start:stop])) for start, stop in pairwise(ends)]
