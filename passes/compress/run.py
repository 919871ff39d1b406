"""`compress` at work: calibrate, walk the layers, solve, write."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.compressed_tensors import quantization_config
from rewright.formats.draft import Draft
from rewright.formats.dtypes import to_torch
from rewright.formats.foreign import refuse_scaled
from rewright.passes import calibration
from rewright.passes.compress import hessian, output, solve
from rewright.passes.compress.plan import Matrix, Plan, draw_up, held_out_samples, scheme_of, sequence_length, specs
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.statistics import gather
from rewright.passes.context import Context, Reporter, compute_dtype
from rewright.passes.errors import InputError
from rewright.passes.loading import Assembly, load_tokenizer, stored_dtype
from rewright.passes.spec import Layout, Metrics
from rewright.passes.walk import Layer, Walk

REPORT = "reports/compress.json"


def run(context: Context, options: CompressOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Compress every matrix of the decoder layers; embedding, head and norms stay as they are."""
    layout = Layout({name: (e.dtype, tuple(e.shape)) for name, e in source.entries.items()}, source.config or {})
    plan = output.settle(draw_up(options, layout), source)
    refuse_scaled(source.entries)
    dtype = compute_dtype(context.dtype, context.device, stored_dtype(source))
    assembly = Assembly(source, dtype, context.device)
    assembly.check()
    if not options.symmetric and options.packs:
        context.reporter.warn("asymmetric packed weights do not load by default in transformers 5.23 and later")
    draft.declare(specs(plan, options, layout))
    output.copy_rest(context, plan, source, draft)
    if options.calibration_text:
        facts, rows = _walk(context, options, plan, assembly, draft)
    else:
        facts, rows = None, list(_without_text(context, options, plan, source, draft))
    behind = draft.carry(source)
    if behind:
        context.reporter.warn(f"not carried over: {', '.join(behind)}")
    if options.packs:
        schemes = {matrix.module: scheme_of(matrix, options) for matrix in plan.matrices}
        ignored = output.left_dense(plan, assembly)
        draft.edit_config({"quantization_config": quantization_config(schemes, ignored)})
    summary = _summary(rows)
    report = {"calibration": facts, "summary": summary, "skipped": list(plan.skipped), "matrices": rows}
    draft.put(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    return summary


def _summary(rows: list[dict[str, Any]]) -> Metrics:
    """The pass's metrics: counts over all matrices, means of their errors."""
    total = sum(row["rows"] * row["columns"] for row in rows)
    found: Metrics = {
        "matrices": len(rows),
        "sparsity": sum(row["zeros"] for row in rows) / total,
        "bits_per_weight": 8 * sum(row["bytes"] for row in rows) / total,
    }
    for name in ("error_calibration", "error_held_out"):
        errors = [row[name] for row in rows if row[name] is not None]
        found[name] = sum(errors) / len(errors) if errors else None
    return found


def _calibrate(context: Context, options: CompressOptions, assembly: Assembly) -> calibration.Calibration:
    source = assembly.weights.source
    tokenizer = load_tokenizer(source)
    if tokenizer is None:
        raise InputError(
            f"`{source.path}` has no tokenizer, and calibration needs one",
            hint="put the model's `tokenizer.json` beside its weights, or use `--method rtn`",
        )
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


def _walk(
    context: Context, options: CompressOptions, plan: Plan, assembly: Assembly, draft: Draft
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    drawn = _calibrate(context, options, assembly)
    tokens = torch.cat([drawn.tokens, drawn.held_out])
    walk = Walk(assembly, tokens, scratch=context.work)
    rows: list[dict[str, Any]] = []
    with context.reporter.progress("compress", len(assembly.layers)) as bar:
        for layer in walk:
            matrices = plan.of_layer(layer.index)
            unit = f"layer {layer.index}"
            if unit not in context.journal.done:
                made = _solve_layer(context, options, plan, layer, len(drawn.tokens), assembly, draft)
                draft.sync()
                context.journal.record(unit, {"matrices": made})
            made = context.journal.done[unit]["matrices"]
            for matrix in matrices:
                weight = output.read_back(draft, matrix, options, assembly.dtype)
                layer.replace(matrix.local, weight)
            rows += made
            context.reporter.event("layer", index=layer.index, matrices=made)
            errors = [row["error_calibration"] for row in made if row["error_calibration"] is not None]
            bar.advance(1, f"error {sum(errors) / len(errors):.4f}" if errors else "")
    return drawn.facts, rows


def _solve_layer(
    context: Context,
    options: CompressOptions,
    plan: Plan,
    layer: Layer,
    samples: int,
    assembly: Assembly,
    draft: Draft,
) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    matrices, source = plan.of_layer(layer.index), assembly.weights.source
    for shared in gather(layer, matrices, samples):
        started = time.monotonic()
        # from the file, not from the layer: `--dtype` may have rounded that
        weights = [matrix.turned(source.read(matrix.name)).float().to(shared.own.device) for matrix in shared.matrices]
        solved, damp = solve_group(context.reporter, options, plan.scales, shared.matrices, weights, shared.own)
        spent = (time.monotonic() - started) / len(weights)
        first = 0
        for matrix, weight in zip(shared.matrices, weights, strict=True):
            row = output.write(draft, matrix, solved.rows(first, first + matrix.rows), options)
            first += matrix.rows
            # with the rounding that decoding in the model's own dtype brings
            kept = matrix.turned(output.read_back(draft, matrix, options, stored_dtype(source))).float()
            kept = kept.to(weight.device)
            row["damp"] = damp
            row["tokens"] = shared.tokens
            row["error_calibration"] = hessian.relative_error(weight, kept, shared.own)
            row["error_held_out"] = hessian.relative_error(weight, kept, shared.held_out)
            row["seconds"] = round(spent, 4)
            if row["zeros"] == weight.numel() and bool(weight.any()):
                context.reporter.warn(f"`{matrix.name}` became all zeros: its values are below what a scale can say")
            made.append(row)
    order = {matrix.name: place for place, matrix in enumerate(matrices)}
    return sorted(made, key=lambda row: order[row["name"]])


def solve_group(
    reporter: Reporter,
    options: CompressOptions,
    scales: str,
    members: list[Matrix],
    weights: list[torch.Tensor],
    own: torch.Tensor,
) -> tuple[solve.Solved, float | None]:
    """Compress the stacked matrices of one input; returns what came out and the damping it took."""
    weight = torch.cat(weights)
    matrix = members[0]
    group = matrix.group or matrix.columns
    stored = to_torch(scales)
    assert stored is not None
    silent = not bool(own.diagonal().any())
    if silent and options.needs_text:
        reporter.warn(f"no calibration input reached `{matrix.name}`: rounded without feedback")
    if options.method == "gptq" and not silent:
        factor = hessian.factorise(own, options.damp, matrix.name)
        if factor.damp > options.damp:
            reporter.warn(f"`{matrix.name}`: damping raised from {options.damp:g} to {factor.damp:g}")
        rows = [member.rows for member in members]
        return solve.sweep(weight, factor.upper, rows, group, options, stored), factor.damp
    norm = own.diagonal().sqrt() if options.method == "wanda" and not silent else None
    parts = [solve.round_nearest(part, norm, group, options, stored) for part in weights]
    return solve.stacked(parts), None


def _without_text(
    context: Context, options: CompressOptions, plan: Plan, source: Checkpoint, draft: Draft
) -> Iterator[dict[str, Any]]:
    """Rounding needs no inputs: matrices are read, rounded and written one by one."""
    with context.reporter.progress("compress", len(plan.matrices)) as bar:
        for matrix in plan.matrices:
            if matrix.name not in context.journal.done:
                started = time.monotonic()
                weight = matrix.turned(output.read_finite(source, matrix.name)).float()
                stored = to_torch(plan.scales)
                assert stored is not None
                result = solve.round_nearest(weight, None, matrix.group or matrix.columns, options, stored)
                row = output.write(draft, matrix, result, options)
                row.update(damp=None, tokens=0, error_calibration=None, error_held_out=None)
                row["seconds"] = round(time.monotonic() - started, 4)
                draft.sync()
                context.journal.record(matrix.name, row)
            yield context.journal.done[matrix.name]
            bar.advance()
