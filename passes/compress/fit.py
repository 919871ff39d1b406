"""The matrices of one input, from what they met to what is written: target, zeros, codes, refinement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch

from rewright.passes.compress import admm, hessian, solve, target
from rewright.passes.compress.hessian import Factor
from rewright.passes.compress.mask import Spread
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.refine import refine
from rewright.passes.compress.solve import Solved
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.compress.units import Unit, units_of
from rewright.passes.context import Reporter
from rewright.passes.values import UNQUANTISED
from rewright.passes.world import World

# The factor that a sweep needs, and the damped Hessian that refinement does.
_Inverse = tuple[Factor, torch.Tensor | None]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Stacked matrices of one input before they are rounded.

    `wanted` float32 (r, c) is what they should do; `weight` is where rounding begins; `keep` bool (r, c) says where
    their zeros are, None where there are none or the sweep is to choose them.
    """

    wanted: torch.Tensor
    weight: torch.Tensor
    keep: torch.Tensor | None

    def rows(self, start: int, stop: int) -> Pruned:
        """Some rows, as matrices of their own."""
        keep = None if self.keep is None else self.keep[start:stop]
        return Pruned(self.wanted[start:stop], self.weight[start:stop], keep)


@dataclass(frozen=True, slots=True)
class Fitted:
    """One matrix, compressed: what was `wanted` of it, and the damping that its sweep took."""

    matrix: Matrix
    solved: Solved
    wanted: torch.Tensor
    damp: float | None


