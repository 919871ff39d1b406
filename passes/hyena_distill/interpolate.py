"""Poles by interpolation: steps to a fixed point at which the H2 error is stationary.

F(w) = sum_t g_t w^t. A recurrence of least squared error over infinite time matches F and F' at w = p for each of its
poles p (Meier and Luenberger 1967). Given p, the recurrence that does so for F has the eigenvalues of M^-1 L as its
poles, L_ij = (F(p_i) - F(p_j)) / (p_i - p_j) and M_ij = (p_i F(p_i) - p_j F(p_j)) / (p_i - p_j), with derivatives where
i = j; they are the next p (iterative rational Krylov, Gugercin, Antoulas and Beattie 2008; Beattie and Gugercin 2012).
Only sums of the samples with powers are needed. Nothing makes the error fall, so the best iterate is kept.
"""

from __future__ import annotations

import torch

from rewright.kernels.vandermonde import vandermonde_adjoint
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States, from_poles


def interpolate(states: States, samples: torch.Tensor, steps: int, rules: Rules) -> Polished:
    """The best of `states` and the poles of `steps` steps from there for `samples` [C, n], with their residues."""
    best = Polished(states, *residues(states, samples, rules))
    for _ in range(steps):
        states = from_poles(_next(states, samples), rules.limit)
        best = best.better(Polished(states, *residues(states, samples, rules)))
    return best


def _next(states: States, samples: torch.Tensor) -> torch.Tensor:
    """Poles [C, d] of what matches F and F' at the poles of `states`; those stay where rounding leaves none."""
    points = states.poles()
    logs = torch.stack([-states.decay, points.angle()], dim=-1)
    sums, moments = (torch.view_as_complex(part) for part in vandermonde_adjoint(logs, samples))
    slopes = moments / points
    raised, raised_slopes = points * sums, sums + moments
    gap = points[:, :, None] - points[:, None]
    same = gap.abs() <= 1e-12
    gap = torch.where(same, 1.0, gap)
    L = torch.where(same, slopes[:, :, None], (sums[:, :, None] - sums[:, None]) / gap)
    M = torch.where(same, raised_slopes[:, :, None], (raised[:, :, None] - raised[:, None]) / gap)
    to_real = _real(states)
    turn = to_real.transpose(1, 2)
    left, right = (turn @ M @ to_real).real, (turn @ L @ to_real).real
    found, info = torch.linalg.solve_ex(left, right)
    fine = (info == 0) & found.isfinite().all(dim=2).all(dim=1)
    found = torch.where(fine[:, None, None], found, torch.eye(states.order, dtype=found.dtype, device=found.device))
    return torch.where(fine[:, None], torch.linalg.eigvals(found), points)


def _real(states: States) -> torch.Tensor:
    """Complex [C, d, d] that takes a symmetric matrix over p and p̄ to one over real and imaginary parts."""
    kinds = states.kinds()
    half = torch.full_like(states.decay, 0.5)
    zero = torch.zeros_like(half)
    real = torch.stack([half, zero], dim=-1)
    imaginary = torch.stack([zero, half], dim=-1)
    kinds = kinds[..., None]
    own = torch.where(kinds == 0, 2 * real, torch.where(kinds == 1, real, imaginary))
    beside = torch.where(kinds == 0, 0 * real, torch.where(kinds == 1, real, -imaginary))
    found = torch.diag_embed(torch.view_as_complex(own))
    return found.scatter_add(1, states.partners()[:, None], torch.view_as_complex(beside)[:, None])
