"""Recurrences as they are stored: poles rounded first, then residues found again for the poles that there will be."""

from __future__ import annotations

from typing import Literal

import torch

from rewright.passes.hyena_distill.modal import Modal, from_states, joined
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import from_poles

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
    rules = Rules(noise=NOISE[dtype], weighting=weighting)
    poles = torch.view_as_complex(modal.poles.float().double())
    used, pair = poles != 0, poles.imag != 0
    both, there = torch.cat([poles, poles.conj()], 1), torch.cat([used, used & pair], 1)
    place = (~there).to(torch.int8).argsort(dim=1, stable=True)
    head = modal.fir.shape[1]
    rows, parts = [], []
    for count in sorted(set(modal.states.tolist())):
        chosen = (modal.states == count).nonzero()[:, 0]
        rows.append(chosen)
        if count == 0:
            parts.append(modal.rows(chosen))
            continue
        states = from_poles(both[chosen].gather(1, place[chosen, :count]), torch.inf)
        own = filters[chosen]
        parts.append(from_states(states, residues(states, own[:, 1 + head :], rules.rows(chosen))[0], own, head))
    back = torch.cat(rows).argsort() if rows else torch.arange(0)
    return _rounded(joined(parts).rows(back)) if parts else modal


def _rounded(modal: Modal) -> Modal:
    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.float().double()

    return Modal(near(modal.poles), near(modal.residues), near(modal.h0), near(modal.fir), modal.states)
