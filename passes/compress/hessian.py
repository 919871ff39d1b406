"""The Hessian of a layer's output error, and the factors that solves need."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.errors import BoundError

DAMP_STEPS = 8
# Wide enough for BLAS to run at full speed, narrow enough that little is multiplied twice.
QUADRATIC_BLOCK = 256


@dataclass(frozen=True, slots=True)
class Factor:
    """`upper` (c, c) float32 with upper^T upper = (H + damp mean(diag H) I)^-1, and the damping that it took."""

    upper: torch.Tensor
    damp: float


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """H + share mean(diag H) I, (c, c)."""
    found = hessian.clone()
    found.diagonal().add_(share * hessian.diagonal().mean())
    return found


def damped_cholesky(hessian: torch.Tensor, damp: float, name: str) -> tuple[torch.Tensor, float]:
    """The lower Cholesky factor of a damped Hessian, and the damping that it took.

    Where there is none the damping is raised tenfold, at first to 0.001. Raises BoundError naming the matrix when no
    damping helps.
    """
    share = damp
    for _ in range(DAMP_STEPS):
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, share))
        if not int(failed):
            return lower, share
        share = max(share * 10, 1e-3)
    raise _hopeless(name, share / 10)


def factorise(hessian: torch.Tensor, damp: float, name: str) -> Factor:
    """Factor the inverse of a damped Hessian (GPTQ, arXiv:2210.17323, section 3.3).

    `hessian` float32 (c, c), symmetric. A column that no input reached has a zero diagonal; damping alone makes it
    independent of the others. Where a factor does not exist the damping is raised, as in `damped_cholesky`. Raises
    BoundError naming the matrix when no damping helps.
    """
    share = damp
    for _ in range(DAMP_STEPS):
        lower, share = damped_cholesky(hessian, share, name)
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(torch.isfinite(upper).all()):
            return Factor(upper, share)
        share = max(share * 10, 1e-3)
    raise _hopeless(name, share / 10)


def _hopeless(name: str, share: float) -> BoundError:
    return BoundError(
        f"the Hessian of `{name}` has no factor at any damping up to {share:g}",
        hint="give more calibration text, or leave the matrix out with `--skip`",
    )


def quadratic(gap: torch.Tensor, hessian: torch.Tensor) -> float:
    """tr G H G^T of (r, c) and a symmetric (c, c), of which what is above the diagonal's blocks is not read."""
    columns, total = gap.shape[1], 0.0
    for start in range(0, columns, QUADRATIC_BLOCK):
        stop = min(start + QUADRATIC_BLOCK, columns)
        own = gap[:, start:stop]
        product = own @ hessian[start:stop, start:stop]
        if stop < columns:
            product.addmm_(gap[:, stop:], hessian[stop:, start:stop], alpha=2)
        total += float(product.mul_(own).sum(dtype=torch.float64))
    return total
