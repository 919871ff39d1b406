"""One decoder layer of a `compress` run: its matrices solved in the order in which a forward reaches them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from rewright.passes.compress import hessian, output, statistics, tune
from rewright.passes.compress.fit import Fitted, Pruned, round_off
from rewright.passes.compress.job import Job
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.compress.units import Unit, units_of, whole
from rewright.passes.layer import Layer

Group = tuple[Matrix, ...]


def solve_layer(job: Job, layer: Layer) -> list[dict[str, Any]]:
    """Compress and write every planned matrix of a layer; returns their rows of the report, in the plan's order."""
    visits = _visits(job, layer)
    tuned = _tune(job, layer, visits) if job.options.tune else None
    planned = job.plan.of_layer(layer.index)
    made = []
    with job.context.reporter.progress(f"layer {layer.index}", len(planned)) as bar:
        for index, groups in enumerate(visits):
            for row in _visit(job, layer, groups, tuned, last=index == len(visits) - 1):
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
    job: Job,
    layer: Layer,
    groups: list[Group],
    *,
    last: bool,
    weights: Mapping[str, torch.Tensor] | None = None,
    kept: Collection[int] | None = None,
) -> list[SharedInput]:
    """The moments of some groups; `weights` and `kept` as in `statistics.gather`."""
    return statistics.gather(
        layer,
        groups,
        dense=job.options.fits_dense,
        writers=job.writers,
        weights=weights,
        kept=kept,
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
    if shared.blind:
        return
    weight = torch.cat([weights[matrix.name] for matrix in shared.matrices])
    units = units_of(shared.matrices)
    pruned = tune.stack(job.fitter.prune(shared, units, [weight[unit.rows] for unit in units]))
    first = 0
    for matrix in shared.matrices:
        part = pruned.rows(first, first + matrix.rows)
        first += matrix.rows
        layer.replace(matrix.local, matrix.turned(part.weight))
        yield matrix, part


def _visit(
    job: Job, layer: Layer, groups: list[Group], tuned: dict[str, Pruned] | None, *, last: bool
) -> Iterator[dict[str, Any]]:
    """Solve the groups of one walk through the layer, each process its units; then all go on with what was written."""
    world = job.context.world
    dense = {matrix.name: job.original(matrix) for group in groups for matrix in group} if tuned else None
    split = units_of if job.options.method == "gptq" else whole
    units = [(index, unit) for index, group in enumerate(groups) for unit in split(group)]
    own = [units[place] for place in world.share([unit.cost for _, unit in units])]
    # where nothing can be fitted a group is not split, and is the first unit's
    leads = {index for index, unit in own if unit.first == 0}
    found: list[dict[str, Any]] = []
    met = gather(job, layer, groups, last=last, weights=dense, kept={index for index, _ in own})
    units_met: defaultdict[int, list[Unit]] = defaultdict(list)
    for index, unit in own:
        units_met[index].append(unit)
    for index, shared in enumerate(met):
        mine = units_met[index]
        if job.options.method != "gptq" or shared.blind:
            mine = whole(shared.matrices) if index in leads else []
        started, before = time.monotonic(), len(found)
        for fitted in _fitted(job, shared, mine, tuned):
            found += [_finish(job, shared, one, weight) for one, weight in fitted]
        for part in found[before:]:
            part["seconds"] = (time.monotonic() - started) / (len(found) - before)
        shared.drop()
    job.draft.share()
    parts: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for part in (one for theirs in world.together(found) for one in theirs):
        parts[part["name"]].append(part)
    for shared in met:
        for matrix in shared.matrices:
            row = _row(job, shared, matrix, parts[matrix.name])
            layer.replace(matrix.local, job.running(matrix))
            yield row


def _fitted(
    job: Job, shared: SharedInput, units: list[Unit], tuned: dict[str, Pruned] | None
) -> Iterator[list[tuple[Fitted, torch.Tensor]]]:
    """This process's units of the matrices of one input, compressed; each part beside its weights of the source."""
    options, fitter = job.options, job.fitter
    if options.method != "gptq" or shared.blind:
        if units and shared.blind and options.needs_text and not shared.matrices[0].expert:
            name = shared.matrices[0].name
            job.context.reporter.warn(f"no calibration input reached `{name}`: rounded without feedback")
        for unit in units:
            for matrix in unit.members:
                weight = job.original(matrix)
                yield [(round_off(matrix, weight, shared.own, options, fitter.stored), weight)]
        return
    weights = [torch.cat([job.original(matrix) for matrix in unit.members]) for unit in units]
    if tuned is not None and all(matrix.name in tuned for matrix in shared.matrices):
        stack = tune.stack([tuned[matrix.name] for matrix in shared.matrices])
        pruned = [stack.rows(unit.first, unit.stop) for unit in units]
    else:
        pruned = fitter.prune(shared, units, weights)
    for fitted, weight in zip(fitter.fit(shared, units, pruned), weights, strict=True):
        sizes = [one.matrix.rows for one in fitted]
        yield list(zip(fitted, torch.split(weight, sizes), strict=True))


def _finish(job: Job, shared: SharedInput, fitted: Fitted, weight: torch.Tensor) -> dict[str, Any]:
    """Write a matrix, or some rows of one; what its row of the report takes from them."""
    matrix, result = fitted.matrix, job.stored(fitted.solved)
    part = output.write(job.draft, fitted, job.options)
    part["proxy_loss"] = _proxy(fitted, shared.own)
    part["calibration"] = statistics.error_terms(shared.sampled or shared.own, matrix, weight, result)
    part["held_out"] = statistics.error_terms(shared.held_out, matrix, weight, result)
    part["empty"] = not bool(weight.any())
    return part


def _row(job: Job, shared: SharedInput, matrix: Matrix, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A matrix's row of the report from those of its parts."""
    row = output.row(matrix, parts)
    row["tokens"] = shared.own.tokens
    if matrix.expert and job.options.needs_text:
        row["rounded"] = shared.unseen
    losses = [part["proxy_loss"] for part in parts]
    row["proxy_loss"] = None if None in losses else sum(losses)
    for name, moments in (("calibration", shared.sampled or shared.own), ("held_out", shared.held_out)):
        row[f"error_{name}"] = statistics.error(moments, matrix.name, [part[name] for part in parts])
    row["seconds"] = round(sum(part["seconds"] for part in parts), 4)
    if row["zeros"] == matrix.rows * matrix.columns and not all(part["empty"] for part in parts):
        job.context.reporter.warn(f"`{matrix.name}` became all zeros: its values are below what a scale can say")
    return row


def _proxy(fitted: Fitted, moments: Moments) -> float | None:
    """tr (Q - W') H (Q - W')^T: the rise of a token's squared output error over what was asked for."""
    if fitted.damp is None:
        return None
    return hessian.quadratic(fitted.solved.weight - fitted.wanted, moments.hessian)
