"""The report of a `dejavu-predictor-train` run, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rewright.formats.draft import Draft
from rewright.passes.dejavu_predictor_train import output
from rewright.passes.dejavu_predictor_train.budget import Market, Settled
from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.layers import Trained
from rewright.passes.sparsity import Comparison
from rewright.passes.spec import Metrics, to_plain

REPORT = "reports/dejavu-predictor-train.json"


@dataclass(frozen=True, slots=True)
class Found:
    """What a run found: facts of its text, the market, what was settled and made of it, and the held-out text's say."""

    text: dict[str, Any]
    market: Market
    settled: Settled
    made: output.Made
    seen: Comparison
    trained: Sequence[Trained]


def put(job: Job, draft: Draft, found: Found) -> Metrics:
    """Write the report into a draft; returns the pass's metrics."""
    told = found.seen.told(found.made.read_bytes)
    places = found.seen.meter.places
    energy, kept = (sum(getattr(one, name) for one in places.values()) for name in ("energy", "kept"))
    metrics: Metrics = {
        **{key: value for key, value in told.items() if key != "tokens"},
        "kl_foretold": found.settled.cost,
        "energy_recall": kept / energy if energy else 1.0,
    }
    if job.options.cost == "energy":
        del metrics["kl_foretold"]
    rows = [
        {"layer": layer, "site": site, "units": one.units, **one.told()}
        for (layer, site), one in sorted(places.items())
    ]
    for row in rows:
        layer = found.trained[int(row["layer"] or 0)]
        row["rank"] = layer.told.get("rank") if row["site"] == "mlp" else None
    report = {
        "summary": metrics,
        "options": {flag: value for flag, value in to_plain(job.options).items() if not flag.endswith("-text")},
        "targets": list(job.targets),
        "text": {**found.text, "held_out_tokens": told["tokens"]},
        "share_foretold": found.settled.share,
        "levels": [{"share": rung.share, "cost": rung.cost} for rung in found.made.rungs],
        "places": rows,
    }
    draft.put(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    return metrics
