"""The definition of `joint_sweep`, arranged to be fast on a CPU.

Left-looking: column j is corrected once, by one matrix-vector product over the errors so far, instead of
every later column at every step; the errors of earlier sub-blocks arrive by one matrix product. Columns are
contiguous, and a column is about eight small calls that write into buffers which exist already. Rows are
independent, so they go through in pieces small enough to stay in a core's cache.
"""

from __future__ import annotations

import torch

_SUBBLOCK = 32
_ROWS = 2048


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
    rows, width = weight.shape
    upper = factor.to(dtype)
    out = Columns(
        codes=torch.zeros((width, rows), dtype=torch.int8, device=weight.device),
        dequantised=torch.empty((width, rows), dtype=dtype, device=weight.device),
        error=torch.empty((width, rows), dtype=dtype, device=weight.device),
        loss=torch.zeros(rows, dtype=dtype, device=weight.device),
    )
    step = _ROWS if weight.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        grid = None
        if scale is not None:
            grid = Grid(scale[piece].to(dtype), None if zero is None else zero[piece], low, high)
        columns = weight[piece].t().to(dtype)
        kept = None if keep is None else keep[piece].t().to(dtype).contiguous()
        _sweep(columns if columns.stride(1) == 1 else columns.contiguous(), upper, grid, kept, out.rows(piece))
    return (
        out.codes.t(),
        out.dequantised.to(weight.dtype).t(),
        out.error.to(weight.dtype).t(),
        out.loss.to(weight.dtype),
    )


class Grid:
    """A uniform grid per row: values (code - zero) * scale for low <= code <= high; a level is code - zero."""

    def __init__(self, scale: torch.Tensor, zero: torch.Tensor | None, low: int, high: int) -> None:
        self.scale = scale
        # z / inf is 0, so a row without a scale gets its zero point at no cost in the loop.
        self.divisor = scale.masked_fill(scale == 0, torch.inf)
        self.zero = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        # Clamping levels between shifted bounds saves adding the zero point in every column.
        self.low = low - self.zero
        self.high = high - self.zero

    def round(self, z: torch.Tensor, level: torch.Tensor, q: torch.Tensor) -> None:
        """The nearest level to the column z, ties to even, and its value q, both in place."""
        torch.div(z, self.divisor, out=level)
        level.round_()
        torch.clamp(level, self.low, self.high, out=level)
        torch.mul(level, self.scale, out=q)


class Columns:
    """The results as (B, r) tensors, and views of some of their rows."""

    def __init__(self, codes: torch.Tensor, dequantised: torch.Tensor, error: torch.Tensor, loss: torch.Tensor) -> None:
        self.codes = codes
        self.dequantised = dequantised
        self.error = error
        self.loss = loss

    def rows(self, piece: slice) -> Columns:
        """Views of the rows of the matrix in `piece`, which are columns here."""
        return Columns(self.codes[:, piece], self.dequantised[:, piece], self.error[:, piece], self.loss[piece])


def _sweep(
    columns: torch.Tensor, upper: torch.Tensor, grid: Grid | None, kept: torch.Tensor | None, out: Columns
) -> None:
    width, rows = columns.shape
    levels = columns.new_empty(min(_SUBBLOCK, width), rows)
    current, masked = columns.new_empty(2, rows).unbind(0)
    pivots = upper.diagonal().unbind(0)
    for start in range(0, width, _SUBBLOCK):
        stop = min(start + _SUBBLOCK, width)
        block = columns[start:stop]
        if start:
            block = torch.addmm(block, upper[:start, start:stop].t(), out.error[:start], alpha=-1)
        error = out.error[start:stop]
        dequantised = out.dequantised[start:stop]
        scratch = levels[: stop - start]
        steps = zip(
            block.unbind(0),
            error.unbind(0),
            dequantised.unbind(0),
            scratch.unbind(0),
            pivots[start:stop],
            (None,) * (stop - start) if kept is None else kept[start:stop].unbind(0),
            strict=True,
        )
        for j, (w, e, q, level, pivot, mask) in enumerate(steps):
            if j:
                w = torch.addmv(w, error[:j].t(), upper[start : start + j, start + j], alpha=-1, out=current)
            z = w if mask is None else torch.mul(w, mask, out=masked)
            if grid is None:
                q.copy_(z)
            else:
                grid.round(z, level, q)
            torch.sub(w, q, out=e)
            e.div_(pivot)
        # A negative weight rounded or masked to zero is -0.0; adding 0.0 makes it +0.0, as its code will.
        dequantised.add_(0.0)
        if grid is not None:
            out.codes[start:stop] = scratch.add_(grid.zero)
        torch.mul(error, error, out=scratch)
        out.loss.add_(scratch.sum(dim=0), alpha=0.5)
