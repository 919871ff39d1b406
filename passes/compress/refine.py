"""Coordinate descent on codes and scales that a sweep has found: tr (Q - W) H (Q - W)^T can only fall."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from rewright.kernels.descend import descend
from rewright.passes.compress import grid
from rewright.passes.compress.solve import Solved

# Columns that the kernel goes through at a time.
BLOCK = 32


def refine(
    solved: Solved,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    passes: int,
) -> Solved:
    """Improve a compressed matrix group by group, `passes` times over all columns.

    `weight` (r, c) float32 is what the result should do; `hessian` (c, c) float32, damped. For each group of columns
    g, with G = (Q - W) H: first its scale, s - (G_g . z) / (z^T H_gg z) for its codes z, rounded to the stored dtype
    and taken where the objective falls; then its codes one after the other, each the nearest to q_j - G_j / H_jj.
    Without a grid the weights themselves are fitted.
    """
    state = _State(solved, weight, hessian, bits)
    for _ in range(passes):
        for span in state.groups():
            state.improve(*span)
    return state.result()


class _State:
    """Everything transposed, so that a column is contiguous."""

    def __init__(self, solved: Solved, weight: torch.Tensor, hessian: torch.Tensor, bits: int) -> None:
        self.solved, self.hessian = solved, hessian
        self.weight = weight.t()
        self.value = solved.weight.t().contiguous()
        self.gap = self.value - self.weight
        self.keep = None if solved.keep is None else solved.keep.t().contiguous()
        self.low, self.high = grid.code_range(min(bits, 8))
        self.columns = weight.shape[1]
        self.codes = self.scale = self.zero = None
        if solved.codes is not None and solved.scale is not None:
            self.codes = solved.codes.t().contiguous()
            self.scale = solved.scale.float().t().contiguous()
            self.zero = None if solved.zero is None else solved.zero.float().t().contiguous()

    def groups(self) -> Iterator[tuple[int, int]]:
        count = 1 if self.scale is None else len(self.scale)
        size = self.columns // count
        if self.scale is None:
            size = BLOCK
        for start in range(0, self.columns, size):
            yield start, min(start + size, self.columns)

    def improve(self, start: int, stop: int) -> None:
        """The scale, then the codes of one group."""
        span = slice(start, stop)
        gradient = torch.mm(self.hessian[span], self.gap)
        inner = self.hessian[span, span]
        index = start * (0 if self.scale is None else len(self.scale)) // self.columns
        if self.scale is not None:
            self._rescale(index, span, gradient, inner)
        for first in range(start, stop, BLOCK):
            last = min(first + BLOCK, stop)
            part, here = slice(first, last), slice(first - start, last - start)
            done = descend(
                self.value[part].t(),
                gradient[here].t(),
                self.hessian[part, part],
                None if self.scale is None else self.scale[index],
                None if self.zero is None else self.zero[index],
                None if self.keep is None else self.keep[part].t(),
                low=self.low,
                high=self.high,
            )
            found = done.dequantised.t()
            moved = found - self.value[part]
            self.value[part] = found
            if self.codes is not None:
                self.codes[part] = done.codes.t()
            if last < stop:
                gradient[last - start :].addmm_(inner[last - start :, here], moved)
        self.gap[span] = self.value[span] - self.weight[span]

    def _rescale(self, index: int, span: slice, gradient: torch.Tensor, inner: torch.Tensor) -> None:
        assert self.codes is not None
        assert self.scale is not None
        assert self.solved.scale is not None
        levels = self.codes[span].float()
        if self.zero is not None:
            levels = levels - self.zero[index]
        slope = (gradient * levels).sum(dim=0)
        pull = torch.mm(inner, levels)
        curve = (pull * levels).sum(dim=0)
        scale = self.scale[index]
        wanted = (scale - slope / curve).to(self.solved.scale.dtype).float()
        step = wanted - scale
        falls = (2 * step * slope + step * step * curve < 0) & (wanted > 0) & torch.isfinite(wanted)
        step = torch.where(falls, step, 0.0)
        self.scale[index] = torch.where(falls, wanted, scale)
        self.value[span] = levels * self.scale[index]
        gradient.addcmul_(pull, step.expand_as(pull))

    def result(self) -> Solved:
        weight = self.value.t().contiguous()
        if self.codes is None or self.scale is None or self.solved.scale is None:
            return replace(self.solved, weight=weight)
        return replace(
            self.solved,
            weight=weight,
            codes=self.codes.t().contiguous(),
            scale=self.scale.t().to(self.solved.scale.dtype).contiguous(),
        )
