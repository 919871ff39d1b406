"""The report of a `hyena-distill` run: the certificate of every group, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewright.formats.draft import Draft
from rewright.passes.hyena_distill import picture
from rewright.passes.hyena_distill.fits import NOISE, Job, Rows, together
from rewright.passes.spec import Metrics, to_plain

REPORT = "reports/hyena-distill.json"
PICTURE = "reports/hyena-distill.svg"


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found, by group: the bounds at all orders, the fits, the orders that were chosen, and examples.

    `tried` is what `--order auto` went through, `text` what the model says on a text, empty without one.
    """

    bounds: Mapping[str, Rows]
    fits: Mapping[str, Rows]
    orders: Mapping[str, int]
    tried: Sequence[Mapping[str, Any]]
    examples: Mapping[str, Mapping[str, Any]]
    text: Mapping[str, Any]


def put(job: Job, draft: Draft, found: Found, sizes: Mapping[str, int]) -> Metrics:
    """Write the report into a draft; returns the pass's metrics."""
    rows = [_row(job, group.name, found) for group in job.groups]
    norm = together([row["norm"] for row in rows])
    error = together([row["error"] * row["norm"] for row in rows])
    bound = together([row["bound"] * row["norm"] for row in rows])
    states = [count for fitted in found.fits.values() for count in fitted["states"]]
    metrics: Metrics = {
        "filters": len(states),
        "states": max(states),
        "states_mean": sum(states) / len(states),
        "error": error / norm if norm else 0.0,
        "bound": bound / norm if norm else 0.0,
        "worst_filter": max(row["worst"]["error"] for row in rows),
        **sizes,
    }
    # below the precision in which recurrences run no bound means anything
    least = max(bound, max(NOISE[group.dtype] for group in job.groups) * norm)
    metrics["error_over_bound"] = error / least if least else 1.0
    metrics |= {key: found.text[key] for key in ("logit_error", "loss_before", "loss_change") if key in found.text}
    report = {
        "summary": metrics,
        "options": {flag: value for flag, value in to_plain(job.options).items() if not flag.endswith("-text")},
        "groups": rows,
        "tried": list(found.tried),
        "text": dict(found.text),
        "examples": dict(found.examples),
    }
    draft.put(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    draft.put(PICTURE, picture.draw(report).encode())
    _warn(job, rows, found)
    return metrics


def _row(job: Job, name: str, found: Found) -> dict[str, Any]:
    """A group's certificate. Errors and bounds are relative to the filters after h_0 and the head."""
    group = next(group for group in job.groups if group.name == name)
    fits, bounds, orders = found.fits[name], found.bounds[name], job.orders(group)
    norm = together(bounds["norm"])
    least = [together([one[place] for one in bounds["bound"]]) for place in range(len(orders))]
    error, bound = together(fits["error"]), least[orders.index(found.orders[name])]
    relative = [e / n if n else 0.0 for e, n in zip(fits["error"], bounds["norm"], strict=True)]
    worst = max(range(len(relative)), key=relative.__getitem__)
    scale = norm or 1.0
    allowed = [order for order, value in zip(orders, least, strict=True) if value <= job.options.tolerance * norm]
    return {
        "name": name,
        "filters": group.filters,
        "length": job.length(group),
        "order": found.orders[name],
        "states": max(fits["states"]),
        "states_mean": sum(fits["states"]) / group.filters,
        "norm": norm,
        "error": error / scale,
        "bound": bound / scale,
        "error_over_bound": error / bound if bound else None,
        "worst": {"filter": worst, "error": relative[worst]},
        "bound_by_order": {str(order): value / scale for order, value in zip(orders, least, strict=True)},
        "order_that_tolerance_allows": allowed[0] if allowed else None,
    }


def _warn(job: Job, rows: Sequence[Mapping[str, Any]], found: Found) -> None:
    """Say what a run with `--order auto` did not reach, and how many states the bound says it takes."""
    if job.options.order.states is not None or not found.tried:
        return
    tolerance, last = job.options.tolerance, found.tried[-1]
    if "logit_error" in last and last["logit_error"] > tolerance:
        job.context.reporter.warn(
            f"the logits err by {last['logit_error']:.3g} at the largest order, not {tolerance:g}"
        )
    missed = [row["name"] for row in rows if row["error"] > tolerance] if "logit_error" not in last else []
    if missed:
        job.context.reporter.warn(
            f"{len(missed)} groups miss the tolerance of {tolerance:g} at the largest order, the first `{missed[0]}`"
        )
