"""The definition of `joint_sweep`, arranged to be fast on a CPU.

Left-looking: column j is corrected once, by one matrix-vector product over the errors so far, instead of every
later column at every step. Columns are contiguous and every step writes into a buffer that exists already, so a
column costs about eight small torch calls. Errors of earlier sub-blocks arrive by one matrix product.
"""

from __future__ import annotations

import torch

_SUBBLOCK = 32


def joint_sweep(
    weight: torch.Tensor,
    factor: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes, dequantised, error, loss); see the package for the mathematics, shapes and dtypes."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.t().to(dtype).contiguous()
    upper = factor.to(dtype)
    width, rows = columns.shape
    kept = None if keep is None else keep.t().to(dtype).contiguous()
    grid = None if scale is None else Grid(scale.to(dtype), zero, low, high)
    levels = columns.new_empty(width, rows)
    error = columns.new_empty(width, rows)
    dequantised = levels if grid is None else columns.new_empty(width, rows)
    current = columns.new_empty(rows)
    masked = columns.new_empty(rows)
    for start in range(0, width, _SUBBLOCK):
        stop = min(start + _SUBBLOCK, width)
        block = columns[start:stop]
        if start:
            block = torch.addmm(block, upper[:start, start:stop].t(), error[:start], alpha=-1)
        past = error[start:stop].t()
        for j in range(start, stop):
            before = j - start
            w = block[before]
            if before:
                w = torch.addmv(w, past[:, :before], upper[start:j, j], alpha=-1, out=current)
            z = w if kept is None else torch.mul(w, kept[j], out=masked)
            q = dequantised[j]
            if grid is None:
                q.copy_(z)
            else:
                grid.round(z, levels[j], q)
            e = torch.sub(w, q, out=error[j])
            e.div_(upper[j, j])
    loss = error.square().sum(dim=0).mul_(0.5)
    if grid is None:
        codes = torch.zeros(width, rows, dtype=torch.int8, device=weight.device)
    else:
        codes = grid.codes(levels)
    # A rounded negative weight is -0.0, and a mask multiplies one up too: adding 0.0 makes both +0.0.
    out = dequantised.add_(0.0).to(weight.dtype)
    return codes.t(), out.t(), error.to(weight.dtype).t(), loss.to(weight.dtype)


class Grid:
    """A uniform grid per row: values (code - zero) * scale for low <= code <= high."""

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int) -> None:
        self.scale = scale
        # z / inf is 0, so a row without a scale gets its zero point at no cost in the loop.
        self.divisor = scale.masked_fill(scale == 0, torch.inf)
        self.zero = None if zero is None else zero.to(scale.dtype)
        # Clamping code - zero between shifted bounds saves adding the zero point in every column.
        self.low: torch.Tensor | int = low if self.zero is None else low - self.zero
        self.high: torch.Tensor | int = high if self.zero is None else high - self.zero

    def round(self, z: torch.Tensor, level: torch.Tensor, q: torch.Tensor) -> None:
        """level = code - zero and q = level * scale for the column z, in place."""
        torch.div(z, self.divisor, out=level)
        level.round_()
        torch.clamp(level, self.low, self.high, out=level)  # type: ignore[call-overload]  # both bounds are of one kind
        torch.mul(level, self.scale, out=q)

    def codes(self, levels: torch.Tensor) -> torch.Tensor:
        """int8 codes from (B, r) levels."""
        shifted = levels if self.zero is None else levels + self.zero
        return shifted.to(torch.int8)
