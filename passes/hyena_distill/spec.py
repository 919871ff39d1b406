"""`hyena-distill`: what it takes, and what distilling costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from rewright.formats.dtypes import nbytes
from rewright.passes.errors import UsageError
from rewright.passes.hyena_distill.plan import STRIPED, Group, draw_up
from rewright.passes.spec import Estimate, Layout, Opt, Spec
from rewright.passes.values import StateOrder

# Orders that `auto` and the certificate consider.
ORDERS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# Of each group so many filters are fitted at the orders around the one asked for, to draw error against order.
DRAWN = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class HyenaDistillOptions:
    """The options of `hyena-distill`."""

    order: Annotated[
        StateOrder, Opt("real states of each recurrence at most, or `auto`: as few as the tolerance allows")
    ] = StateOrder(16)
    tolerance: Annotated[
        float,
        Opt("with `--order auto`: relative error of the filters, or where a text is named of the logits", min=0, max=1),
    ] = 0.01
    method: Annotated[
        Literal["closed-form", "gradient", "balanced", "modal"],
        Opt("how poles are found; `closed-form` is refined by `--refine`, the others are baselines"),
    ] = "closed-form"
    refine: Annotated[int, Opt("steps of the polish at most", min=0, max=10_000)] = 50
    fir_head: Annotated[int, Opt("so many first samples after h_0 are kept as they are", min=0, max=4096)] = 0
    horizon: Annotated[
        int | None, Opt("positions that count; by default the filter's length; zeros follow a shorter filter", min=2)
    ] = None
    weighting: Annotated[
        Literal["none", "input-spectrum"], Opt("weigh errors by the spectrum of what the filters meet in the text")
    ] = "none"
    calibration_text: Annotated[
        tuple[Path, ...], Opt("text to choose orders and weights on, .txt or .jsonl (repeatable)", metavar="FILE")
    ] = ()
    validation_text: Annotated[
        tuple[Path, ...],
        Opt("text to report the change of loss on; by default documents of the other", metavar="FILE"),
    ] = ()
    samples: Annotated[int, Opt("sequences of the calibration text", min=1, max=65536)] = 16
    sequence_length: Annotated[
        int | None, Opt("tokens of a sequence; by default 1024 or what the filters reach", min=2)
    ] = None
    keep_filters: Annotated[bool, Opt("keep the original filters' tensors beside the recurrences")] = False

    def __post_init__(self) -> None:
        if self.weighting != "none" and not self.calibration_text:
            raise UsageError("`--weighting input-spectrum` is measured on a text", hint="add `--calibration-text FILE`")
        if self.order.states is None and self.tolerance == 0:
            raise UsageError("no order reaches a tolerance of 0", hint="say `--order N`, or another `--tolerance`")


def states_asked(options: HyenaDistillOptions) -> int:
    """The most real states that a filter may come to have."""
    return options.order.states or ORDERS[-1]


def check(options: HyenaDistillOptions, layout: Layout) -> list[Group]:
    """The groups to distil. Refuses what headers tell: an order that no samples show, a text without a model."""
    groups = draw_up(layout, options.horizon)
    order = options.order.states
    for group in groups:
        length = options.horizon or group.length
        most = 2 * max(0, (length - 1 - options.fir_head) // 4)
        if most < 2:
            raise UsageError(
                f"`{group.name}` has {length} samples, too few for a recurrence after `--fir-head {options.fir_head}`"
            )
        if order is not None and order > most:
            raise UsageError(
                f"`--order {order}` is more than {length} samples of `{group.name}` can show",
                hint=f"use `--order {most}` or less",
            )
        if options.keep_filters and group.kind in ("modal", "real-modal"):
            raise UsageError(
                f"`{group.name}` is a recurrence: there is no filter for `--keep-filters`", hint="leave it out"
            )
        if options.fir_head and group.kind in ("modal", "real-modal"):
            raise UsageError(f"`--fir-head` has no place in the layout of `{group.name}`", hint="leave it out")
    texts = options.calibration_text or options.validation_text
    if texts and (not layout.config or layout.model_type in STRIPED):
        raise UsageError(
            "a text counts for nothing here: there is no model to run it through",
            hint="leave out `--calibration-text` and `--validation-text`",
        )
    return groups


def _estimate(options: HyenaDistillOptions, layout: Layout) -> Estimate:
    groups = check(options, layout)
    order = options.order.states or 16
    tensors = dict(layout.tensors)
    flops = 0
    for group in groups:
        if not options.keep_filters and group.kind == "implicit":
            for name in group.tensors:
                del tensors[name]
        if group.kind == "bank" and not options.keep_filters:
            del tensors[group.name]
        if group.kind in ("bank", "implicit"):
            half = (group.filters, order // 2, 2)
            tensors |= {f"{group.out}.{leaf}": (group.dtype, half) for leaf in ("poles", "residues")}
            tensors[f"{group.out}.h0"] = (group.dtype, (group.filters,))
            if options.fir_head:
                tensors[f"{group.out}.fir"] = (group.dtype, (group.filters, options.fir_head))
        if group.kind in ("modal", "real-modal"):
            most = order // 2 if group.kind == "modal" else order
            for name in group.tensors:
                dtype, shape = tensors[name]
                if len(shape) > 1:
                    tensors[name] = dtype, (shape[0], min(shape[1], most), *shape[2:])
        flops += group.filters * flops_of(options, options.horizon or group.length, order)
    written = sum(nbytes(*entry) for entry in tensors.values())
    block = max(len(group.blocks[0]) * (options.horizon or group.length) for group in groups)
    config = dict(layout.config)
    if all(group.kind == "implicit" for group in groups):
        # what a pass that comes after refuses by
        config["modal"] = {
            "entries": [order // 2] * len(groups),
            "states": [order] * len(groups),
            "fir_head": options.fir_head,
        }
    return Estimate(
        layout=replace(layout, tensors=tensors, config=config),
        output_bytes=written,
        peak_host_bytes=8 * block * (order + 40),
        peak_device_bytes=0,
        flops=flops,
        bytes_moved=written,
        details={
            "filters": sum(group.filters for group in groups),
            "groups": [
                {"name": group.name, "filters": group.filters, "length": options.horizon or group.length}
                for group in groups
            ],
        },
    )


def flops_of(options: HyenaDistillOptions, length: int, order: int) -> int:
    """About what one filter takes: products with its Hankel matrix by FFT, and steps of the polish."""
    subspace = ORDERS[-1] + 8
    products = 12 * subspace * 2 * 10 * length * math.ceil(math.log2(length))
    polish = options.refine * (4 * order * length + 40 * order**3)
    return products + polish


HYENA_DISTILL = Spec(
    name="hyena-distill",
    summary="turn long convolutions into compact recurrences, with a certificate",
    version=1,
    options=HyenaDistillOptions,
    impl="rewright.passes.hyena_distill.run:run",
    wants=frozenset({"weights"}),
    gives="weights",
    grain="layer",
    metrics=frozenset(
        {
            "filters",
            "states",
            "states_mean",
            "error",
            "bound",
            "error_over_bound",
            "worst_filter",
            "logit_error",
            "loss_before",
            "loss_change",
            "bytes_before",
            "bytes_after",
        }
    ),
    paper="Laughing Hyena Distillery (arXiv:2310.18780)",
    splits=lambda options: True,
    estimate=_estimate,
)
