"""Recurrences in StripedHyena's convention and in ours, between which residues are divided by their poles.

Ours is h_0 = h0, h_t = Re sum R p^(t-1) for t >= 1. Theirs is h_t = Re sum R p^t for t >= 0, and D on top at t = 0.
All tensors are float64: poles and residues [filters, entries, 2], real and imaginary parts, h0 and D [filters]. An
unused entry is zero, and stays so.
"""

from __future__ import annotations

import torch


def to_striped(poles: torch.Tensor, residues: torch.Tensor, h0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Their residues R / p, and D = h_0 - Re sum R / p."""
    p, r = torch.complex(*poles.unbind(-1)), torch.complex(*residues.unbind(-1))
    made = torch.view_as_real(torch.where(p == 0, r, r / torch.where(p == 0, torch.ones_like(p), p)))
    return made, h0 - made[..., 0].sum(1)


def from_striped(poles: torch.Tensor, residues: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Our residues R p, and h_0 = D + Re sum R, to which alone an entry adds whose pole is 0."""
    p, r = torch.complex(*poles.unbind(-1)), torch.complex(*residues.unbind(-1))
    return torch.view_as_real(r * p), skip + residues[..., 0].sum(1)
