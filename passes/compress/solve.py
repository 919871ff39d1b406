"""Codes, scales and zeros of the matrices that share an input.

`sweep` is the joint pass: GPTQ quantisation (arXiv:2210.17323) and SparseGPT pruning (arXiv:2301.00774) with one
error feedback, as Compress, Then Prompt (arXiv:2305.11186) joins them. `round_nearest` is every baseline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rewright.kernels.joint_sweep import joint_sweep
from rewright.passes.compress import grid, mask
from rewright.passes.compress.mask import Spread
from rewright.passes.compress.plan import Matrix
from rewright.passes.values import UNQUANTISED

if TYPE_CHECKING:
    from rewright.passes.compress.spec import CompressOptions

# Columns after which a sweep brings the rest of the matrix up to date, where it chooses no zeros.
BLOCK = 128
# Columns whose zeros a sweep chooses together, where nothing else is asked for.
MASK_BLOCK = 32
# Columns whose error feedback the kernel does itself; wider blocks go through a matrix product.
KERNEL_COLUMNS = 32


@dataclass(frozen=True, slots=True)
class Solved:
    """A compressed matrix.

    `weight` float32 (rows, columns), decoded. `codes` int8 (rows, columns), `scale` (rows, groups) in its stored
    dtype and `zero` int8 (rows, groups), None where weights are only pruned; `zero` is None for symmetric codes.
    `keep` bool (rows, columns) is False at chosen zeros; None where none were chosen. `loss` (rows) is the sweep's own
    estimate of each row's error, the sum of e^2 / 2; None without a sweep.
    """

    weight: torch.Tensor
    codes: torch.Tensor | None
    scale: torch.Tensor | None
    zero: torch.Tensor | None
    keep: torch.Tensor | None
    loss: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Solved:
        """Some rows, as a matrix of their own."""

        def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Solved(
            self.weight[start:stop],
            cut(self.codes),
            cut(self.scale),
            cut(self.zero),
            cut(self.keep),
            cut(self.loss),
        )


class _Columns:
    """What a solve fills in, column by column; matrices are kept transposed so that a column is contiguous."""

    def __init__(
        self,
        weight: torch.Tensor,
        bits: int,
        group: int,
        options: CompressOptions,
        stored: torch.dtype,
        importance: torch.Tensor | None = None,
    ) -> None:
        self.weight = weight.t().float().clone(memory_format=torch.contiguous_format)
        self.options, self.group, self.stored = options, group, stored
        self.bits, self.importance = bits, importance
        columns, rows = self.weight.shape
        self.quantises = bits < UNQUANTISED
        self.low, self.high = grid.code_range(min(bits, 8))
        self.result = torch.empty_like(self.weight)
        self.codes = torch.empty(columns, rows, dtype=torch.int8, device=weight.device)
        self.scale = torch.empty(-(-columns // group), rows, device=weight.device)
        self.zero = torch.zeros_like(self.scale)

    def choose_grid(self, start: int, weight: torch.Tensor, keep: torch.Tensor | None) -> None:
        """Scale and zero point of the group that begins at column `start`, from its weights as corrected so far."""
        index = start // self.group
        self.scale[index], self.zero[index] = self.grid(start, weight, keep)

    def grid(self, start: int, weight: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point for these columns, the first of which is `start`."""
        return grid.choose(
            weight,
            keep,
            None if self.importance is None else self.importance[start : start + len(weight)],
            bits=self.bits,
            symmetric=self.options.symmetric,
            clip=self.options.clip,
            stored=self.stored,
        )

    def solved(self, keep: torch.Tensor | None, loss: torch.Tensor | None) -> Solved:
        weight = self.result.t().contiguous()
        kept = None if keep is None else keep.t()
        if not self.quantises:
            return Solved(weight, None, None, None, kept, loss)
        zero = None if self.options.symmetric else self.zero.t().to(torch.int8).contiguous()
        scale = self.scale.t().to(self.stored).contiguous()
        return Solved(weight, self.codes.t().contiguous(), scale, zero, kept, loss)


