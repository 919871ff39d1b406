"""Recurrences as they are stored: poles rounded first, then residues found again for the poles that there will be."""

from __future__ import annotations

from typing import Literal

import torch

from rewright.passes.hyena_distill.modal import Modal, by_states, from_states, joined
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.rules import Rules

# The relative precision in which recurrences run.
NOISE = {"F32": 2.0**-24, "F64": 1e-15}


def settle(
    modal: Modal, filters: torch.Tensor, dtype: Literal["F32", "F64"], weighting: torch.Tensor | None = None
) -> Modal:
    """The recurrences of `filters` [C, L] with every number representable in `dtype`.

    A rounded pole is as good a pole as its neighbour once the residues know of it. `weighting` as in `fit`.
    """
    if dtype == "F64":
        return modal
    rules, head = Rules(noise=NOISE[dtype], weighting=weighting), modal.fir.shape[1]
    near = Modal(_rounded(modal.poles), modal.residues, modal.h0, modal.fir, modal.states)
    rows, parts = [(modal.states == 0).nonzero()[:, 0]], [modal.rows(modal.states == 0)]
    for chosen, states in by_states(near):
        own = filters[chosen]
        found, _ = residues(states, own[:, 1 + head :], rules.rows(chosen))
        rows.append(chosen)
        parts.append(from_states(states, found, own, head))
    made = joined(parts).rows(torch.cat(rows).argsort())
    return Modal(_rounded(made.poles), _rounded(made.residues), _rounded(made.h0), _rounded(made.fir), made.states)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().double()
