"""The Hessian of a layer's output error, and the factor that its sweep needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.errors import BoundError

DAMP_STEPS = 8


@dataclass(frozen=True, slots=True)
class Factor:
    """`upper` (c, c) float32 with upper^T upper = (H + damp mean(diag H) I)^-1, and the damping that it took."""

    upper: torch.Tensor
    damp: float


def factorise(hessian: torch.Tensor, damp: float, name: str) -> Factor:
    """Factor the inverse of a damped Hessian (GPTQ, arXiv:2210.17323, section 3.3).

    `hessian` float32 (c, c), symmetric. A column that no input reached has a zero diagonal; damping alone makes it
    independent of the others. Where the Cholesky factor does not exist the damping is raised tenfold, at first to
    0.001. Raises BoundError naming the matrix when no damping helps.
    """
    mean = hessian.diagonal().mean()
    share = damp
    for _ in range(DAMP_STEPS):
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return Factor(upper, share)
        share = max(share * 10, 1e-3)
    raise BoundError(
        f"the Hessian of `{name}` has no factor at any damping up to {share / 10:g}",
        hint="give more calibration text, or leave the matrix out with `--skip`",
    )


def relative_error(weight: torch.Tensor, result: torch.Tensor, hessian: torch.Tensor | None) -> float | None:
    """|W X - Q X|^2 / |W X|^2 from H = X X^T; None where the output is zero, or nothing was seen."""
    if hessian is None:
        return None
    gap = weight - result
    whole = float((weight @ hessian).mul_(weight).sum(dtype=torch.float64))
    lost = float((gap @ hessian).mul_(gap).sum(dtype=torch.float64))
    return lost / whole if whole > 0 else None
