"""Poles of a filter as the solvers see them: one real column for each real state.

A conjugate pair p, p̄ is two columns side by side, Re p^t and -Im p^t; a real pole is one, p^t. With the coefficients c
of its columns as (Re R, Im R), a pair gives Re R p^t. All filters of a batch have the same number of columns, whatever
their mixture, and pairs come first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rewright.kernels.vandermonde import vandermonde


@dataclass(frozen=True, slots=True)
class States:
    """`decay` [C, d] is -log|p| > 0 and `angle` [C, d] arg p, equal in both columns of a pair; `pairs` [C] int64."""

    decay: torch.Tensor
    angle: torch.Tensor
    pairs: torch.Tensor

    @property
    def order(self) -> int:
        return self.decay.shape[1]

    def kinds(self) -> torch.Tensor:
        """[C, d]: 0 for a real pole, 1 and 2 for the first and second column of a pair."""
        column = torch.arange(self.order, device=self.decay.device)
        return torch.where(column < 2 * self.pairs[:, None], 1 + column % 2, 0)

    def partners(self) -> torch.Tensor:
        """[C, d]: the other column of a pair, a real pole's own."""
        column = torch.arange(self.order, device=self.decay.device)
        return torch.where(column < 2 * self.pairs[:, None], column ^ 1, column)

    def rows(self, chosen: torch.Tensor) -> States:
        return States(self.decay[chosen], self.angle[chosen], self.pairs[chosen])

    def put(self, chosen: torch.Tensor, others: States) -> States:
        """These with other poles for the chosen channels."""
        return States(
            self.decay.index_put((chosen,), others.decay),
            self.angle.index_put((chosen,), others.angle),
            self.pairs.index_put((chosen,), others.pairs),
        )

    def norms(self, length: int) -> torch.Tensor:
        """[C, d]: the l2 norm of p^t over `length` steps."""
        decay = self.decay.clamp_min(1e-200)
        return (torch.expm1(-2 * length * decay) / torch.expm1(-2 * decay)).sqrt()

    def sum(self, coefficients: torch.Tensor, length: int) -> torch.Tensor:
        """[C, length]: the columns times `coefficients` [C, d]."""
        second = self.kinds() == 2
        residues = torch.stack([torch.where(second, 0.0, coefficients), torch.where(second, coefficients, 0.0)], dim=-1)
        return vandermonde(torch.stack([-self.decay, self.angle], dim=-1), residues, length)

    def poles(self) -> torch.Tensor:
        """Complex [C, d], each pair as a conjugate pair, a real pole without an imaginary part."""
        kinds = self.kinds()
        sine = torch.where(kinds == 0, 0.0, torch.where(kinds == 2, -1.0, 1.0) * self.angle.sin())
        cosine = self.angle.cos()
        cosine = torch.where(kinds == 0, cosine.round(), cosine)
        return torch.polar((-self.decay).exp(), torch.zeros_like(self.decay)) * torch.complex(cosine, sine)


def from_poles(poles: torch.Tensor, longest: float) -> States:
    """States of `poles` complex [C, d], each row closed under conjugation.

    Poles outside the unit circle are reflected into it, and all decay by 1 / `longest` a step at least, `longest` being
    the most steps in which a mode may shrink to 1 / e.
    """
    count = poles.shape[1]
    size = poles.abs()
    angle = poles.angle()
    # an angle that rounding alone has made is a real pole's
    real = poles.imag == 0
    rank = torch.where(real, 1, torch.where(poles.imag > 0, 0, 2))
    order = rank.argsort(dim=1, stable=True)
    pairs = (rank == 0).sum(dim=1)
    column = torch.arange(count, device=poles.device).expand_as(order)
    twice = column < 2 * pairs[:, None]
    entry = torch.where(twice, column // 2, column - pairs[:, None])
    source = order.gather(1, entry)
    decay = size.clamp(math.exp(-700.0), math.exp(700.0)).log().abs()
    return States(decay.gather(1, source).clamp_min(1 / longest), angle.gather(1, source), pairs)
