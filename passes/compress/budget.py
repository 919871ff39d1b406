"""Budgets by measurement: how many zeros, or bits, each matrix can bear.

What a matrix costs is measured where it counts, in the KL divergence of the logits when that matrix alone is
compressed; how the cost changes with its sparsity or bits follows the error of its own output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from rewright.passes.compress import deal, hessian, solve, statistics
from rewright.passes.compress.job import Job
from rewright.passes.compress.plan import Matrix, Plan
from rewright.passes.errors import UsageError
from rewright.passes.layer import Layer
from rewright.passes.values import CODE_BITS, UNQUANTISED
from rewright.passes.walk import Walk

Kind = Literal["zeros", "bits"]

# Calibration sequences on which the KL is taken.
SEQUENCES = 8
# Sparsities at which errors are measured, about the one asked for.
AROUND = (-0.2, -0.1, 0.0, 0.1, 0.2)
# The least that a unit costs: what lies below is rounding.
FLOOR = 1e-12


@dataclass(slots=True)
class Share:
    """What is dealt out together: its matrices, its KL in nats a token at `point`, and errors by point, weighted."""

    kind: Kind
    members: list[Matrix] = field(default_factory=list)
    kl: float = 0.0
    errors: dict[float, float] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        return sum(matrix.rows * matrix.columns for matrix in self.members)


def measure(job: Job, tokens: torch.Tensor) -> tuple[Plan, list[dict[str, Any]]]:
    """The plan with what every matrix gets, and the table that says why.

    `tokens` int64 (rows, length): the calibration's. The whole model is in memory meanwhile. Raises UsageError for an
    average that cannot be had, or that is of nothing.
    """
    plan = job.plan
    kinds: list[Kind] = []
    if job.options.deals_zeros:
        kinds.append("zeros")
    if job.options.deals_bits:
        kinds.append("bits")
    shares = {(kind, name): share for kind in kinds for name, share in _shares(job, kind).items()}
    _measure(job, shares, tokens)
    tables: list[dict[str, Any]] = []
    for kind in kinds:
        found = {name: share for (of, name), share in shares.items() if of == kind}
        unit = f"budget of {kind}"
        if unit not in job.context.journal.done:
            job.context.journal.record(unit, _deal(job, kind, found))
        given = job.context.journal.done[unit]
        got = {matrix.name: given[name] for name, share in found.items() for matrix in share.members}
        what = "sparsity" if kind == "zeros" else "bits"
        plan = replace(
            plan, matrices=tuple(replace(m, **{what: got[m.name]}) if m.name in got else m for m in plan.matrices)
        )
        tables += [
            {"name": name, "matrices": len(share.members), "weights": share.weights, "kl": share.kl, what: given[name]}
            for name, share in found.items()
        ]
    return plan, tables


def _shares(job: Job, kind: Kind) -> dict[str, Share]:
    options = job.options
    words = [one.expression for one in (options.sparsity_for if kind == "zeros" else options.bits_for)]
    found: dict[str, Share] = {}
    for matrix in job.plan.matrices:
        if not any(re.search(expression, matrix.module) for expression in words):
            found.setdefault(_unit(job, matrix, kind), Share(kind)).members.append(matrix)
    if not found:
        said = "--sparsity-for" if kind == "zeros" else "--bits-for"
        raise UsageError(
            f"`--budget measured` has nothing to deal out: `{said}` speaks of every matrix",
            hint="leave one of them out",
        )
    return found


def _unit(job: Job, matrix: Matrix, kind: Kind) -> str:
    """What a matrix is dealt with: its like among the experts; for bits, those that servers fuse and all experts."""
    role = matrix.local.rsplit(".", 1)[-1].split("[", 1)[0]
    if matrix.expert:
        return "experts" if kind == "bits" else f"layer {matrix.layer} experts {role}"
    if kind == "bits":
        for parts in job.plan.family.fused_sets:
            if matrix.local in parts:
                return f"layer {matrix.layer} {' '.join(part.rsplit('.', 1)[-1] for part in parts)}"
    return matrix.module


def _points(job: Job, kind: Kind) -> tuple[tuple[float, ...], float]:
    """Where errors are measured, and where the KL is."""
    if kind == "bits":
        asked = job.options.bits.number
        return tuple(map(float, CODE_BITS)), float(max(bits for bits in CODE_BITS[:3] if bits <= max(asked, 2)))
    asked = job.options.sparsity or 0.0
    low, high = min(asked, 0.02), max(asked, 0.95)
    points = sorted({round(min(max(asked + step, low), high), 6) for step in AROUND})
    return tuple(points), min(points, key=lambda point: abs(point - asked))


def _measure(job: Job, shares: dict[tuple[Kind, str], Share], tokens: torch.Tensor) -> None:
    """Fill in KL and errors, layer by layer; what a layer was found to cost is on record in the journal."""
    journal, layers = job.context.journal, job.assembly.layers
    if any(f"budget {index}" not in journal.done for index in range(len(layers))):
        walk = Walk(job.assembly, tokens, scratch=job.context.work, resident=True)
        rows = slice(0, min(SEQUENCES, len(tokens)))
        dense = None
        with job.context.reporter.progress("measure budget", len(layers)) as bar:
            for layer in walk:
                if dense is None:
                    # from the first layer, whichever comes next: from another they would be rounded otherwise
                    dense = walk.onward(layer.index, rows).float().log_softmax(-1)
                if f"budget {layer.index}" not in journal.done:
                    journal.record(f"budget {layer.index}", {"found": _measure_layer(job, shares, layer, rows, dense)})
                bar.advance()
        job.assembly.release("")
    for index in range(len(layers)):
        for row in journal.done[f"budget {index}"]["found"]:
            share = shares[row["kind"], row["unit"]]
            share.kl += row["kl"]
            for point, error in row["errors"]:
                share.errors[point] = share.errors.get(point, 0.0) + error


def _measure_layer(
    job: Job, shares: dict[tuple[Kind, str], Share], layer: Layer, rows: slice, dense: torch.Tensor
) -> list[dict[str, Any]]:
    planned = job.plan.of_layer(layer.index)
    stages = layer.stages()
    groups = [tuple(matrix for matrix in planned if matrix.local in paths) for stage in stages for paths in stage]
    seen = statistics.gather(layer, [group for group in groups if group], dense=False)
    moments = {matrix.name: shared.own for shared in seen for matrix in shared.matrices}
    found = []
    for (kind, name), share in shares.items():
        members = [matrix for matrix in share.members if matrix.layer == layer.index and matrix.name in moments]
        if not members:
            continue
        points, reference = _points(job, kind)
        errors = dict.fromkeys(points, 0.0)
        for matrix in members:
            weight = job.original(matrix)
            for point, result in _tried(job, matrix, weight, moments[matrix.name], kind, points):
                errors[point] += hessian.quadratic(weight - result, moments[matrix.name].hessian)
                if point == reference:
                    layer.replace(matrix.local, matrix.turned(result))
        logits = layer.walk.onward(layer.index, rows).float().log_softmax(-1)
        kl = float((dense.exp() * (dense - logits)).sum(-1).mean(dtype=torch.float64))
        for matrix in members:
            layer.restore(matrix.local)
        found.append({"kind": kind, "unit": name, "kl": max(kl, 0.0), "errors": list(errors.items())})
    return found


def _tried(
    job: Job, matrix: Matrix, weight: torch.Tensor, moments: statistics.Moments, kind: Kind, points: tuple[float, ...]
) -> list[tuple[float, torch.Tensor]]:
    """A matrix at each point, by a plain sweep."""
    own = moments.hessian
    if not bool(own.diagonal().any()):
        return [(point, weight) for point in points]
    factor = hessian.factorise(own, job.options.damp, matrix.name)
    found = []
    for point in points:
        if kind == "zeros":
            tried = replace(matrix, bits=UNQUANTISED, sparsity=point)
        else:
            tried = replace(matrix, bits=int(point), sparsity=0.0)
        solved = solve.sweep(
            weight, factor.upper, [tried], job.options, job.fitter.stored, importance=own.diagonal().contiguous()
        )
        found.append((point, solved.weight))
    return found


def _deal(job: Job, kind: Kind, shares: dict[str, Share]) -> dict[str, Any]:
    """What each unit gets."""
    points, reference = _points(job, kind)
    units = []
    for share in shares.values():
        base = max(share.errors[reference], FLOOR)
        costs = tuple(max(share.kl * share.errors[point] / base, FLOOR * point) for point in points)
        units.append(deal.Unit(share.weights, points, costs))
    average = float(job.options.sparsity or 0.0) if kind == "zeros" else float(job.options.bits.number)
    try:
        given = deal.deal_zeros(units, average) if kind == "zeros" else deal.deal_bits(units, average)
    except ValueError as error:
        raise UsageError(str(error), hint="ask for less, or say less with `--bits-for`") from None
    return dict(zip(shares, given, strict=True))
