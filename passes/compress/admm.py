"""Zeros and the weights that go with them, found over a whole matrix by ADMM.

The method is that of Boza, Fast and Effective Weight Update for Pruned Large Language Models (arXiv:2401.02938):
weights are rescaled so that every input has norm 1, and the largest sums of weight and dual stay, ever fewer of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewright.kernels.admm_step import admm_step
from rewright.passes.compress import mask
from rewright.passes.compress.mask import Spread
from rewright.passes.compress.plan import Matrix
from rewright.passes.values import Pattern

# Iterations in which zeros are chosen, anew each time, and those that follow with the choice made.
CHOOSING, SETTLING = 20, 10
# Added to the diagonal before the rescaling, as a share of its mean.
DAMP = 0.01
RHO = 1.0


def prune(
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    stacks: Sequence[Sequence[Matrix]],
    pattern: Pattern,
    block: int | None,
    keeps: Sequence[torch.Tensor] | None = None,
    *,
    spread: Spread,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Zeros, and the weights of least tr (Q - W) H (Q - W)^T that have them.

    `weights` float32 (r, c) each: stacks of the matrices `stacks`, or parts of one, which choose together; `hessian`
    (c, c) float32. Zeros are chosen among `block` columns, all of them where it is None; or `keeps` bool (r, c) say
    where they are. Returns (keep, weights) of each stack, the weights zero where not kept.
    """
    states = _scaled(weights, hessian) if weights else []
    columns = stacks[0][0].columns if stacks else spread.matrices[0].columns
    chosen = list(keeps) if keeps is not None else None
    if chosen is None:
        for step in range(1, CHOOSING + 1):
            share = 1 - (1 - step / CHOOSING) ** 3
            chosen = _largest(states, columns, stacks, pattern, block, share, spread)
            for state, keep in zip(states, chosen, strict=True):
                state.step(keep)
    assert chosen is not None
    for _ in range(SETTLING):
        for state, keep in zip(states, chosen, strict=True):
            state.step(keep)
    return [(keep, state.result(keep)) for state, keep in zip(states, chosen, strict=True)]


@dataclass(slots=True)
class _State:
    """A stack under way, in weights rescaled by `norm`."""

    found: torch.Tensor
    dual: torch.Tensor
    target: torch.Tensor
    inverse: torch.Tensor
    norm: torch.Tensor

    def step(self, keep: torch.Tensor) -> None:
        self.found = torch.mm(admm_step(self.target, self.found, self.dual, keep), self.inverse)

    def result(self, keep: torch.Tensor) -> torch.Tensor:
        return (self.found + self.dual).mul_(keep).div_(self.norm)


def _scaled(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> list[_State]:
    damped = hessian.clone()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal.add_(DAMP * mean if mean > 0 else 1.0)
    norm = diagonal.sqrt()
    damped.div_(norm).div_(norm[:, None]).div_(RHO)
    scaled = [weight * norm for weight in weights]
    targets = [torch.mm(one, damped) for one in scaled]
    damped.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return [
        _State(one, torch.zeros_like(one), target, inverse, norm) for one, target in zip(scaled, targets, strict=True)
    ]


def _largest(
    states: Sequence[_State],
    columns: int,
    stacks: Sequence[Sequence[Matrix]],
    pattern: Pattern,
    block: int | None,
    share: float,
    spread: Spread,
) -> list[torch.Tensor]:
    scores = [(state.found + state.dual).abs_() for state in states]
    step = columns if block is None else block
    if pattern.of is not None:
        step = max(1, step // pattern.of) * pattern.of
    parts = []
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        own = [score[:, start:stop] for score in scores]
        parts.append(mask.choose_spread(own, stacks, pattern, (start, stop), spread, share=share))
    return [one[0] if len(one) == 1 else torch.cat(one, dim=1) for one in zip(*parts, strict=True)]
