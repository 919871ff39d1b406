"""The triangular factor of a filter's basis from its normal equations.

The Gram matrix of the basis and its slopes is known in closed form, and only the products with the filter take its
length: no factorisation of more rows than columns is needed. What is below the root of the machine's precision is lost,
so this is for filters that err by much more, on the way to their fit.
"""

from __future__ import annotations

import torch

from rewright.kernels.vandermonde import vandermonde_adjoint
from rewright.kernels.vp_gram import vp_gram
from rewright.passes.hyena_distill.orthogonal import Factor, factor
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States

# Relative errors above which this will do, and the least part of a column that is not in those before it.
ROUGH, _APART = 1e-3, 1e-4
# States times samples from which it is the faster way on a CPU.
WORTH = 1 << 16


def quick(states: States, samples: torch.Tensor, rules: Rules, errors: torch.Tensor) -> Factor:
    """`factor` with slopes for `samples` [C, n] of norm 1, by normal equations where `errors` [C] and they allow it."""
    rough = errors > ROUGH
    small = samples.shape[1] * states.order < WORTH and not samples.is_cuda
    if small or rules.weighting is not None or rules.horizon is not None or not bool(rough.any()):
        return factor(states, samples, rules, slopes=True)
    rows = rough.nonzero()[:, 0]
    found, fine = _cholesky(states.rows(rows), samples[rows], rules)
    rest = torch.cat([(~rough).nonzero()[:, 0], rows[~fine]])
    if len(rest) == 0:
        return found
    exact = factor(states.rows(rest), samples[rest], rules.rows(rest), slopes=True)
    back = torch.cat([rows[fine], rest]).argsort()
    return Factor(
        torch.cat([found.triangle[fine], exact.triangle])[back],
        torch.cat([found.inside[fine], exact.inside])[back],
        torch.cat([found.outside[fine], exact.outside])[back],
    )


def _cholesky(states: States, samples: torch.Tensor, rules: Rules) -> tuple[Factor, torch.Tensor]:
    """The factor by Cholesky's method, and for which filters it is one to half of the digits."""
    gram, products = normal(states, samples)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal[:, : states.order] += (rules.noise * states.norms(samples.shape[1])).square()
    lengths = diagonal.sqrt().clamp_min(1e-150)
    lower, info = torch.linalg.cholesky_ex(gram / lengths[:, :, None] / lengths[:, None])
    fine = (info == 0) & (lower.diagonal(dim1=1, dim2=2).amin(dim=1) > _APART)
    lower = torch.where(fine[:, None, None], lower, torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device))
    inside = torch.linalg.solve_triangular(lower, (products / lengths)[:, :, None], upper=False)[:, :, 0]
    outside = (samples.square().sum(dim=1) - inside.square().sum(dim=1)).clamp_min(0).sqrt()
    return Factor(lower.transpose(1, 2) * lengths[:, None], inside, outside), fine


def normal(states: States, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """X^T X [C, 2 d, 2 d] and X^T g [C, 2 d] for the basis and slopes X of `states` over `samples` [C, n]."""
    logs = torch.stack([-states.decay, states.angle], dim=-1)
    length, order = samples.shape[1], states.order
    kinds = states.kinds()
    column = torch.arange(order, device=samples.device)
    # of the real and imaginary columns of each entry the one that the state is
    source = column + torch.where(kinds == 2, order, 0)
    blocks = []
    for power, whole in enumerate(vp_gram(logs, length)):
        across = whole.gather(1, source[:, :, None].expand(-1, -1, 2 * order))
        blocks.append(across.gather(2, source[:, None].expand(-1, order, -1)) / length**power)
    gram = torch.cat([torch.cat(blocks[:2], dim=2), torch.cat(blocks[1:], dim=2)], dim=1)
    sums, moments = vandermonde_adjoint(logs, samples)
    products = [torch.where(kinds == 2, -part[..., 1], part[..., 0]) for part in (sums, moments / length)]
    return gram, torch.cat(products, dim=1)
