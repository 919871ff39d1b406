"""`hyena-distill` at work: bound, choose orders, fit, write, report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.layout import TensorSpec
from rewright.passes.context import Context
from rewright.passes.hyena_distill import output, report
from rewright.passes.hyena_distill.examples import examples
from rewright.passes.hyena_distill.fits import Job, bounds, fits, kept
from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.order import choose
from rewright.passes.hyena_distill.spec import HyenaDistillOptions, check
from rewright.passes.hyena_distill.text import trial
from rewright.passes.spec import Layout, Metrics
from rewright.passes.writing import carry, write_by_layer


def run(context: Context, options: HyenaDistillOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Write a recurrence for every long filter, and everything else as it is."""
    layout = Layout.of(source)
    job = Job(context, options, source, check(options, layout))
    asked = trial(job)
    if asked and options.weighting == "input-spectrum":
        job = replace(job, weights=asked.weights())
    least = bounds(job)
    orders, tried = choose(job, least, asked.logit_error if asked else None)
    made = fits(job, orders)
    modals = {group.name: kept(job, group, orders[group.name]) for group in job.groups}
    told = asked.compare(orders) if asked else {}
    shown = examples(job, least, modals, orders)
    output.refuse_near_zero(job, modals)
    specs = output.specs(job, layout, modals)
    _write(job, draft, specs, modals)
    carry(context, source, draft)
    draft.edit_config(output.config(job, modals))
    sizes = {"bytes_before": source.total_bytes, "bytes_after": sum(spec.nbytes for spec in specs)}
    return report.put(job, draft, report.Found(least, made, orders, tried, shown, told), sizes)


def _write(job: Job, draft: Draft, specs: Sequence[TensorSpec], modals: Mapping[str, Modal]) -> None:
    draft.declare(specs)
    own = output.tensors(job)

    def write(name: str) -> None:
        if name in own:
            group, leaf = own[name]
            draft.write(name, output.leaf(modals[group.name], group, leaf))
        else:
            draft.copy(name, job.source)

    write_by_layer(job.context, draft, "write, tensors", [spec.name for spec in specs], write)