def _blocks(columns: int, group: int, size: int) -> Iterator[tuple[int, int]]:
    """Runs of at most `size` columns, whole groups where a group fits, parts of one group where it does not."""
    step = max(1, size // group) * group
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        for part in range(start, stop, size if group > size else step):
            yield part, min(part + (size if group > size else step), stop)


def _kernel_spans(start: int, stop: int, group: int, most: int) -> Iterator[tuple[int, int]]:
    """A block in runs of at most `most` columns, none across a group's end."""
    while start < stop:
        end = min(stop, start + most, (start // group + 1) * group)
        yield start, end
        start = end


def _rounding(state: _Columns, start: int, stop: int) -> torch.Tensor:
    """The squared error of rounding each weight of some columns as they stand, (columns, rows)."""
    errors = []
    for first, last in _kernel_spans(start, stop, state.group, stop - start):
        weight = state.weight[first:last]
        begun = first % state.group and first == start
        index = first // state.group
        scale, zero = (state.scale[index], state.zero[index]) if begun else state.grid(first, weight, None)
        codes = torch.round(weight / scale).add_(zero).clamp_(state.low, state.high)
        errors.append((codes - zero).mul_(scale).sub_(weight).square_())
    return torch.cat(errors)


class _Sweep(_Columns):
    """A stack on its way through a sweep, block by block."""

    def __init__(
        self,
        weight: torch.Tensor,
        upper: torch.Tensor,
        members: Sequence[Matrix],
        options: CompressOptions,
        stored: torch.dtype,
        importance: torch.Tensor | None,
        kept: torch.Tensor | None,
        prunes: bool,
    ) -> None:
        group = members[0].group or weight.shape[1]
        super().__init__(weight, members[0].bits, group, options, stored, importance)
        self.members, self.upper, self.prunes = members, upper, prunes
        given = None if kept is None else kept.t().contiguous()
        self.chosen = torch.ones_like(self.weight, dtype=torch.bool) if prunes else given
        self.loss = torch.zeros_like(self.weight[0])

    def cost(self, start: int, stop: int) -> torch.Tensor:
        """What zeros of a block cost, (rows, columns), from the weights as the sweep has left them.

        A zero costs (w / U_jj)^2 (SparseGPT, equation 3); quant-aware, what rounding costs anyway is taken off.
        """
        cost = self.weight[start:stop].square()
        if self.options.saliency == "quant-aware" and self.quantises:
            cost -= _rounding(self, start, stop)
        cost /= self.upper.diagonal()[start:stop, None].square()
        return cost.t().contiguous()

    def go(self, start: int, stop: int, keep: torch.Tensor | None) -> None:
        """Solve a block, whose zeros are `keep` (rows, columns) where it chooses them, and correct what follows it."""
        if keep is not None:
            assert self.chosen is not None
            self.chosen[start:stop] = keep.t()
        columns, upper, group, chosen = len(self.weight), self.upper, self.group, self.chosen
        held_back = None if chosen is None else chosen[start:stop]
        errors = torch.empty_like(self.weight[start:stop])
        for first, last in _kernel_spans(start, stop, group, KERNEL_COLUMNS):
            own = None if held_back is None else held_back[first - start : last - start]
            if self.quantises and first % group == 0:
                whole = first + group <= stop
                held = self.weight[first : first + group]
                if not whole:
                    held = held.clone()
                    late = slice(stop, first + group)
                    held[stop - first :].addmm_(upper[start:first, late].t(), errors[: first - start], alpha=-1)
                # zeros of columns that lie behind the block are not chosen yet, unless all were given
                known = chosen is not None and (whole or not self.prunes)
                self.choose_grid(first, held, chosen[first : first + group] if chosen is not None and known else None)
            index = first // group
            done = joint_sweep(
                self.weight[first:last].t(),
                upper[first:last, first:last],
                self.scale[index] if self.quantises else None,
                self.zero[index] if self.quantises else None,
                None if own is None else own.t(),
                low=self.low,
                high=self.high,
            )
            self.codes[first:last] = done.codes.t()
            self.result[first:last] = done.dequantised.t()
            errors[first - start : last - start] = done.error.t()
            self.loss += done.loss
            if last < stop:
                self.weight[last:stop].addmm_(
                    upper[first:last, last:stop].t(), errors[first - start : last - start], alpha=-1
                )
        if stop < columns:
            self.weight[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)


def sweep(
    weight: torch.Tensor,
    upper: torch.Tensor,
    members: Sequence[Matrix],
    options: CompressOptions,
    stored: torch.dtype,
    *,
    importance: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> Solved:
    """One pass over the columns that prunes and quantises, each error fed to the columns still to come.

    `weight` (r, c): the matrices `members`, of equal bits and groups, that share an input, stacked. `upper` (c, c)
    from `hessian.factorise`; `importance` (c) the diagonal of the Hessian. `kept` bool (r, c) says where zeros are;
    without it the sweep chooses them. A group's scale is chosen when the sweep reaches it, from the corrected weights.
    """
    prunes = kept is None and any(matrix.sparsity for matrix in members)
    state = _Sweep(weight, upper, members, options, stored, importance, kept, prunes)
    for start, stop in _sweep_blocks(weight.shape[1], members[0], options, prunes):
        keep = mask.choose(state.cost(start, stop), members, options.pattern, (start, stop)) if prunes else None
        state.go(start, stop, keep)
    return state.solved(state.chosen, state.loss)


def sweep_spread(
    weights: Sequence[torch.Tensor],
    upper: torch.Tensor | None,
    stacks: Sequence[Sequence[Matrix]],
    options: CompressOptions,
    stored: torch.dtype,
    spread: Spread,
    *,
    importance: torch.Tensor | None = None,
) -> list[Solved]:
    """`sweep`, choosing zeros, of several stacks side by side, some of them parts of the matrices of `spread`.

    Every process comes here, be it with no stack and no factor.
    """
    states = [
        _Sweep(weight, upper, members, options, stored, importance, None, prunes=True)
        for weight, members in zip(weights, stacks, strict=True)
        if upper is not None
    ]
    matrix = spread.matrices[0]
    for start, stop in _sweep_blocks(matrix.columns, matrix, options, prunes=True):
        costs = [state.cost(start, stop) for state in states]
        keeps = mask.choose_spread(costs, stacks, options.pattern, (start, stop), spread)
        for state, keep in zip(states, keeps, strict=True):
            state.go(start, stop, keep)
    return [state.solved(state.chosen, state.loss) for state in states]


def _sweep_blocks(columns: int, matrix: Matrix, options: CompressOptions, prunes: bool) -> Iterator[tuple[int, int]]:
    """The blocks of columns that a sweep goes through."""
    group = matrix.group or columns
    size = (options.mask_block or MASK_BLOCK) if prunes else BLOCK
    if options.pattern.of is not None:
        # a block must hold whole patterns; groups that do not are cut at the block's end
        size = max(1, size // options.pattern.of) * options.pattern.of
    return _blocks(columns, group if _nests(group, options) else columns, size)


def _nests(group: int, options: CompressOptions) -> bool:
    """Whether blocks can be made of whole groups: always, but for N:M whose M does not divide the group."""
    return options.pattern.of is None or group % options.pattern.of == 0


def round_nearest(
    weight: torch.Tensor,
    matrix: Matrix,
    importance: torch.Tensor | None,
    options: CompressOptions,
    stored: torch.dtype,
) -> Solved:
    """Baselines without feedback: prune by magnitude, or by Wanda's |w| |x| (arXiv:2306.11695), then round.

    `importance` (c) is the mean square of each input, for Wanda, whose comparison is within a row, and for scales that
    weigh errors by it. The zeros of the source stay under `--mask keep`.
    """
    columns = weight.shape[1]
    group = matrix.group or columns
    state = _Columns(weight, matrix.bits, group, options, stored, importance)
    keep = None
    if options.mask == "keep":
        keep = (state.weight != 0).contiguous()
    elif matrix.sparsity:
        score = weight.float().abs()
        if options.method == "wanda" and importance is not None:
            score = score * importance.sqrt()
            if options.pattern.of is None:
                keep = mask.keep_rows(score, round(columns * matrix.sparsity))
        if keep is None:
            keep = mask.choose(score, [matrix], options.pattern, (0, columns))
        keep = keep.t().contiguous()
    for start in range(0, columns, group):
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
    return state.solved(keep, None)
