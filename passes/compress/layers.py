"""One decoder layer of a `compress` run: its matrices solved in the order in which a forward reaches them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from rewright.passes.compress import hessian, output, statistics, tune
from rewright.passes.compress.fit import Fitted, Pruned, round_off
from rewright.passes.compress.job import Job
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.layer import Layer

Group = tuple[Matrix, ...]


def solve_layer(job: Job, layer: Layer) -> list[dict[str, Any]]:
    """Compress and write every planned matrix of a layer; returns their rows of the report, in the plan's order."""
    visits = _visits(job, layer)
    tuned = _tune(job, layer, visits) if job.options.tune else None
    planned = job.plan.of_layer(layer.index)
    made = []
    with job.context.reporter.progress(f"layer {layer.index}", len(planned)) as bar:
        for row in _visit(job, layer, visits, tuned):
            made.append(row)
            bar.advance(1, _note(row))
    order = {matrix.name: place for place, matrix in enumerate(planned)}
    return sorted(made, key=lambda row: order[row["name"]])


def _note(row: Mapping[str, Any]) -> str:
    """What to show of a matrix that is done: its name within the layer, and its error."""
    name = row["name"].split(f".{row['layer']}.", 1)[-1].removesuffix(".weight")
    error = row["error_calibration"] if row["error_held_out"] is None else row["error_held_out"]
    return name if error is None else f"{name} error {error:.4f}"


def _visits(job: Job, layer: Layer) -> list[list[Group]]:
    """Groups of matrices that share an input, by the walk through the layer in which they are solved."""
    planned = {matrix.local: matrix for matrix in job.plan.of_layer(layer.index)}
    visits: list[list[Group]] = []
    for stage in layer.stages():
        groups = [tuple(planned[path] for path in paths if path in planned) for paths in stage]
        visits.append([group for group in groups if group])
    visits = [visit for visit in visits if visit]
    return [[group for visit in visits for group in visit]] if job.options.sequential == "layer" else visits


def gather(
    job: Job, layer: Layer, groups: list[Group], *, last: bool, weights: Mapping[str, torch.Tensor] | None = None
) -> list[SharedInput]:
    """The moments of some groups; `weights` as in `statistics.gather`."""
    return statistics.gather(
        layer,
        groups,
        dense=job.options.fits_dense,
        writers=job.writers,
        weights=weights,
        look_ahead=last and job.options.fits_dense,
    )


def _tune(job: Job, layer: Layer, visits: list[list[Group]]) -> dict[str, Pruned]:
    """Prune the matrices of a layer, then tune what is left of them together; by name."""
    steps, work, reporter = job.options.tune, job.context.work, job.context.reporter
    training = tune.resume(layer, work, steps)
    if training is None:
        pruned: dict[Matrix, Pruned] = {}
        for groups in visits:
            weights = {matrix.name: job.original(matrix) for group in groups for matrix in group}
            for shared in gather(job, layer, groups, last=False):
                pruned.update(_pruned(job, layer, shared, weights))
        training = tune.begin(layer, work, steps, pruned)
    matrices = {matrix.local: matrix for matrix in job.plan.of_layer(layer.index)}
    with reporter.progress(f"tune layer {layer.index}", steps) as bar:
        bar.advance(len(training.losses))
        seed, note = job.context.seed, lambda loss: bar.advance(1, f"loss {loss:.4f}")
        tuned = tune.tune(layer, matrices, training, seed, note)
    # what the layer's matrices meet from here on does not hang on whether the tuning was interrupted
    for path, matrix in matrices.items():
        if matrix.name in tuned:
            layer.replace(path, matrix.turned(tuned[matrix.name].weight))
    return tuned


def _pruned(
    job: Job, layer: Layer, shared: SharedInput, weights: Mapping[str, torch.Tensor]
) -> Iterator[tuple[Matrix, Pruned]]:
    """Matrices of one input with their zeros, put in the compressed stream."""
    if _blind(shared):
        return
    pruned = job.fitter.prune(shared, [weights[matrix.name] for matrix in shared.matrices])
    first = 0
    for matrix in shared.matrices:
        part = pruned.rows(first, first + matrix.rows)
        first += matrix.rows
        layer.replace(matrix.local, matrix.turned(part.weight))
        yield matrix, part


def _visit(
    job: Job, layer: Layer, visits: list[list[Group]], tuned: dict[str, Pruned] | None
) -> Iterator[dict[str, Any]]:
    for index, groups in enumerate(visits):
        weights = {matrix.name: job.original(matrix) for group in groups for matrix in group}
        last = index == len(visits) - 1
        for shared in gather(job, layer, groups, last=last, weights=weights if tuned else None):
            yield from _solve_group(job, layer, shared, weights, tuned)


def _solve_group(
    job: Job,
    layer: Layer,
    shared: SharedInput,
    weights: Mapping[str, torch.Tensor],
    tuned: dict[str, Pruned] | None,
) -> Iterator[dict[str, Any]]:
    started = time.monotonic()
    found = list(_fitted(job, shared, weights, tuned))
    spent = (time.monotonic() - started) / len(found)
    for fitted in found:
        matrix, weight = fitted.matrix, weights[fitted.matrix.name]
        row = output.write(job.draft, fitted, job.options)
        result = job.decoded(matrix)
        row["tokens"] = shared.own.tokens
        if matrix.expert and job.options.needs_text:
            row["rounded"] = _unseen(shared)
        row["proxy_loss"] = _proxy(fitted, shared.own)
        row["error_calibration"] = statistics.error(shared.sampled or shared.own, matrix, weight, result)
        row["error_held_out"] = statistics.error(shared.held_out, matrix, weight, result)
        row["seconds"] = round(spent, 4)
        if row["zeros"] == weight.numel() and bool(weight.any()):
            job.context.reporter.warn(f"`{matrix.name}` became all zeros: its values are below what a scale can say")
        layer.replace(matrix.local, job.running(matrix))
        yield row


def _unseen(shared: SharedInput) -> bool:
    """Whether an expert was given fewer tokens than its matrices have columns: too few to fit them to."""
    matrix = shared.matrices[0]
    return matrix.expert and shared.own.tokens < matrix.columns


def _blind(shared: SharedInput) -> bool:
    """Whether there is nothing to fit the matrices of an input to."""
    own = shared.own.hessian
    return own is None or not bool(own.diagonal().any()) or _unseen(shared)


def _fitted(
    job: Job, shared: SharedInput, weights: Mapping[str, torch.Tensor], tuned: dict[str, Pruned] | None
) -> Iterator[Fitted]:
    """The matrices of one input, compressed."""
    options, blind = job.options, _blind(shared)
    if blind and options.needs_text and not shared.matrices[0].expert:
        job.context.reporter.warn(f"no calibration input reached `{shared.matrices[0].name}`: rounded without feedback")
    if options.method != "gptq" or blind:
        for matrix in shared.matrices:
            yield round_off(matrix, weights[matrix.name], shared.own, options, job.fitter.stored)
        return
    if tuned is not None and all(matrix.name in tuned for matrix in shared.matrices):
        pruned = tune.stack([tuned[matrix.name] for matrix in shared.matrices])
    else:
        pruned = job.fitter.prune(shared, [weights[matrix.name] for matrix in shared.matrices])
    yield from job.fitter.fit(shared, pruned)


def _proxy(fitted: Fitted, moments: Moments) -> float | None:
    """tr (Q - W') H (Q - W')^T: the rise of a token's squared output error over what was asked for."""
    if moments.hessian is None or fitted.damp is None:
        return None
    return hessian.quadratic(fitted.solved.weight - fitted.wanted, moments.hessian)