@dataclass(frozen=True, slots=True)
class Fitter:
    """How matrices are fitted in a run, by the processes of `world`; `stored` is the dtype of scales."""

    options: CompressOptions
    stored: torch.dtype
    reporter: Reporter
    world: World = field(default_factory=World)

    def prune(self, shared: SharedInput, units: Sequence[Unit], weights: Sequence[torch.Tensor]) -> list[Pruned]:
        """Target and zeros of some units of the matrices that share an input; `weights` (rows, columns) by unit."""
        options, moments, name, spread = self.options, shared.own, shared.matrices[0].name, self.spread(shared)
        if not units and not spread.matrices:
            return []
        wanted = list(weights)
        if options.fits_dense:
            wanted = target.fit(weights, moments, [unit.rows for unit in units], name)
        stacks = [unit.members for unit in units]
        keeps = [weight != 0 for weight in weights] if options.mask == "keep" else None
        if keeps is None and not any(matrix.sparsity for matrix in shared.matrices):
            return [Pruned(one, one, None) for one in wanted]
        if options.mask == "sweep":
            if not options.tune:
                return [Pruned(one, one, None) for one in wanted]
            # who tunes has all units, and a sweep chooses its zeros among all rows of a matrix
            swept = self._swept(torch.cat(wanted), moments.hessian, shared.matrices)
            return [swept.rows(unit.first, unit.stop) for unit in units]
        found = admm.prune(wanted, moments.hessian, stacks, options.pattern, options.mask_block, keeps, spread=spread)
        return [Pruned(one, weight, keep) for one, (keep, weight) in zip(wanted, found, strict=True)]

    def spread(self, shared: SharedInput) -> Spread:
        """The matrices whose zeros are chosen in several units together."""
        options = self.options
        if options.pattern.of is not None or options.mask == "keep":
            return Spread((), self.world)
        cut = {member.name for unit in units_of(shared.matrices) for member in unit.members if member.is_cut}
        return Spread(tuple(matrix for matrix in shared.matrices if matrix.name in cut and matrix.sparsity), self.world)

    def _swept(self, wanted: torch.Tensor, own: torch.Tensor, members: Sequence[Matrix]) -> Pruned:
        """Zeros by a sweep that rounds nothing, for weights that are tuned before they are rounded."""
        factor = hessian.factorise(own, self.options.damp, members[0].name)
        whole = [replace(matrix, bits=UNQUANTISED) for matrix in members]
        solved = solve.sweep(wanted, factor.upper, whole, self.options, self.stored)
        return Pruned(wanted, solved.weight, solved.keep)

    def fit(self, shared: SharedInput, units: Sequence[Unit], pruned: Sequence[Pruned]) -> Iterator[list[Fitted]]:
        """Round some units, and in each matrices of equal bits together: for each unit its matrices, in their order.

        Raises BoundError naming a matrix whose Hessian has no factor.
        """
        spread = self.spread(shared)
        if self.options.mask == "sweep" and spread.matrices and all(one.keep is None for one in pruned):
            yield from self._fit_spread(shared, units, pruned, spread)
            return
        factors: dict[int | None, _Inverse] = {}
        for unit, own in zip(units, pruned, strict=True):
            found: list[Fitted] = []
            first = 0
            for _, run in groupby(unit.members, key=lambda matrix: (matrix.bits, matrix.group)):
                members = tuple(run)
                rows = sum(matrix.rows for matrix in members)
                solved, damp = self._solve(shared.own, members, own.rows(first, first + rows), factors)
                found += _apart(members, solved, own.wanted[first : first + rows], damp)
                first += rows
            yield found

    def _fit_spread(
        self, shared: SharedInput, units: Sequence[Unit], pruned: Sequence[Pruned], spread: Spread
    ) -> Iterator[list[Fitted]]:
        """Units that choose their zeros together, while they are swept."""
        own, upper, damp, curvature = shared.own.hessian, None, 0.0, None
        if units:
            factor, curvature = self._inverse(own, own, shared.matrices[0].name)
            upper, damp = factor.upper, factor.damp
        solved = solve.sweep_spread(
            [one.weight for one in pruned],
            upper,
            [unit.members for unit in units],
            self.options,
            self.stored,
            spread,
            importance=own.diagonal().contiguous(),
        )
        for unit, one, result in zip(units, pruned, solved, strict=True):
            matrix = unit.members[0]
            yield _apart(unit.members, self._refined(result, one, curvature, matrix), one.wanted, damp)

    def _inverse(self, ordered: torch.Tensor, own: torch.Tensor, name: str) -> _Inverse:
        """Once for all units of an input: columns in the order of the sweep, and in their own."""
        factor = hessian.factorise(ordered, self.options.damp, name)
        if factor.damp > self.options.damp:
            self.reporter.warn(f"`{name}`: damping raised from {self.options.damp:g} to {factor.damp:g}")
        return factor, hessian.damped(own, factor.damp) if self.options.refine else None

    def _solve(
        self,
        moments: Moments,
        members: tuple[Matrix, ...],
        pruned: Pruned,
        factors: dict[int | None, _Inverse],
    ) -> tuple[Solved, float]:
        options, own, matrix = self.options, moments.hessian, members[0]
        order = self._order(own.diagonal(), matrix)
        ordered = own if order is None else own[order][:, order]
        # the columns' order hangs on the groups
        key = None if order is None else matrix.group or matrix.columns
        if key not in factors:
            factors.clear()
            factors[key] = self._inverse(ordered, own, matrix.name)
        factor, curvature = factors[key]
        weight, keep = pruned.weight, pruned.keep
        if order is not None:
            weight, keep = weight[:, order], None if keep is None else keep[:, order]
        solved = solve.sweep(
            weight,
            factor.upper,
            members,
            options,
            self.stored,
            importance=ordered.diagonal().contiguous(),
            kept=keep,
        )
        if order is not None:
            solved = _restored(solved, order, matrix.group or matrix.columns)
        return self._refined(solved, pruned, curvature, matrix), factor.damp

    def _refined(self, solved: Solved, pruned: Pruned, curvature: torch.Tensor | None, matrix: Matrix) -> Solved:
        if curvature is None:
            return solved
        return refine(solved, pruned.wanted, curvature, bits=matrix.bits, passes=self.options.refine)

    def _order(self, diagonal: torch.Tensor, matrix: Matrix) -> torch.Tensor | None:
        """Columns in the order in which they are rounded, None for their own.

        Groups go by their largest input and so do the columns within one, so that a group stays a run of columns.
        """
        if self.options.order == "natural":
            return None
        group = matrix.group or matrix.columns
        parts = diagonal.view(-1, group)
        inner = parts.argsort(dim=1, descending=True, stable=True)
        outer = parts.amax(dim=1).argsort(descending=True, stable=True)
        return (inner + torch.arange(len(parts), device=inner.device)[:, None] * group)[outer].flatten()


def _apart(members: Sequence[Matrix], solved: Solved, wanted: torch.Tensor, damp: float) -> list[Fitted]:
    """Stacked matrices one by one."""
    found = []
    first = 0
    for matrix in members:
        stop = first + matrix.rows
        found.append(Fitted(matrix, solved.rows(first, stop), wanted[first:stop], damp))
        first = stop
    return found


def _restored(solved: Solved, order: torch.Tensor, group: int) -> Solved:
    """Columns and groups back in their places."""
    back = order.argsort()
    groups = (order[::group] // group).argsort()

    def put(tensor: torch.Tensor | None, places: torch.Tensor) -> torch.Tensor | None:
        return None if tensor is None else tensor[:, places].contiguous()

    return replace(
        solved,
        weight=solved.weight[:, back].contiguous(),
        codes=put(solved.codes, back),
        scale=put(solved.scale, groups),
        zero=put(solved.zero, groups),
        keep=put(solved.keep, back),
    )


def round_off(
    matrix: Matrix, weight: torch.Tensor, moments: Moments | None, options: CompressOptions, stored: torch.dtype
) -> Fitted:
    """A matrix by a baseline, or one that no input reached: zeros by size, codes by rounding."""
    importance = None
    if moments is not None and bool(moments.hessian.diagonal().any()):
        importance = moments.hessian.diagonal().contiguous()
    return Fitted(matrix, solve.round_nearest(weight, matrix, importance, options, stored), weight, None)
