"""`convert` at work: count where it must, then layer by layer read, turn and write."""

from __future__ import annotations

from typing import Any

from rewright.formats.bitmask import METHOD
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.passes.context import Context, Progress
from rewright.passes.convert import turn
from rewright.passes.convert.codes import Reader, converted, most
from rewright.passes.convert.order import ordered
from rewright.passes.convert.output import config, copied_bytes, specs
from rewright.passes.convert.plan import SHARED, Plan, draw_up, settle
from rewright.passes.convert.spec import ConvertOptions
from rewright.passes.matrices import packed_shape
from rewright.passes.sharing import each
from rewright.passes.spec import Layout, Metrics
from rewright.passes.writing import carry, units, write_by_layer


def run(context: Context, options: ConvertOptions, source: Checkpoint, draft: Draft) -> Metrics:
    """Write every packed matrix, or every recurrence, in the form asked for, and everything else as it is."""
    if options.to == "stripedhyena-modal" or options.to == "modal":
        return turn.run(context, options.to, source, draft)
    layout = Layout.of(source)
    plan = draw_up(options.to, layout, _shapes(source))
    if plan.form == plan.to:
        return _link(context, plan, source, draft)
    if plan.to == "bitmask-w4":
        plan = settle(plan, _count(context, plan, layout, source))
        context.reporter.info(f"transformers loads `{METHOD}` after `rewright.passes.loading.register()`")
    draft.declare(specs(plan, layout))
    names = ordered(plan, layout)
    zeros = write_by_layer(context, draft, "convert, tensors", names, lambda name: _write(plan, name, source, draft))
    carry(context, source, draft)
    changes = config(plan, source.config or {})
    gone = [key for key, value in changes.items() if value is None]
    draft.edit_config({key: value for key, value in changes.items() if value is not None}, remove=gone)
    return _metrics(plan, layout, sum(zeros.values()))


def _shapes(source: Checkpoint) -> dict[str, tuple[int, int]]:
    """The shapes that packed modules say they have, where those are shapes of matrices."""
    suffix = ".weight_shape"
    modules = [name.removesuffix(suffix) for name in source.entries if name.endswith(suffix)]
    found = {module: packed_shape(source, module) or () for module in modules}
    return {module: (said[0], said[1]) for module, said in found.items() if len(said) == 2 and min(said) > 0}


def _link(context: Context, plan: Plan, source: Checkpoint, draft: Draft) -> Metrics:
    context.reporter.info(f"`{source.path}` is {plan.to} already: its weights are linked")
    draft.link_weights(source)
    carry(context, source, draft)
    return {"matrices": len(plan.modules), **_kept(plan)}


def _count(context: Context, plan: Plan, layout: Layout, source: Checkpoint) -> dict[str, tuple[int, int, int]]:
    """`most` of every packed matrix."""

    def count(unit: str, modules: list[str], bar: Progress) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in modules:
            found[name] = most(Reader(source, plan.modules[name]))
            bar.advance()
        return found

    packed = units(name for name in ordered(plan, layout) if name in plan.modules)
    counted = {f"count {unit}": modules for unit, modules in packed.items()}
    found = each(context, "count zeros, matrices", counted, len, count)
    return {name: tuple(counts) for modules in found.values() for name, counts in modules.items()}


def _write(plan: Plan, name: str, source: Checkpoint, draft: Draft) -> int:
    """A packed matrix in its new form, or another tensor as it is; returns how many of a matrix's weights are zero."""
    if name not in plan.modules:
        draft.copy(name, source)
        return 0
    module = plan.modules[name]
    made, zeros = converted(plan, Reader(source, module))
    for leaf, tensor in made.items():
        draft.write(module.tensor(leaf), tensor)
    if plan.to != "dense":
        for leaf in SHARED:
            draft.copy(module.tensor(leaf), source)
    return zeros


def _metrics(plan: Plan, layout: Layout, zeros: int) -> Metrics:
    weights = sum(module.rows * module.columns for module in plan.modules.values())
    stored = sum(spec.nbytes for spec in specs(plan, layout)) - copied_bytes(plan, layout)
    return {
        "matrices": len(plan.modules),
        "sparsity": zeros / weights if weights else 0.0,
        "bits_per_weight": 8 * stored / weights if weights else 0.0,
        **_kept(plan),
    }


def _kept(plan: Plan) -> Metrics:
    """What a conversion back should know: the share of a group's weights that a record has room for."""
    return {} if plan.kept is None else {"kept": plan.kept}
