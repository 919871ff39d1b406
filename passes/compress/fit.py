"""The matrices of one input, from what they met to what is written: target, zeros, codes, refinement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from rewright.passes.compress import admm, hessian, solve, target
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.refine import refine
from rewright.passes.compress.solve import Solved
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.context import Reporter
from rewright.passes.values import UNQUANTISED


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
    """How matrices are fitted in a run; `stored` is the dtype of scales."""

    options: CompressOptions
    stored: torch.dtype
    reporter: Reporter

    def prune(self, shared: SharedInput, weights: Sequence[torch.Tensor]) -> Pruned:
        """Target and zeros of matrices (rows, columns) that share an input."""
        weight = torch.cat(list(weights))
        options, moments = self.options, shared.own
        name = shared.matrices[0].name
        wanted = target.fit(weight, moments, name) if options.fits_dense else weight
        kept = weight != 0 if options.mask == "keep" else None
        assert moments.hessian is not None
        if kept is None and not any(matrix.sparsity for matrix in shared.matrices):
            return Pruned(wanted, wanted, None)
        if options.mask == "sweep":
            return (
                self._swept(wanted, moments.hessian, shared.matrices) if options.tune else Pruned(wanted, wanted, None)
            )
        keep, found = admm.prune(wanted, moments.hessian, shared.matrices, options.pattern, options.mask_block, kept)
        return Pruned(wanted, found, keep)

    def _swept(self, wanted: torch.Tensor, own: torch.Tensor, members: Sequence[Matrix]) -> Pruned:
        """Zeros by a sweep that rounds nothing, for weights that are tuned before they are rounded."""
        factor = hessian.factorise(own, self.options.damp, members[0].name)
        whole = [replace(matrix, bits=UNQUANTISED) for matrix in members]
        solved = solve.sweep(wanted, factor.upper, whole, self.options, self.stored)
        return Pruned(wanted, solved.weight, solved.keep)

    def fit(self, shared: SharedInput, pruned: Pruned) -> Iterator[Fitted]:
        """Round matrices that share an input, those of equal bits together; in their order.

        Raises BoundError naming a matrix whose Hessian has no factor.
        """
        first = 0
        for _, run in groupby(shared.matrices, key=lambda matrix: (matrix.bits, matrix.group)):
            members = tuple(run)
            rows = sum(matrix.rows for matrix in members)
            own = pruned.rows(first, first + rows)
            solved, damp = self._solve(shared.own, members, own)
            at = 0
            for matrix in members:
                piece = slice(at, at + matrix.rows)
                yield Fitted(matrix, solved.rows(piece.start, piece.stop), own.wanted[piece], damp)
                at += matrix.rows
            first += rows

    def _solve(self, moments: Moments, members: Sequence[Matrix], pruned: Pruned) -> tuple[Solved, float]:
        options, own = self.options, moments.hessian
        assert own is not None
        matrix = members[0]
        order = self._order(own.diagonal(), matrix)
        ordered = own if order is None else own[order][:, order]
        factor = hessian.factorise(ordered, options.damp, matrix.name)
        if factor.damp > options.damp:
            self.reporter.warn(f"`{matrix.name}`: damping raised from {options.damp:g} to {factor.damp:g}")
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
        if options.refine:
            solved = refine(
                solved,
                pruned.wanted,
                hessian.damped(own, factor.damp),
                bits=matrix.bits,
                passes=options.refine,
            )
        return solved, factor.damp

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
    if moments is not None and moments.hessian is not None and bool(moments.hessian.diagonal().any()):
        importance = moments.hessian.diagonal().contiguous()
    return Fitted(matrix, solve.round_nearest(weight, matrix, importance, options, stored), weight, None)
