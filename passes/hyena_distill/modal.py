"""Filters in modal form: what a fit returns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rewright.kernels.vandermonde import vandermonde
from rewright.passes.hyena_distill.states import States, from_poles


@dataclass(frozen=True, slots=True)
class Modal:
    """h_0 = h0, h_1 to h_J = fir, and h_t = Re sum_k R_k p_k^(t - 1 - J) after them, |p| < 1.

    `poles` and `residues` [C, K, 2] float64 are real and imaginary parts, `h0` is [C], `fir` [C, J]. An entry without
    an imaginary part of its pole is one real state, any other a conjugate pair and two; an unused one is zero.
    `states` [C] int64 counts them.
    """

    poles: torch.Tensor
    residues: torch.Tensor
    h0: torch.Tensor
    fir: torch.Tensor
    states: torch.Tensor

    @property
    def logs(self) -> torch.Tensor:
        """(log|p|, arg p) [C, K, 2]."""
        return torch.stack([torch.hypot(self.poles[..., 0], self.poles[..., 1]).log(), _angle(self.poles)], dim=-1)

    def impulse(self, length: int) -> torch.Tensor:
        """h_0 to h_(length - 1), [C, length] float64."""
        head = torch.cat([self.h0[:, None], self.fir], dim=1)[:, :length]
        return torch.cat([head, vandermonde(self.logs, self.residues, length - head.shape[1])], dim=1)

    def rows(self, chosen: slice | torch.Tensor) -> Modal:
        """Some of the filters."""
        return Modal(self.poles[chosen], self.residues[chosen], self.h0[chosen], self.fir[chosen], self.states[chosen])


def _angle(poles: torch.Tensor) -> torch.Tensor:
    return torch.atan2(poles[..., 1], poles[..., 0])


def from_states(states: States, coefficients: torch.Tensor, filters: torch.Tensor, fir_head: int) -> Modal:
    """The modal form of `filters` [C, L], `coefficients` [C, d] being those of the states' columns.

    Columns whose coefficients are zero, both of a pair, are unused. K is the most entries that a filter needs.
    """
    channels, order = states.decay.shape
    pairs = states.pairs[:, None]
    entry = torch.arange(order, device=filters.device).expand(channels, order)
    paired = entry < pairs
    column = torch.where(paired, 2 * entry, entry + pairs).clamp_max(max(order - 1, 0))
    present = entry < order - pairs
    real = coefficients.gather(1, column)
    imaginary = torch.where(paired, coefficients.gather(1, (column + 1).clamp_max(max(order - 1, 0))), 0.0)
    used = present & ((real != 0) | (imaginary != 0))
    poles = torch.view_as_real(states.poles().gather(1, column))
    residues = torch.stack([real, imaginary], dim=-1)
    # used entries first
    place = (~used).to(torch.int8).argsort(dim=1, stable=True)[..., None].expand(-1, -1, 2)
    needed = int(used.sum(dim=1).max()) if used.numel() else 0
    poles = torch.where(used[..., None], poles, 0.0).gather(1, place)[:, :needed]
    residues = torch.where(used[..., None], residues, 0.0).gather(1, place)[:, :needed]
    return Modal(
        poles.contiguous(),
        residues.contiguous(),
        filters[:, 0].clone(),
        filters[:, 1 : 1 + fir_head].clone(),
        (used.to(torch.int64) * torch.where(paired, 2, 1)).sum(dim=1),
    )


def joined(parts: list[Modal]) -> Modal:
    """Filters of several, one after the other."""
    entries = max(part.poles.shape[1] for part in parts)

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, 0, 0, entries - tensor.shape[1]))

    return Modal(
        torch.cat([wide(part.poles) for part in parts]),
        torch.cat([wide(part.residues) for part in parts]),
        torch.cat([part.h0 for part in parts]),
        torch.cat([part.fir for part in parts]),
        torch.cat([part.states for part in parts]),
    )


def by_states(modal: Modal) -> Iterator[tuple[torch.Tensor, States]]:
    """Filters of equally many states together: their places, int64, and their poles as columns; none without states."""
    poles = torch.view_as_complex(modal.poles)
    used = (modal.residues != 0).any(dim=2)
    both = torch.cat([poles, poles.conj()], dim=1)
    there = torch.cat([used, used & (poles.imag != 0)], dim=1)
    place = (~there).to(torch.int8).argsort(dim=1, stable=True)
    for count in sorted({*modal.states.tolist()} - {0}):
        chosen = (modal.states == count).nonzero()[:, 0]
        yield chosen, from_poles(both[chosen].gather(1, place[chosen, :count]), math.inf)
