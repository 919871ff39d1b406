"""Codes, scales and zeros of the matrices that share an input.

`sweep` is the joint pass: GPTQ quantisation (arXiv:2210.17323) and SparseGPT pruning (arXiv:2301.00774) with one
error feedback, as Compress, Then Prompt (arXiv:2305.11186) joins them. `round_nearest` is every baseline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewright.kernels.joint_sweep import joint_sweep
from rewright.passes.compress import grid, mask

if TYPE_CHECKING:
    from rewright.passes.compress.spec import CompressOptions

# Columns whose error feedback the kernel does itself; wider blocks go through a matrix product.
KERNEL_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Solved:
    """A compressed matrix.

    `weight` float32 (rows, columns), decoded. `codes` int8 (rows, columns), `scale` (rows, groups) in its stored
    dtype and `zero` int8 (rows, groups), None where weights are only pruned; `zero` is None for symmetric codes.
    `loss` (rows) is the sweep's own estimate of each row's error, the sum of e^2 / 2; None without a sweep.
    """

    weight: torch.Tensor
    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    loss: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Solved:
        """Some rows, as a matrix of their own."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Solved(self.weight[start:stop], cut(self.codes), cut(self.scale), cut(self.zero), cut(self.loss))


def stacked(parts: list[Solved]) -> Solved:
    """Matrices of one input under each other, as `sweep` returns them."""

    def join(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given) if given else None

    weight = torch.cat([part.weight for part in parts])
    return Solved(
        weight,
        join([part.codes for part in parts]),
        join([part.scale for part in parts]),
        join([part.zero for part in parts]),
        join([part.loss for part in parts]),
    )


