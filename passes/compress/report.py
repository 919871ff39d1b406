"""The report of a `compress` run: what was done to every matrix, and what it cost, as JSON and as a picture."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rewright.formats.draft import Draft
from rewright.passes.compress import picture
from rewright.passes.compress.plan import Matrix, Plan
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.models.families import FUSED
from rewright.passes.spec import Metrics, to_plain

REPORT = "reports/compress.json"
PICTURE = "reports/compress.svg"

Rows = Sequence[Mapping[str, Any]]


def put(draft: Draft, plan: Plan, options: CompressOptions, parts: Mapping[str, Any]) -> Metrics:
    """Write the report into a draft, and where errors were taken the picture; returns the pass's metrics.

    `parts` is what the run found: `matrices`, and where there was a text `calibration`, `layers`, `budget`, `polish`.
    """
    report = assemble(plan, options, parts)
    draft.put(REPORT, json.dumps(report, indent=1).encode() + b"\n")
    drawn = picture.draw(report)
    if drawn is not None:
        draft.put(PICTURE, drawn)
    summary: Metrics = report["summary"]
    return summary


def assemble(plan: Plan, options: CompressOptions, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The whole report, JSON values only."""
    kinds = kinds_of(plan)
    planned = {matrix.name: matrix for matrix in plan.matrices}
    rows = [
        {**row, "kind": kinds[row["name"]], "sparsity_asked": planned[row["name"]].sparsity}
        for row in parts["matrices"]
    ]
    return {
        "summary": summarise(rows, parts.get("layers", [])),
        "options": in_force(options, parts.get("calibration", {})),
        "kinds": [
            {"kind": kind, **means([row for row in rows if row["kind"] == kind])}
            for kind in dict.fromkeys(kinds.values())
        ],
        "skipped": list(plan.skipped),
        **parts,
        "matrices": rows,
    }


def in_force(options: CompressOptions, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """The options by flag, with what was settled by default; texts stand in `calibration`, by digest."""
    said = to_plain(options)
    del said["calibration-text"]
    if "sequence_length" in calibration:
        said["sequence-length"] = calibration["sequence_length"]
    return said


def kinds_of(plan: Plan) -> dict[str, str]:
    """The kind of each matrix by its name, as `q_proj`: what it is called in its layer, whichever layer or expert.

    Where two parts of a layer end alike (`attn.c_proj`, `mlp.c_proj`) a kind's name has as much as tells them apart.
    Kinds come in the order in which a forward reaches them.
    """
    paths = {matrix.name: _path(matrix) for matrix in plan.matrices}
    named = {path: _shortest(path, set(paths.values())) for path in paths.values()}
    family = plan.family
    listed = [*family.linears, *(family.experts.parts if family.experts else ()), *FUSED]
    leaves = [path.rsplit(".", 1)[-1] for path in listed]

    def place(name: str) -> tuple[int, int]:
        path = paths[name]
        leaf = path.rsplit(".", 1)[-1]
        first = leaves.index(leaf) if leaf in leaves else len(leaves)
        return (listed.index(path) if path in listed else first, path not in listed)

    return {name: named[paths[name]] for name in sorted(paths, key=place)}


def _path(matrix: Matrix) -> str:
    return re.sub(r"\.\d+(?=\.)|\[\d+\]$", "", matrix.local)


def _shortest(path: str, paths: set[str]) -> str:
    """The fewest last words of a path that no other of the paths ends in."""
    words = path.split(".")
    for count in range(1, len(words)):
        end = words[-count:]
        if sum(other.split(".")[-count:] == end for other in paths) == 1:
            return ".".join(end)
    return path


def means(rows: Rows) -> dict[str, Any]:
    """What some matrices have in common: counts over all their weights, means of their errors, the worst by name."""
    total = sum(row["rows"] * row["columns"] for row in rows)
    told = [row for row in rows if _error(row) is not None]
    return {
        "matrices": len(rows),
        "weights": total,
        "sparsity": sum(row["zeros"] for row in rows) / total,
        "bits_per_weight": 8 * sum(row["bytes"] for row in rows) / total,
        "error_calibration": mean(rows, "error_calibration"),
        "error_held_out": mean(rows, "error_held_out"),
        "worst": max(told, key=lambda row: _error(row) or 0.0)["name"] if told else None,
    }


def _error(row: Mapping[str, Any]) -> float | None:
    """The error on held-out text, or where there was none on the calibration's."""
    found: float | None = row.get("error_held_out")
    return row.get("error_calibration") if found is None else found


def mean(rows: Rows, key: str) -> float | None:
    """The mean over those rows that have a value; None where none has."""
    found = [row[key] for row in rows if row.get(key) is not None]
    return sum(found) / len(found) if found else None


def summarise(rows: Rows, layers: Rows) -> Metrics:
    """The pass's metrics: counts over all matrices, means of the errors of matrices and of layers."""
    whole = means(rows)
    return {
        **{key: whole[key] for key in ("matrices", "sparsity", "bits_per_weight")},
        "error_calibration": whole["error_calibration"],
        "error_held_out": whole["error_held_out"],
        "layer_error_calibration": mean(layers, "error_calibration"),
        "layer_error_held_out": mean(layers, "error_held_out"),
    }
