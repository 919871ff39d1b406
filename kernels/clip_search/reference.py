"""The definition of `clip_search`, arranged to be fast on a CPU.

What is one number a row (scales, zero points, bounds) is made for all shares at once. What is one number a weight goes
through a buffer that stays in a core's cache, in seven calls for as many rows and shares as it holds. A pruned weight
is set to 0 once: its level is 0 in every grid, and so is its error.
"""

from __future__ import annotations

import torch

# Values in the buffer of levels: 512 KiB in float32.
_PIECE = 1 << 17
_ROWS = 4096


def clip_search(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    importance: torch.Tensor | None,
    bits: int,
    symmetric: bool,
    shares: tuple[float, ...],
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, zero); see the package for the mathematics, shapes and dtypes."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, size = weight.shape
    scale = torch.empty(rows, dtype=torch.float32, device=weight.device)
    zero = torch.zeros_like(scale)
    weighting = None if importance is None else importance.to(dtype)
    tried = torch.tensor(shares, dtype=dtype, device=weight.device)
    step = min(_ROWS, max(64, _PIECE // max(size, 1) // 64 * 64)) if weight.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        columns = weight[piece].t().to(dtype)
        if keep is not None:
            columns = torch.mul(columns, keep[piece].t().to(dtype))
        if columns.stride(1) != 1:
            columns = columns.contiguous()
        grids = Grids(columns, tried, bits, symmetric, stored)
        if len(shares) == 1:
            best = torch.zeros((1, columns.shape[1]), dtype=torch.int64, device=weight.device)
        else:
            # Of equal minima `min` gives the first.
            best = _errors(columns, grids, weighting).min(dim=0, keepdim=True).indices
        scale[piece] = grids.scale.gather(0, best)[0]
        if grids.zero is not None:
            zero[piece] = grids.zero.gather(0, best)[0]
    return scale, zero


class Grids:
    """The grids of all shares: scale (shares, r), zero point (shares, r) or None, and the bounds of their levels."""

    def __init__(
        self, columns: torch.Tensor, shares: torch.Tensor, bits: int, symmetric: bool, stored: torch.dtype
    ) -> None:
        steps = (1 << bits) - 1
        first, last = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if len(columns):
            low, high = columns.amin(dim=0).clamp_(max=0), columns.amax(dim=0).clamp_(min=0)
        else:
            low = high = columns.new_zeros(columns.shape[1])
        low, high = low * shares[:, None], high * shares[:, None]
        self.zero: torch.Tensor | None = None
        self.first, self.last = first, last
        self.shifted: tuple[torch.Tensor, torch.Tensor] | None = None
        if symmetric:
            self.scale = guarded(torch.maximum(low.neg_(), high).mul_(2).div_(steps), stored)
        else:
            self.scale = guarded(high.sub_(low).div_(steps), stored)
            self.zero = low.neg_().div_(self.scale).round_().add_(first).clamp_(first, last)
            # Clamping levels between shifted bounds saves adding the zero point to each weight and taking it off.
            self.shifted = (first - self.zero)[:, None], (last - self.zero)[:, None]

    def clamp(self, level: torch.Tensor, part: slice) -> None:
        """Bring levels (shares, g, r) of some shares into the range of codes, in place."""
        if self.shifted is None:
            level.clamp_(self.first, self.last)
        else:
            low, high = self.shifted
            torch.clamp(level, low[part], high[part], out=level)


def guarded(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Scales rounded to their stored dtype and kept positive and finite there; 1 for 0. Works in place."""
    facts = torch.finfo(stored)
    # float16 reaches down to its subnormals; those of bfloat16 are subnormal in float32 too, where they may be lost
    least = facts.smallest_normal * (facts.eps if stored == torch.float16 else 1)
    empty = scale <= 0
    return scale.clamp_(max=facts.max).to(stored).to(scale.dtype).clamp_(min=least).masked_fill_(empty, 1.0)


def _errors(columns: torch.Tensor, grids: Grids, weighting: torch.Tensor | None) -> torch.Tensor:
    """(shares, r): the squared rounding errors of each row, summed over the columns with their weights."""
    size, rows = columns.shape
    count = len(grids.scale)
    found = torch.empty_like(grids.scale)
    together = max(1, min(count, _PIECE // max(columns.numel(), 1)))
    buffer = columns.new_empty(together, size, rows)
    for start in range(0, count, together):
        part = slice(start, min(start + together, count))
        scale = grids.scale[part, None]
        level = buffer[: len(scale)]
        torch.div(columns, scale, out=level).round_()
        grids.clamp(level, part)
        level.mul_(scale).sub_(columns)
        level.mul_(level)
        if weighting is None:
            torch.sum(level, dim=1, out=found[part])
        else:
            torch.matmul(weighting, level, out=found[part])
    return found
