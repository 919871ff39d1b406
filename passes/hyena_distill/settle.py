"""Recurrences as they are stored: poles rounded first, then residues found again for the poles that there will be."""

from __future__ import annotations

import torch

from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.truncate import solved


def settle(modal: Modal, filters: torch.Tensor, rules: Rules) -> Modal:
    """The recurrences of `filters` [C, L] with every number representable in float32.

    A rounded pole is as good a pole as its neighbour once the residues know of it.
    """
    near = Modal(_rounded(modal.poles), modal.residues, modal.h0, modal.fir, modal.states)
    made = solved(near, filters, rules)
    return Modal(_rounded(made.poles), _rounded(made.residues), _rounded(made.h0), _rounded(made.fir), made.states)


def _rounded(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().double()
