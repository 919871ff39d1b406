"""What a layer's matrices meet: the moments that each of them is fitted to.

With x the input of a token in the compressed stream and x' in the dense one, a matrix W is to be replaced by a Q of
least |t - (Q - W) x|^2, where t = W (x' - x) is what the input has drifted by, as the matrix sees it. A matrix that
writes to the residual stream also makes good what the stream itself lacks: t = W (x' - x) + gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from rewright.kernels.cross_update import cross_update
from rewright.kernels.hessian_update import hessian_update
from rewright.passes.compress.hessian import quadratic, relative_error
from rewright.passes.compress.plan import Matrix
from rewright.passes.errors import BoundError
from rewright.passes.layer import Batch, Layer


@dataclass(slots=True)
class Moments:
    """Sums over some tokens, divided by their number when they are finished.

    `hessian` float32 (columns, columns) is x x^T. `drift` is (x' - x) x^T, (columns, columns), or where `writes`
    t x^T, (rows, columns); None when matrices are fitted to their own outputs. By matrix name, `outputs` has |W x'|^2
    and `misses` |t|^2, where a drift was taken and errors are.
    """

    tokens: int = 0
    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None
    writes: bool = False
    outputs: dict[str, float] = field(default_factory=dict)
    misses: dict[str, float] = field(default_factory=dict)

    def finish(self) -> None:
        """From sums to means."""
        assert self.hessian is not None
        # an expert may have seen none
        count = max(self.tokens, 1)
        self.hessian.div_(count)
        if self.drift is not None:
            self.drift.div_(count)
        for found in (self.outputs, self.misses):
            for name in found:
                found[name] /= count


@dataclass(slots=True)
class SharedInput:
    """Matrices fed by one tensor, and what they met.

    `own` is taken on the calibration's rows, `sampled` on some of them and `held_out` on others, for errors; each None
    where there is nothing to compare.
    """

    matrices: tuple[Matrix, ...]
    own: Moments
    sampled: Moments | None = None
    held_out: Moments | None = None


def error(moments: Moments | None, matrix: Matrix, weight: torch.Tensor, result: torch.Tensor) -> float | None:
    """|t - (Q - W) x|^2 / |W x'|^2: how far a compressed matrix Q is from what the dense model has in its place.

    `weight` and `result` float32 (rows, columns). Without a drift both streams are one: |W x - Q x|^2 / |W x|^2. None
    where there was nothing to compare.
    """
    if moments is None or moments.hessian is None or not moments.tokens:
        return None
    if moments.drift is None:
        return relative_error(weight, result, moments.hessian)
    whole = moments.outputs[matrix.name]
    moved = result - weight
    drift = moments.drift if moments.writes else weight @ moments.drift
    met = float((drift * moved).sum(dtype=torch.float64))
    left = moments.misses[matrix.name] - 2 * met + quadratic(moved, moments.hessian)
    return max(left, 0.0) / whole if whole > 0 else None


def gather(
    layer: Layer,
    groups: Sequence[tuple[Matrix, ...]],
    *,
    dense: bool,
    writers: Sequence[str] = (),
    weights: Mapping[str, torch.Tensor] | None = None,
    look_ahead: bool = False,
) -> list[SharedInput]:
    """Run a layer's batches and sum the moments of some groups of matrices, each group fed by one tensor.

    With `dense` the drift is taken, but for experts, who are given other tokens in either stream; `weights` then has
    the dense weights, (rows, columns) by name, of matrices that the compressed stream runs with others already.
    Raises BoundError naming a matrix whose inputs are not finite.
    """
    found = [SharedInput(group, Moments()) for group in groups]
    paths = [matrix.local for group in groups for matrix in group]
    dense = dense and not all(group[0].expert for group in groups)
    for batch in layer.meet(paths, dense=dense, writers=writers if dense else (), look_ahead=look_ahead):
        for shared in found:
            if shared.matrices[0].local not in batch.seen:
                continue
            drifts = dense and not shared.matrices[0].expert
            if batch.part == "held_out":
                shared.held_out = shared.held_out or Moments()
                _add(shared.held_out, shared.matrices, batch, drifts, weights or {})
                continue
            _add(shared.own, shared.matrices, batch, drifts, weights or {})
            if batch.part == "sampled" and drifts:
                shared.sampled = shared.sampled or Moments()
                _add(shared.sampled, shared.matrices, batch, drifts, weights or {})
    for shared in found:
        if shared.own.hessian is None:
            continue
        if not bool(torch.isfinite(shared.own.hessian.diagonal()).all()):
            raise BoundError(f"activations into `{shared.matrices[0].name}` are not finite", hint="try `--dtype f32`")
        for moments in (shared.own, shared.sampled, shared.held_out):
            if moments is not None:
                moments.finish()
    return found


def _add(
    moments: Moments, matrices: Sequence[Matrix], batch: Batch, dense: bool, weights: Mapping[str, torch.Tensor]
) -> None:
    first = batch.seen[matrices[0].local]
    inputs = first["compressed"].inputs
    size = inputs.shape[1]
    moments.tokens += len(inputs)
    if moments.hessian is None:
        moments.hessian = inputs.new_zeros(size, size, dtype=torch.float32)
    hessian_update(moments.hessian, inputs, 1.0)
    if not dense:
        return
    miss = None
    for matrix in matrices if batch.seen[matrices[0].local]["dense"].outputs is not None else ():
        output, miss = _compared(matrix, batch, weights)
        for sums, tensor in ((moments.outputs, output), (moments.misses, miss)):
            sums[matrix.name] = sums.get(matrix.name, 0.0) + float(tensor.square().sum(dtype=torch.float64))
    moments.writes = len(matrices) == 1 and matrices[0].local in batch.gaps
    drifted = first["dense"].inputs - inputs
    if moments.writes:
        assert miss is not None
        drifted = miss
    if moments.drift is None:
        moments.drift = inputs.new_zeros(drifted.shape[1], size, dtype=torch.float32)
    cross_update(moments.drift, drifted.to(inputs.dtype), inputs, 1.0)


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
