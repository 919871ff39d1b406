"""The definition of `predictor_out`."""

from __future__ import annotations

import torch

from rewright.kernels.launch import cdiv
from rewright.kernels.neurons import BLOCK, product, taken


@torch.no_grad()
def active_neurons(
    t: torch.Tensor, b: torch.Tensor, c: torch.Tensor, shift: float | torch.Tensor, b_scale: torch.Tensor | None
) -> torch.Tensor:
    """The numbers of all active neurons, int64 [n], ascending."""
    # A sum of two numbers is above 0 exactly where one is above the other's opposite.
    passes = product(t, b, b_scale, c) > -shift
    active = passes[0] if len(passes) == 1 else passes.any(dim=0)
    return active.nonzero().view(-1)


@torch.no_grad()
def predictor_out(
    t: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    shift: float | torch.Tensor,
    b_scale: torch.Tensor | None,
    out: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`index` and `count`; see the package for the mathematics, shapes and dtypes."""
    neurons = active_neurons(t, b, c, shift, b_scale)
    blocks = cdiv(len(b), BLOCK)
    index, count = out or (
        neurons.new_empty((blocks, BLOCK), dtype=torch.int32),
        neurons.new_empty(blocks, dtype=torch.int32),
    )
    count.copy_(torch.bincount(neurons // BLOCK, minlength=blocks))
    index.fill_(-1).masked_scatter_(taken(count), neurons.to(torch.int32))
    return index, count
