"""Recurrences of few states for long filters: the entry to every method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from rewright.passes.errors import InputError
from rewright.passes.hyena_distill.balanced import balanced
from rewright.passes.hyena_distill.bound import half
from rewright.passes.hyena_distill.closed_form import closed_form, interpolated, longest
from rewright.passes.hyena_distill.gradient import STEPS, gradient
from rewright.passes.hyena_distill.modal import Modal, from_states, joined
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States
from rewright.passes.hyena_distill.truncate import full_model, solved, truncate

Method = Literal["closed-form", "gradient", "balanced", "modal"]
Horizon = Literal["window", "infinite"]

# Of a filter's norm: modes that add less are left out.
_NOTHING = 1e-13
# An infinite window ends where the slowest mode is below e to the minus this.
_LAST = 36.0
# Samples that are worked on at a time.
_SAMPLES = 1 << 18


def fit(
    filters: torch.Tensor,
    order: int,
    *,
    method: Method = "closed-form",
    refine: int = 50,
    fir_head: int = 0,
    horizon: Horizon = "window",
    weighting: torch.Tensor | None = None,
    noise: float = 1e-15,
    seed: int = 0,
) -> Modal:
    """Recurrences of at most `order` real states for `filters` [C, L], h_0 to h_(L - 1).

    h_0 and the `fir_head` taps after it are kept as they are, and the rest is fitted in the l2 norm: over the window
    that the filters have, or with `horizon="infinite"` over all time with zeros after it. All |p| <= exp(-1 / (4 L)).
    Filters with no more samples than `order` are met exactly over their window; n samples more take n / 2 states.

    `method`: "closed-form" starts from Hankel matrices and takes at most `refine` steps of each polish; the others are
    baselines. "gradient" descends for 3000 steps from the published start, "balanced" truncates a balanced realisation
    of the filter and zeros after it, "modal" drops modes of a model of full order and
    solves for the residues of the others.
    `weighting` [W] or [C, W] is a causal response with which errors are convolved before their norm is taken, and
    `noise` the relative precision in which the recurrences will run; both are for "closed-form" alone.
    `seed` draws what is drawn. Equal blocks of filters give equal bytes.

    Raises InputError for filters that are not finite, ValueError for arguments that mean nothing.
    """
    if filters.dim() != 2 or filters.shape[1] < 1:
        raise ValueError(f"filters must be [channels, length >= 1], not {tuple(filters.shape)}")
    if order < 1 or fir_head < 0 or refine < 0:
        raise ValueError("order must be positive, refine and fir_head not negative")
    if weighting is not None:
        if weighting.dim() not in (1, 2) or (weighting.dim() == 2 and len(weighting) != len(filters)):
            raise ValueError(f"weighting must be [W] or [{len(filters)}, W], not {tuple(weighting.shape)}")
        weighting = weighting.to(torch.float64)
    filters = filters.to(torch.float64)
    bad = (~filters.isfinite()).any(dim=1).nonzero()
    if len(bad):
        raise InputError(f"filter {int(bad[0])} is not finite")
    limit = longest(filters.shape[1])
    rules = Rules(limit, math.ceil(_LAST * limit) if horizon == "infinite" else None, noise, weighting)
    task = _Task(order, method, refine, fir_head, seed)
    chunk = max(1, _SAMPLES // filters.shape[1])
    parts = []
    for first in range(0, max(len(filters), 1), chunk):
        part = filters[first : first + chunk]
        parts.append(task.one(part, rules.rows(torch.arange(first, first + len(part), device=filters.device))))
    return joined(parts)


@dataclass(frozen=True, slots=True)
class _Task:
    order: int
    method: Method
    refine: int
    fir_head: int
    seed: int

    def one(self, filters: torch.Tensor, rules: Rules) -> Modal:
        """The recurrences of some filters that fit into memory together."""
        samples = filters[:, 1 + self.fir_head :]
        # of norm 1, without squares that overflow
        largest = samples.abs().amax(dim=1) if samples.shape[1] else samples.new_zeros(len(samples))
        live = (largest > 0).nonzero()[:, 0]
        count = torch.zeros_like(largest, dtype=torch.int64)
        nothing = samples.new_zeros(len(samples), 0)
        if len(live) == 0:
            return from_states(States(nothing, nothing, count), nothing, filters, self.fir_head)
        scale = largest[live, None]
        unit = samples[live] / scale
        norm = unit.norm(dim=1, keepdim=True)
        found = _used(self._solve(unit / norm, rules.rows(live)), samples.shape[1])
        nothing = samples.new_zeros(len(samples), found.states.order)
        states = States(nothing, nothing, count).put(live, found.states)
        coefficients = nothing.index_put((live,), found.coefficients * norm * scale)
        made = from_states(states, coefficients, filters, self.fir_head)
        return solved(truncate(made, self.order), filters, rules) if self.method == "modal" else made

    def _solve(self, samples: torch.Tensor, rules: Rules) -> Polished:
        length = samples.shape[1]
        if length <= self.order:
            return interpolated(samples, rules)
        order = min(self.order, half(length))
        match self.method:
            case "closed-form":
                return closed_form(samples, order, self.refine, rules, self.seed)
            case "gradient":
                return gradient(samples, order, limit=rules.limit, seed=self.seed, steps=STEPS)
            case "balanced":
                return balanced(samples, order, limit=rules.limit, seed=self.seed)
            case "modal":
                return full_model(samples, rules, self.seed)


def _used(found: Polished, length: int) -> Polished:
    """Without the modes that add nothing to filters of norm 1."""
    coefficients = found.coefficients
    partner = coefficients.gather(1, found.states.partners())
    added = torch.maximum(coefficients.abs(), partner.abs()) * found.states.norms(length)
    return Polished(found.states, torch.where(added < _NOTHING, 0.0, coefficients), found.errors)


def error(filters: torch.Tensor, modal: Modal) -> torch.Tensor:
    """l2 errors [C] of `modal` over the window of `filters` [C, L], absolute; h_0 and the head are exact."""
    head = 1 + modal.fir.shape[1]
    filters = filters.to(torch.float64)
    gap = (filters - modal.impulse(filters.shape[1]))[:, head:]
    return gap.square().sum(dim=1).sqrt()
