"""What a layer's matrices meet: the moments that each of them is fitted to.

With x the input of a token in the compressed stream and x' in the dense one, a matrix W is to be replaced by a Q of
least |t - (Q - W) x|^2, where t = W (x' - x) is what the input has drifted by, as the matrix sees it. A matrix that
writes to the residual stream also makes good what the stream itself lacks: t = W (x' - x) + gap.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rewright.kernels.cross_update import cross_update
from rewright.kernels.hessian_update import hessian_update
from rewright.passes.chunks import Span
from rewright.passes.compress.hessian import quadratic
from rewright.passes.compress.plan import Matrix
from rewright.passes.errors import BoundError
from rewright.passes.layer import Batch, Layer
from rewright.passes.sums import OrderedSum
from rewright.passes.world import World


@dataclass(slots=True)
class Moments:
    """Means over some tokens.

    `hessian` float32 (columns, columns) is x x^T. `drift` is (x' - x) x^T, (columns, columns), or where `writes`
    t x^T, (rows, columns); None when matrices are fitted to their own outputs. By matrix name, `outputs` has |W x'|^2
    and `misses` |t|^2, where a drift was taken and errors are.
    """

    tokens: int
    hessian: torch.Tensor
    drift: torch.Tensor | None = None
    writes: bool = False
    outputs: dict[str, float] = field(default_factory=dict)
    misses: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class SharedInput:
    """Matrices fed by one tensor, and what they met.

    `own` is taken on the calibration's rows, `sampled` on some of them and `held_out` on others, for errors; None
    where there is nothing to compare.
    """

    matrices: tuple[Matrix, ...]
    own: Moments
    sampled: Moments | None = None
    held_out: Moments | None = None
    blind: bool = field(init=False)

    def __post_init__(self) -> None:
        # whether there is nothing to fit the matrices to
        self.blind = not bool(self.own.hessian.diagonal().any()) or self.unseen

    @property
    def unseen(self) -> bool:
        """Whether an expert was given fewer tokens than its matrices have columns: too few to fit them to."""
        return self.matrices[0].expert and self.own.tokens < self.matrices[0].columns

    def drop(self) -> None:
        """Let the tensors go: what is left tells how many tokens there were, and what errors are measured against."""
        for moments in (self.own, self.sampled, self.held_out):
            if moments is not None:
                moments.hessian = moments.hessian.new_empty(0, 0)
                moments.drift = None if moments.drift is None else moments.hessian


class _Sums:
    """Moments under way: what this process has met of them, in sums that other processes continue."""

    def __init__(self, matrices: Sequence[Matrix], device: torch.device) -> None:
        columns, rows = matrices[0].columns, sum(matrix.rows for matrix in matrices)
        self.tokens = 0
        self.writes = False
        self.drifts = False
        self.outputs: dict[str, list[float]] = {}
        self.misses: dict[str, list[float]] = {}
        self.hessian = OrderedSum(lambda: torch.zeros(columns, columns, device=device))
        self.drift = OrderedSum(lambda: torch.zeros(rows if self.writes else columns, columns, device=device))

    def told(self) -> dict[str, Any]:
        """All but the tensors."""
        return {
            "tokens": self.tokens,
            "writes": self.writes,
            "drifts": self.drifts,
            "outputs": self.outputs,
            "misses": self.misses,
            "hessian": self.hessian.spans,
            "drift": self.drift.spans,
        }

    def finish(self, world: World, every: Sequence[Mapping[str, Any]]) -> Moments | None:
        """The means over the tokens of all processes, each of which has `told` of its own; None where none were met."""

        def spans(name: str) -> list[list[Span]]:
            return [[(first, size) for first, size in told[name]] for told in every]

        def summed(name: str) -> dict[str, float]:
            names = [key for told in every for key in told[name]]
            return {
                key: sum(value for told in every for value in told[name].get(key, ())) / count
                for key in dict.fromkeys(names)
            }

        if not any(told["hessian"] for told in every):
            return None
        tokens = sum(told["tokens"] for told in every)
        # an expert may have seen none
        count = max(tokens, 1)
        self.writes = any(told["writes"] for told in every)
        found = Moments(tokens, world.add_up(self.hessian, spans("hessian")).div_(count), writes=self.writes)
        if any(told["drifts"] for told in every):
            found.drift = world.add_up(self.drift, spans("drift")).div_(count)
        found.outputs, found.misses = summed("outputs"), summed("misses")
        return found


def error_terms(
    moments: Moments | None, matrix: Matrix, weight: torch.Tensor, result: torch.Tensor
) -> tuple[float, float]:
    """What some rows of a compressed matrix add to `error`: to |t - (Q - W) x|^2 less |t|^2, and to |W x'|^2.

    `weight` and `result` float32 (rows, columns), W and Q. With a drift the last is known without them, and 0 here.
    """
    if moments is None or not moments.tokens:
        return 0.0, 0.0
    moved = result - weight
    if moments.drift is None:
        return quadratic(moved, moments.hessian), quadratic(weight, moments.hessian)
    drift = moments.drift[matrix.span] if moments.writes else weight @ moments.drift
    met = float((drift * moved).sum(dtype=torch.float64))
    return quadratic(moved, moments.hessian) - 2 * met, 0.0


def error(moments: Moments | None, name: str, terms: Sequence[Sequence[float]]) -> float | None:
    """|t - (Q - W) x|^2 / |W x'|^2 from the terms of a matrix's rows: how far Q is from what the dense model has.

    Without a drift both streams are one: |W x - Q x|^2 / |W x|^2. None where there was nothing to compare.
    """
    if moments is None or not moments.tokens:
        return None
    left, whole = (sum(values) for values in zip(*terms, strict=True))
    if moments.drift is not None:
        left, whole = max(left + moments.misses[name], 0.0), moments.outputs[name]
    return left / whole if whole > 0 else None


PARTS = ("own", "sampled", "held_out")


def gather(
    layer: Layer,
    groups: Sequence[tuple[Matrix, ...]],
    *,
    dense: bool,
    writers: Sequence[str] = (),
    weights: Mapping[str, torch.Tensor] | None = None,
    look_ahead: bool = False,
    kept: Collection[int] | None = None,
) -> list[SharedInput]:
    """Run a layer's batches and sum the moments of some groups of matrices, each group fed by one tensor.

    With `dense` the drift is taken, but for experts, who are given other tokens in either stream; `weights` then has
    the dense weights, (rows, columns) by name, of matrices that the compressed stream runs with others already.
    Only the tensors of the groups `kept`, by their places, are held on to, or of all. Raises BoundError naming a matrix
    whose inputs are not finite.
    """
    world, device = layer.walk.world, layer.walk.assembly.device
    found = [{part: _Sums(group, device) for part in PARTS} for group in groups]
    paths = [matrix.local for group in groups for matrix in group]
    dense = dense and not all(group[0].expert for group in groups)
    for batch in layer.meet(paths, dense=dense, writers=writers if dense else (), look_ahead=look_ahead):
        for group, sums in zip(groups, found, strict=True):
            if group[0].local not in batch.seen:
                continue
            drifts = dense and not group[0].expert
            if batch.part == "held_out":
                _add(sums["held_out"], group, batch, drifts, weights or {})
                continue
            _add(sums["own"], group, batch, drifts, weights or {})
            if batch.part == "sampled" and drifts:
                _add(sums["sampled"], group, batch, drifts, weights or {})
    made = []
    every = world.together([{part: sums[part].told() for part in PARTS} for sums in found])
    for index, group in enumerate(groups):
        sums = found[index]
        parts = {part: sums[part].finish(world, [told[index][part] for told in every]) for part in PARTS}
        own = parts["own"] or Moments(0, sums["own"].hessian.total())
        if not bool(torch.isfinite(own.hessian.diagonal()).all()):
            raise BoundError(f"activations into `{group[0].name}` are not finite", hint="try `--dtype f32`")
        sums.clear()
        made.append(SharedInput(group, own, parts["sampled"], parts["held_out"]))
        if kept is not None and index not in kept:
            made[-1].drop()
    return made


def _add(
    sums: _Sums, matrices: Sequence[Matrix], batch: Batch, dense: bool, weights: Mapping[str, torch.Tensor]
) -> None:
    first = batch.seen[matrices[0].local]
    inputs = first["compressed"].inputs
    sums.tokens += len(inputs)
    hessian_update(sums.hessian.term(batch.chunk), inputs, 1.0)
    if not dense:
        return
    miss = None
    for matrix in matrices if batch.seen[matrices[0].local]["dense"].outputs is not None else ():
        output, miss = _compared(matrix, batch, weights)
        for norms, tensor in ((sums.outputs, output), (sums.misses, miss)):
            norms.setdefault(matrix.name, []).append(float(tensor.square().sum(dtype=torch.float64)))
    sums.drifts, sums.writes = True, len(matrices) == 1 and matrices[0].local in batch.gaps
    drifted = first["dense"].inputs - inputs
    if sums.writes:
        assert miss is not None
        drifted = miss
    cross_update(sums.drift.term(batch.chunk), drifted.to(inputs.dtype), inputs, 1.0)


def _compared(matrix: Matrix, batch: Batch, weights: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """W x' without a bias, and t, float32 (tokens, rows)."""
    dense, ours = batch.seen[matrix.local]["dense"], batch.seen[matrix.local]["compressed"]
    assert dense.outputs is not None
    assert ours.outputs is not None
    output = dense.outputs.float()
    if dense.bias is not None:
        output = output - dense.bias.float()
    if matrix.name in weights:
        miss = output - (ours.inputs @ weights[matrix.name].to(ours.inputs.dtype).t()).float()
    else:
        miss = dense.outputs.float() - ours.outputs.float()
    if matrix.local in batch.gaps:
        miss = miss + batch.gaps[matrix.local]
    return output, miss
