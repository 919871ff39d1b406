"""Recurrences of few states for long filters: the entry to every method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from rewright.passes.errors import InputError
from rewright.passes.hyena_distill.bound import half
from rewright.passes.hyena_distill.closed_form import closed_form, interpolated, longest
from rewright.passes.hyena_distill.modal import Modal, from_states, joined
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.states import States

Method = Literal["closed-form", "gradient", "balanced", "modal"]
Horizon = Literal["window", "infinite"]

# Of a filter's norm: modes that add less are left out.
_NOTHING = 1e-15
# An infinite window ends where the slowest mode is below e to the minus this.
_LAST = 36.0
# Samples that are worked on at a time.
_SAMPLES = 1 << 19


def fit(
    filters: torch.Tensor,
    order: int,
    *,
    method: Method = "closed-form",
    refine: int = 50,
    fir_head: int = 0,
    horizon: Horizon = "window",
    weighting: torch.Tensor | None = None,
    seed: int = 0,
) -> Modal:
    """Recurrences of at most `order` real states for `filters` [C, L], h_0 to h_(L - 1).

    h_0 and the `fir_head` taps after it are kept as they are. The rest is fitted in the l2 norm: over the window that
    the filters have, or with `horizon="infinite"` over all time with zeros after it.

    Raises InputError for filters that are not finite, ValueError for arguments that mean nothing.
    """
    if filters.dim() != 2 or filters.shape[1] < 1:
        raise ValueError(f"filters must be [channels, length >= 1], not {tuple(filters.shape)}")
    if order < 1 or fir_head < 0 or refine < 0:
        raise ValueError("order must be positive, refine and fir_head not negative")
    filters = filters.to(torch.float64)
    bad = (~filters.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise InputError(f"filter {int(bad[0])} is not finite")
    chunk = max(1, _SAMPLES // filters.shape[1])
    task = _Task(order, method, refine, fir_head, horizon == "infinite", seed)
    return joined([task.one(filters[first : first + chunk]) for first in range(0, max(len(filters), 1), chunk)])


@dataclass(frozen=True, slots=True)
class _Task:
    order: int
    method: Method
    refine: int
    fir_head: int
    infinite: bool
    seed: int

    def one(self, filters: torch.Tensor) -> Modal:
        """The recurrences of some filters that fit into memory together."""
        samples = filters[:, 1 + self.fir_head :]
        length = samples.shape[1]
        order = min(self.order, length if length <= self.order else half(length))
        # of norm 1, without squares that overflow
        largest = samples.abs().amax(dim=1) if length else samples.new_zeros(len(samples))
        live = (largest > 0).nonzero()[:, 0]
        nothing = samples.new_zeros(len(samples), order)
        fitted = Polished(
            States(nothing, nothing, nothing.new_zeros(len(samples), dtype=torch.int64)), nothing, largest
        )
        if len(live):
            scale = largest[live, None]
            unit = samples[live] / scale
            norm = unit.norm(dim=1, keepdim=True)
            found = self._solve(unit / norm, order)
            found.coefficients = found.coefficients * norm * scale
            fitted = fitted.put(live, found)
        return from_states(fitted.states, fitted.coefficients, filters, self.fir_head)

    def _solve(self, samples: torch.Tensor, order: int) -> Polished:
        length = samples.shape[1]
        limit = longest(1 + self.fir_head + length)
        horizon = math.ceil(_LAST * limit) if self.infinite else None
        if length <= self.order:
            return interpolated(samples, limit)
        found = closed_form(samples, order, self.refine, limit=limit, horizon=horizon, seed=self.seed)
        return _used(found, length)


def _used(found: Polished, length: int) -> Polished:
    """Without the modes that add nothing to filters of norm 1."""
    decay = found.states.decay
    size = (-torch.expm1(-2 * length * decay) / -torch.expm1(-2 * decay)).sqrt()
    coefficients = found.coefficients
    partner = coefficients.gather(1, found.states.partners())
    added = torch.maximum(coefficients.abs(), partner.abs()) * size
    return Polished(found.states, torch.where(added < _NOTHING, 0.0, coefficients), found.errors)


def error(filters: torch.Tensor, modal: Modal) -> torch.Tensor:
    """l2 errors [C] of `modal` over the window of `filters` [C, L], absolute; h_0 and the head are exact."""
    head = 1 + modal.fir.shape[1]
    filters = filters.to(torch.float64)
    gap = (filters - modal.impulse(filters.shape[1]))[:, head:]
    return gap.square().sum(dim=1).sqrt()
