"""Zeros and the weights that go with them, found over a whole matrix by ADMM.

The method is that of Boza, Fast and Effective Weight Update for Pruned Large Language Models (arXiv:2401.02938):
weights are rescaled so that every input has norm 1, and the largest sums of weight and dual stay, ever fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.kernels.admm_step import admm_step
from rewright.passes.compress import mask
from rewright.passes.compress.plan import Matrix
from rewright.passes.values import Pattern

# Iterations in which zeros are chosen, anew each time, and those that follow with the choice made.
CHOOSING, SETTLING = 20, 10
# Added to the diagonal before the rescaling, as a share of its mean.
DAMP = 0.01
RHO = 1.0


def prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    members: Sequence[Matrix],
    pattern: Pattern,
    block: int | None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeros, and the weights of least tr (Q - W) H (Q - W)^T that have them.

    `weight` (r, c) float32: the matrices `members`, stacked; `hessian` (c, c) float32. Zeros are chosen among
    `block` columns, all of them where it is None; or `keep` bool (r, c) says where they are. Returns (keep, weights),
    the weights zero where not kept.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(DAMP * mean if mean > 0 else 1.0)
    norm = diagonal.sqrt()
    damped.div_(norm).div_(norm[:, None]).div_(RHO)
    scaled = weight * norm
    target = torch.mm(scaled, damped)
    damped.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    found, dual = scaled, torch.zeros_like(scaled)
    if keep is None:
        for step in range(1, CHOOSING + 1):
            keep = _largest(found + dual, members, pattern, block, 1 - (1 - step / CHOOSING) ** 3)
            found = torch.mm(admm_step(target, found, dual, keep), inverse)
    assert keep is not None
    for _ in range(SETTLING):
        found = torch.mm(admm_step(target, found, dual, keep), inverse)
    return keep, (found + dual).mul_(keep).div_(norm)


def _largest(
    found: torch.Tensor, members: Sequence[Matrix], pattern: Pattern, block: int | None, share: float
) -> torch.Tensor:
    score = found.abs_()
    columns = score.shape[1]
    step = columns if block is None else block
    if pattern.of is not None:
        step = max(1, step // pattern.of) * pattern.of
    parts = [
        mask.choose(score[:, start : start + step], members, pattern, (start, min(start + step, columns)), share=share)
        for start in range(0, columns, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
