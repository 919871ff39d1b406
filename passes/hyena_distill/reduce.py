"""Fewer real modes: those of StripedHyena 2, whose layout holds no others."""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.exchange import fewer
from rewright.passes.hyena_distill.modal import Modal, from_states
from rewright.passes.hyena_distill.polish import polish
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States


def reduce(filters: torch.Tensor, logs: torch.Tensor, order: int, refine: int, rules: Rules) -> Modal:
    """Recurrences of at most `order` real positive poles for `filters` [C, L], h_0 to h_(L - 1), of norm above 0.

    `logs` [C, K] float64 are the logarithms of the poles that the filters have. While there are too many, the two that
    are missed least are taken away, and the others polished for at most `refine` steps.
    """
    samples = filters[:, 1:]
    scale = samples.norm(dim=1, keepdim=True).clamp_min(1e-300)
    unit, none = samples / scale, torch.zeros(len(logs), dtype=torch.int64, device=logs.device)
    decay = (-logs).clamp_min(1 / rules.limit)
    states = States(decay, torch.zeros_like(decay), none)
    if states.order % 2 and states.order > order:
        # two are taken at a time
        spare = decay.amax(dim=1, keepdim=True) * 2
        states = States(torch.cat([decay, spare], 1), torch.zeros(len(decay), decay.shape[1] + 1).to(decay), none)
    found = polish(states, unit, refine if states.order <= order else 0, rules)
    while found.states.order > order:
        found = polish(fewer(found.states, unit, rules), unit, refine, rules)
    return from_states(found.states, found.coefficients * scale, filters, 0)
