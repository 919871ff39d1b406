"""The definition of `descend`, arranged to be fast on a CPU.

Left-looking, as the reference of `joint_sweep` is: a column's gradient is brought up to date once, by one
matrix-vector product over the steps so far; the steps of earlier sub-blocks arrive by one matrix product. Columns are
contiguous, and rows go through in pieces small enough to stay in a core's cache.
"""

from __future__ import annotations

import torch

from rewright.kernels.joint_sweep.reference import Grid

_SUBBLOCK = 32
_ROWS = 2048


def descend(
    value: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None,
    low: int,
    high: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, dequantised); see the package for the mathematics, shapes and dtypes."""
    dtype = torch.promote_types(value.dtype, torch.float32)
    rows, width = value.shape
    curvature = hessian.to(dtype)
    codes = torch.zeros((width, rows), dtype=torch.int8, device=value.device)
    dequantised = torch.empty((width, rows), dtype=dtype, device=value.device)
    step = _ROWS if value.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        piece = slice(start, start + step)
        grid = None
        if scale is not None:
            grid = Grid(scale[piece].to(dtype), None if zero is None else zero[piece], low, high)
        kept = None if keep is None else keep[piece].t().to(dtype).contiguous()
        _pass(
            _columns(value[piece], dtype),
            _columns(gradient[piece], dtype),
            curvature,
            grid,
            kept,
            codes[:, piece],
            dequantised[:, piece],
        )
    return codes.t(), dequantised.to(value.dtype).t()


def _columns(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    columns = matrix.t().to(dtype)
    return columns if columns.stride(1) == 1 else columns.contiguous()


def _pass(
    old: torch.Tensor,
    gradient: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid | None,
    kept: torch.Tensor | None,
    codes: torch.Tensor,
    new: torch.Tensor,
) -> None:
    width, rows = old.shape
    levels = old.new_empty(min(_SUBBLOCK, width), rows)
    steps = torch.empty_like(old)
    slope, target = old.new_empty(2, rows).unbind(0)
    pivots = hessian.diagonal().unbind(0)
    for start in range(0, width, _SUBBLOCK):
        stop = min(start + _SUBBLOCK, width)
        block = gradient[start:stop]
        if start:
            block = torch.addmm(block, hessian[:start, start:stop].t(), steps[:start])
        moved = steps[start:stop]
        scratch = levels[: stop - start]
        columns = zip(
            block.unbind(0),
            old[start:stop].unbind(0),
            new[start:stop].unbind(0),
            moved.unbind(0),
            scratch.unbind(0),
            pivots[start:stop],
            (None,) * (stop - start) if kept is None else kept[start:stop].unbind(0),
            strict=True,
        )
        for j, (g, q, better, moving, level, pivot, mask) in enumerate(columns):
            if j:
                g = torch.addmv(g, moved[:j].t(), hessian[start : start + j, start + j], out=slope)
            torch.addcdiv(q, g, pivot, value=-1, out=target)
            if mask is not None:
                target.mul_(mask)
            if grid is None:
                better.copy_(target)
            else:
                grid.round(target, level, better)
            torch.sub(better, q, out=moving)
        # A negative weight rounded or masked to zero is -0.0; adding 0.0 makes it +0.0, as its code will.
        new[start:stop].add_(0.0)
        if grid is not None:
            codes[start:stop] = scratch.add_(grid.zero)