class _Columns:
    """What a solve fills in, column by column; matrices are kept transposed so that a column is contiguous."""

    def __init__(self, weight: torch.Tensor, group: int, options: CompressOptions, stored: torch.dtype) -> None:
        self.weight = weight.t().contiguous().float()
        self.options, self.group, self.stored = options, group, stored
        columns, rows = self.weight.shape
        self.quantises = options.bits < 16
        self.low, self.high = grid.code_range(min(options.bits, 8))
        self.result = torch.empty_like(self.weight)
        self.codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
        self.scale = torch.empty(-(-columns // group), rows, device=weight.device)
        self.zero = torch.zeros_like(self.scale)

    def choose_grid(self, start: int, weight: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Scale and zero point of the group that begins at column `start`, from its weights as corrected so far."""
        index = start // self.group
        self.scale[index], self.zero[index] = grid.choose(
            weight,
            keep,
            bits=self.options.bits,
            symmetric=self.options.symmetric,
            clip=self.options.clip,
            stored=self.stored,
        )

    def solved(self, loss: torch.Tensor | None) -> Solved:
        weight = self.result.t().contiguous()
        if not self.quantises:
            return Solved(weight, None, None, None, loss)
        zero = None if self.options.symmetric else self.zero.t().to(torch.int8).contiguous()
        return Solved(weight, self.codes.t().contiguous(), self.scale.t().to(self.stored).contiguous(), zero, loss)


def _blocks(columns: int, group: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `size` columns, whole groups where a group fits, parts of one group where it does not."""
    step = max(1, size // group) * group
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        for part in range(start, stop, size if group > size else step):
            yield part, min(part + (size if group > size else step), stop)


def _kernel_spans(start: int, stop: int, group: int) -> Iterator[tuple[int, int]]:
    """A block in runs that the kernel takes, none across a group's end."""
    while start < stop:
        end = min(stop, start + KERNEL_COLUMNS, (start // group + 1) * group)
        yield start, end
        start = end


def _sweep_mask(
    state: _Columns, upper: torch.Tensor, parts: list[int], span: tuple[int, int], options: CompressOptions
) -> torch.Tensor | None:
    """Zeros of one block from the weights as the sweep has left them; counts are exact in every matrix.

    Returns bool (columns, rows), or None without pruning. The score is (w / U_jj)^2 (SparseGPT, equation 3).
    """
    if not options.zeros:
        return None
    start, stop = span
    score = (state.weight[start:stop] / upper.diagonal()[start:stop, None]).square_()
    keep = torch.empty_like(score, dtype=torch.bool)
    first = 0
    for rows in parts:
        own = score[:, first : first + rows].t()
        if options.pattern.of is not None:
            kept = mask.keep_pattern(own, options.pattern)
        else:
            # what is due up to the block's end, less what was due up to its start
            prune = round(rows * stop * options.zeros) - round(rows * start * options.zeros)
            kept = mask.keep_largest(own.contiguous(), prune)
        keep[:, first : first + rows] = kept.t()
        first += rows
    return keep


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    parts: list[int],
    group: int,
    options: CompressOptions,
    stored: torch.dtype,
) -> Solved:
    """One pass over the columns that prunes and quantises, each error fed to the columns still to come.

    `weight` (r, c): the matrices that share an input, stacked; `parts` their row counts. `upper` (c, c) from
    `hessian.factorise`. A group's scale is chosen when the sweep reaches it, from the corrected weights.
    """
    state = _Columns(weight, group, options, stored)
    columns = weight.shape[1]
    size = options.block_size
    if options.pattern.of is not None:
        # a block must hold whole patterns; groups that do not are cut at the block's end
        size = max(1, size // options.pattern.of) * options.pattern.of
    errors = torch.empty_like(state.weight[:size])
    loss = torch.zeros_like(state.weight[0])
    for start, stop in _blocks(columns, group if _nests(group, options) else columns, size):
        keep = _sweep_mask(state, upper, parts, (start, stop), options)
        for first, last in _kernel_spans(start, stop, group):
            kept = None if keep is None else keep[first - start : last - start]
            if state.quantises and first % group == 0:
                whole = first + group <= stop
                held = state.weight[first : first + group]
                if not whole:
                    held = held.clone()
                    late = slice(stop, first + group)
                    held[stop - first :].addmm_(upper[start:first, late].t(), errors[: first - start], alpha=-1)
                state.choose_grid(first, held, keep[first - start :][:group] if keep is not None and whole else None)
            index = first // group
            done = joint_sweep(
                state.weight[first:last].t(),
                upper[first:last, first:last],
                state.scale[index] if state.quantises else None,
                state.zero[index] if state.quantises else None,
                None if kept is None else kept.t(),
                low=state.low,
                high=state.high,
            )
            state.codes[first:last] = done.codes.t()
            state.result[first:last] = done.dequantised.t()
            errors[first - start : last - start] = done.error.t()
            loss += done.loss
            if last < stop:
                state.weight[last:stop].addmm_(
                    upper[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1
                )
        if stop < columns:
            state.weight[stop:].addmm_(upper[start:stop, stop:].t(), errors[: stop - start], alpha=-1)
    return state.solved(loss)


def _nests(group: int, options: CompressOptions) -> bool:
    """Whether blocks can be made of whole groups: always, but for N:M whose M does not divide the group."""
    return options.pattern.of is None or group % options.pattern.of == 0


def round_nearest(
    weight: torch.Tensor,
    scale_input: torch.Tensor | None,
    group: int,
    options: CompressOptions,
    stored: torch.dtype,
) -> Solved:
    """Baselines without feedback: prune by magnitude, or by Wanda's |w| |x| (arXiv:2306.11695), then round.

    `scale_input` (c) is the norm of each input, for Wanda, whose comparison is within a row.
    """
    state = _Columns(weight, group, options, stored)
    keep = None
    if options.zeros:
        score = weight.float().abs()
        if scale_input is not None:
            score = score * scale_input
        if options.pattern.of is not None:
            keep = mask.keep_pattern(score, options.pattern)
        elif scale_input is not None:
            keep = mask.keep_rows(score, round(score.shape[1] * options.zeros))
        else:
            keep = mask.keep_largest(score, round(score.numel() * options.zeros))
        keep = keep.t().contiguous()
    for start in range(0, weight.shape[1], group):
        part = slice(start, start + group)
        kept = None if keep is None else keep[part]
        held = state.weight[part] if kept is None else state.weight[part] * kept
        if not state.quantises:
            state.result[part] = held
            continue
        state.choose_grid(start, state.weight[part], kept)
        scale, zero = state.scale[start // group], state.zero[start // group]
        codes = torch.round(held / scale).add_(zero).clamp_(state.low, state.high)
        state.codes[part] = codes.to(torch.int8)
        state.result[part] = (codes - zero) * scale
    return state.solved(None)
