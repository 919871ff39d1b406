"""`compress` at work: calibrate, walk the layers, solve, write."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rewright.formats.bitmask import FORM, METHOD
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.foreign import refuse_scaled
from rewright.formats.packing import quantization_config
from rewright.passes import calibration
from rewright.passes.compress import budget, output, polish, readers, report
from rewright.passes.compress.fit import round_off
from rewright.passes.compress.job import Job
from rewright.passes.compress.layers import solve_layer
from rewright.passes.compress.plan import (
    Matrix,
    draw_up,
    held_out_samples,
    schemes,
    sequence_length,
    specs,
)
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.context import Context, Progress
from rewright.passes.loading import Assembly, load_tokenizer, stored_dtype
from rewright.passes.machine import compute_dtype
from rewright.passes.sharing import each
from rewright.passes.spec import Layout, Metrics
from rewright.passes.walk import Walk
from rewright.passes.writing import carry


def run(context: Context, options: CompressOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Compress every matrix of the decoder layers; embedding, head and norms stay as they are."""
    layout = Layout.of(source)
    plan = output.settle(draw_up(options, layout), source)
    refuse_scaled(source.entries)
    dtype = compute_dtype(context.dtype, context.device, stored_dtype(source))
    assembly = Assembly(source, dtype, context.device)
    assembly.check()
    job = Job(context, options, plan, source, assembly, draft)
    drawn, dealt = None, None
    if options.calibration_text:
        drawn = _calibrate(context, options, assembly)
        if options.budget == "measured":
            plan, dealt = budget.measure(job, drawn.tokens)
            job = replace(job, plan=plan)
    packed = schemes(plan, options)
    if packed and options.format == FORM:
        context.reporter.info(f"transformers loads `{METHOD}` after `rewright.passes.loading.register()`")
    elif packed:
        if not options.symmetric:
            context.reporter.warn("asymmetric packed weights do not load by default in transformers 5.23 and later")
        for split in readers.splits(plan):
            context.reporter.warn(split)
    draft.declare(specs(plan, options, layout))
    if context.world.leads:
        output.copy_rest(context, plan, source, draft)
    found = {"matrices": _without_text(job)} if drawn is None else _walk(job, drawn)
    if dealt is not None:
        found["budget"] = dealt
    unseen = sum(row.get("rounded", False) for row in found["matrices"])
    if unseen:
        context.reporter.warn(
            f"{unseen} matrices of experts saw fewer tokens than they have columns and were rounded to nearest:"
            f" `{report.REPORT}` names them"
        )
    carry(context, source, draft)
    if packed:
        draft.edit_config({"quantization_config": quantization_config(packed, output.left_dense(plan, assembly))})
    return report.put(draft, plan, options, found)


def _calibrate(context: Context, options: CompressOptions, assembly: Assembly) -> calibration.Calibration:
    source = assembly.weights.source
    tokenizer = load_tokenizer(source)
    seen: dict[str, Path] = {}
    texts: list[str] = []
    for path in options.calibration_text:
        digest = context.inputs.digest(path)
        if digest in seen:
            context.reporter.warn(f"`{path}` and `{seen[digest]}` are one text, which is used once")
            continue
        seen[digest] = path
        texts += calibration.read_documents(path, context.inputs)
    drawn = calibration.draw(
        texts,
        tokenizer,
        rows=assembly.model.get_input_embeddings().weight.shape[0],
        samples=options.samples,
        held_out=held_out_samples(options.samples),
        length=sequence_length(options, source.config or {}),
        seed=context.seed,
    )
    used = drawn.facts["samples_used"]
    if used < options.samples:
        context.reporter.warn(f"the calibration text fills {used} of the {options.samples} sequences asked for")
    if not len(drawn.held_out):
        context.reporter.warn("no text is left over to report errors on: held-out errors are missing")
    return drawn


def _walk(job: Job, drawn: calibration.Calibration) -> dict[str, Any]:
    """Every layer, then `--polish`; the report's parts. What is finished is not done again, or not even walked."""
    options, journal = job.options, job.context.journal
    if "walk" not in journal.done or (options.polish and polish.UNIT not in journal.done):
        walk, rows, layers = _through(job, drawn)
        if "walk" not in journal.done:
            journal.record("walk", {"layers": layers, "matrices": rows})
        if options.polish:
            polish.polish(job, walk)
    found = {"calibration": drawn.facts, **journal.done["walk"]}
    if options.polish:
        found["polish"] = journal.done[polish.UNIT]
    return found


def _through(job: Job, drawn: calibration.Calibration) -> tuple[Walk, list[dict[str, Any]], list[dict[str, Any]]]:
    """Walk through the layers; rows of the report for matrices and for layers."""
    context, options = job.context, job.options
    tokens, samples = torch.cat([drawn.tokens, drawn.held_out]), len(drawn.tokens)
    both = options.fits_dense or options.tune or options.polish
    first = 0 if both else samples
    walk = Walk(
        job.assembly,
        tokens,
        samples=samples,
        dense_from=first,
        scratch=context.work,
        through=False,
        world=context.world,
    )
    rows: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    with context.reporter.progress("compress layers", len(job.assembly.layers)) as bar:
        for layer in walk:
            unit = f"layer {layer.index}"
            if unit not in context.journal.done:
                made = solve_layer(job, layer)
                job.draft.sync()
                context.journal.record(unit, {"matrices": made})
            made = context.journal.done[unit]["matrices"]
            for matrix in job.plan.of_layer(layer.index):
                layer.replace(matrix.local, job.running(matrix))
            layer.finish()
            errors = {f"error_{name}": value for name, value in layer.errors.items()}
            layers.append({"layer": layer.index, **errors})
            rows += made
            context.reporter.event("layer", index=layer.index, matrices=made, **errors)
            bar.advance(1, _note(layers[-1], made))
    return walk, rows, layers


def _note(layer: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The error to show beside the bar: the layer's, else the mean of its matrices'."""
    found = layer.get("error_held_out", layer.get("error_calibration"))
    errors = [row["error_calibration"] for row in rows if row["error_calibration"] is not None]
    if found is None and errors:
        found = sum(errors) / len(errors)
    return "" if found is None else f"layer {layer['layer']} error {found:.4f}"


def _without_text(job: Job) -> list[dict[str, Any]]:
    """Rounding needs no inputs: matrices are read, rounded and written one by one."""

    def rounded(name: str, matrix: Matrix, bar: Progress) -> dict[str, Any]:
        started = time.monotonic()
        fitted = round_off(matrix, job.original(matrix), None, job.options, job.fitter.stored)
        row = output.row(matrix, [output.write(job.draft, fitted, job.options)])
        row.update(tokens=0, proxy_loss=None, error_calibration=None, error_held_out=None)
        row["seconds"] = round(time.monotonic() - started, 4)
        job.draft.sync()
        bar.advance(matrix.rows * matrix.columns)
        return row

    matrices = {matrix.name: matrix for matrix in job.plan.matrices}
    return list(each(job.context, "compress, weights", matrices, lambda m: m.rows * m.columns, rounded).values())
