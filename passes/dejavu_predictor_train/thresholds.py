"""Prices into what is attached: each unit's threshold, a ladder of other budgets, and shifts for several rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.passes.dejavu_predictor_train.budget import Market, Settled, Units

# Budgets of the ladder, as factors of the one that was settled.
RUNGS = (0.25, 0.4, 0.55, 0.75, 1.0, 1.4, 2.0, 3.0)
HIGHEST = 0.97
# Scores are in standard deviations: shifts are looked for from 0 down to this, in so many halvings.
DEEPEST, HALVINGS = -4.0, 10


def ladder(market: Market, settled: Settled) -> list[Settled]:
    """The budgets that the attachment has thresholds for, ascending; the settled one is among them."""
    if settled.share >= 1:
        return [settled]
    shares = {min(HIGHEST, rung * settled.share) for rung in RUNGS} - {settled.share}
    return sorted([settled, *map(market.at_share, shares)], key=lambda one: one.share)


def offsets(units: Units, start: torch.Tensor, prices: Sequence[float]) -> torch.Tensor:
    """`start` [units] less each unit's threshold, at each price: float32 [prices, units]; inf where it is always
    read."""
    return torch.stack([start - units.settled(price)[0] for price in prices])


def column_thresholds(sensitivity: torch.Tensor, unit_bytes: int, price: float) -> torch.Tensor:
    """The size at or below which a number is left out, float32 [columns]; -1 where everything is read."""
    if price < 0:
        return torch.full_like(sensitivity, -1.0)
    return (2 * price * unit_bytes / sensitivity.clamp(min=1e-38)).sqrt().clamp(max=torch.finfo(torch.float32).max)


def column_factors(settled: Settled, rungs: Sequence[Settled], layer: int) -> torch.Tensor:
    """What thresholds at a site are multiplied by for each budget, float32 [levels]."""
    base = settled.prices[layer]
    return torch.tensor([(rung.prices[layer] / base) ** 0.5 if base > 0 else 1.0 for rung in rungs])


def bucket_shifts(scores: torch.Tensor, costs: torch.Tensor, buckets: Sequence[int], seed: int) -> list[float]:
    """What to add to the scores of so many rows, so that their union loses a token no more than one row alone does.

    `scores` with thresholds taken off, and `costs` of what is left out, [tokens, neurons].
    """
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))

    def lost(rows: int, shift: float) -> float:
        whole = len(order) // rows * rows
        places = order[:whole].view(-1, rows)
        on = (scores[places] + shift > 0).any(dim=1, keepdim=True)
        return float((costs[places] * ~on).sum(dtype=torch.float64)) / whole

    allowed, shifts = lost(1, 0.0), []
    for rows in buckets:
        if rows == 1 or rows > len(order):
            shifts.append(0.0)
            continue
        low, high = DEEPEST, 0.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if lost(rows, middle) <= allowed else (middle, high)
        shifts.append(high)
    return shifts
