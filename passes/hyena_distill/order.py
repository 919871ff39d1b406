"""The order of each group: as asked, or as few states as a tolerance allows.

The lower bound rules out orders before anything is fitted. Without a text, the filters' own error decides; with one,
the error of the logits does, for filters may err much where the model does not mind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rewright.passes.hyena_distill.fits import Job, Rows, fits, together

# Levels of the bound, relative to the filters, that are tried from above while the logits err too much.
LEVELS = tuple(0.9 * 0.5**step for step in range(40))

Judge = Callable[[Mapping[str, int]], float]


def lowest(job: Job, bounds: Mapping[str, Rows], level: float) -> dict[str, int]:
    """By group the smallest order whose bound is within `level` of its filters' norm, else the largest there is."""
    found = {}
    for group in job.groups:
        orders, rows = job.orders(group), bounds[group.name]
        whole = together(rows["norm"])
        least = [together([filter_[place] for filter_ in rows["bound"]]) for place in range(len(orders))]
        found[group.name] = next(
            (order for order, value in zip(orders, least, strict=True) if value <= level * whole), orders[-1]
        )
    return found


def choose(job: Job, bounds: Mapping[str, Rows], judge: Judge | None) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """The order of every group, and what was tried on the way: orders by group with the error that decided.

    `judge` tells the error of the logits at some orders, whose fits are there when it is called.
    """
    asked, tolerance = job.options.order.states, job.options.tolerance
    if asked is not None:
        return {group.name: asked for group in job.groups}, []
    return _by_filters(job, bounds, tolerance) if judge is None else _by_logits(job, bounds, tolerance, judge)


def _by_filters(job: Job, bounds: Mapping[str, Rows], tolerance: float) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """From what the bound allows upwards, each group until its filters are near enough."""
    orders, tried = lowest(job, bounds, tolerance), []
    while True:
        found = fits(job, orders)
        errors = {
            name: together(rows["error"]) / (together(bounds[name]["norm"]) or 1.0) for name, rows in found.items()
        }
        tried.append({"orders": dict(orders), "errors": errors})
        raised = dict(orders)
        for group in job.groups:
            above = [order for order in job.orders(group) if order > orders[group.name]]
            if errors[group.name] > tolerance and above:
                raised[group.name] = above[0]
        if raised == orders:
            return orders, tried
        orders = raised


def _by_logits(
    job: Job, bounds: Mapping[str, Rows], tolerance: float, judge: Judge
) -> tuple[dict[str, int], list[dict[str, Any]]]:
    """From loose levels of the bound to tight ones, all groups together, until the logits are near enough."""
    tried: list[dict[str, Any]] = []
    last = lowest(job, bounds, 0.0)
    for level in LEVELS:
        orders = lowest(job, bounds, level)
        if tried and orders == tried[-1]["orders"]:
            continue
        fits(job, orders)
        error = judge(orders)
        tried.append({"orders": dict(orders), "logit_error": error})
        if error <= tolerance or orders == last:
            break
    return tried[-1]["orders"], tried
