"""How near a recurrence of d states can come to a filter at all.

Let a_i^2 = C(2i, i) / 4^i, the coefficients of (1 - z)^(-1/2): their convolution with themselves is 1. With D = diag(a)
and S the Hankel matrix of g, e = g - ĝ gives |D (S - Ŝ) D|_F^2 = sum_k w_k e_k^2 <= |e|^2, where w_k <= 1 counts what
of a^2 * a^2 is inside the matrix, and D Ŝ D has rank d at most. By Eckart and Young

    |g - ĝ|^2 >= |D S D|_F^2 - sum_(j <= d) sigma_j(D S D)^2 = sum_(j > d) sigma_j(D S D)^2.

Both forms are evaluated, each with its rounding taken off: the first is sharp for filters that no small recurrence
fits, the second, on the singular values at hand, reaches far below the square root of the machine's precision.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.passes.hyena_distill.hankel import Hankel, Leading, leading

# Beyond the largest order asked for: singular values that the second form sums.
SPARE = 8
# Rounding of a singular value, and of the difference of squares, in units of |g| and |g|^2.
_NOISE = 2e-14
_LOST = 1e-12


def weights(size: int, device: torch.device | None = None) -> torch.Tensor:
    """a_0 to a_(size - 1), float64."""
    index = torch.arange(1, size, dtype=torch.float64, device=device)
    ratio = (index - 0.5) / index
    return torch.cat([ratio.new_ones(1), ratio.log().cumsum(0).div(2).exp()])


def half(samples: int) -> int:
    """Rows of the Hankel matrix whose entries are all among so many samples."""
    return (samples + 1) // 2


def weighted(samples: torch.Tensor, count: int, seed: int = 0) -> tuple[Hankel, Leading]:
    """D S D of the half window of `samples` [C, n], and `count` of its leading eigenpairs."""
    size = half(samples.shape[1])
    matrix = Hankel(samples, size, weights(size, samples.device))
    return matrix, leading(matrix, count, seed)


def bound(filters: torch.Tensor, orders: Sequence[int], *, fir_head: int = 0, seed: int = 0) -> torch.Tensor:
    """Least possible l2 error over t >= 1 of a recurrence of so many states, for each filter.

    `filters` [C, L] are h_0 to h_(L - 1); h_0 and the `fir_head` taps after it are exact in any case. Returns
    [C, len(orders)] float64, absolute, zero where rounding leaves nothing to promise. Holds for the finite window, and
    so for the infinite one.
    """
    samples = filters.to(torch.float64)[:, 1 + fir_head :]
    found = samples.new_zeros(samples.shape[0], len(orders))
    if samples.shape[1] == 0 or not orders or samples.shape[0] == 0:
        return found
    count = max(orders) + SPARE
    size = half(samples.shape[1])
    # rows of the basis, of which there are two while it grows, are most of what is held
    chunk = max(1, (1 << 25) // (size * (4 * count + 64)))
    for start in range(0, samples.shape[0], chunk):
        part = samples[start : start + chunk]
        matrix, pairs = weighted(part, count, seed)
        found[start : start + chunk] = from_pairs(part, matrix, pairs, orders)
    return found


def from_pairs(samples: torch.Tensor, matrix: Hankel, pairs: Leading, orders: Sequence[int]) -> torch.Tensor:
    """The bounds [C, len(orders)] where the leading eigenpairs of D S D are known.

    The first form takes each singular value to be as large as its residual allows, and that none larger was missed: a
    Krylov space from a vector drawn at random misses one with probability zero. The second holds whatever was found.
    """
    total, whole = matrix.square(), samples.norm(dim=1)
    values = pairs.values.abs()
    above = (values + pairs.residuals).square()
    below = (values - _NOISE * whole[:, None]).clamp_min(0).square()
    columns = []
    for order in orders:
        if order >= matrix.size:
            columns.append(torch.zeros_like(whole))
            continue
        rest = total - above[:, :order].sum(dim=1) - _LOST * whole.square()
        columns.append(torch.maximum(rest, below[:, order:].sum(dim=1)).clamp_min(0).sqrt())
    return torch.stack(columns, dim=1)


def minimum_order(bounds: torch.Tensor, orders: Sequence[int], allowed: torch.Tensor) -> torch.Tensor:
    """The smallest of `orders` (ascending) whose bound is within `allowed` [C]; -1 where none is.

    `bounds` [C, len(orders)] as `bound` gives them, `allowed` absolute. Returns int64 [C].
    """
    fits = bounds <= allowed[:, None]
    known = torch.tensor(list(orders), dtype=torch.int64, device=bounds.device)
    first = fits.to(torch.int8).argmax(dim=1)
    return torch.where(fits.any(dim=1), known[first], -1)
