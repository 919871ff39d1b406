"""A run's document as lines for a person: what a dry run would do, or what a run did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rewright.cli.console import table
from rewright.cli.figures import duration, figure, operations, size

_STATES = {
    "fresh": "nothing is there yet",
    "up-to-date": "up to date, nothing to do",
    "stale": "out of date",
    "resume": "partial work is there, the run would go on from it",
}

# Columns of a pass's table whose names say their unit, and what stands above them.
_HEADS = {"flops": "arithmetic", "bytes_moved": "bytes moved", "peak_bytes": "memory", "seconds_estimated": "time"}


def describe(document: Mapping[str, Any], *, dry: bool) -> Iterator[str]:
    """The lines of a document, in its own order."""
    if dry:
        state = str(document["state"])
        yield f"{document['destination']}: {_STATES.get(state, state)}"
        for number, stage in enumerate(document["stages"], start=1):
            yield from _planned(number, stage)
        return
    if document["state"] == "up-to-date":
        return
    for stage in document["stages"]:
        spent = f" in {duration(stage['seconds'])}" if stage.get("seconds") is not None else ""
        yield f"{stage['pass']}: done{spent}{_metrics(stage.get('metrics') or {})}"
    scores = document.get("evaluation")
    if scores:
        yield f"evaluation: {_scalars(scores)}"
    yield f"wrote {document['destination']} in {duration(document['seconds'])}"


def _planned(number: int, stage: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"stage {number}: {stage['pass']}"
    rows = [
        ("writes", size(stage["output_bytes"])),
        ("host memory", f"at most {size(stage['peak_host_bytes'])}"),
        ("device memory", f"at most {size(stage['peak_device_bytes'])}"),
        ("arithmetic", operations(stage["flops"])),
        ("bytes moved", size(stage["bytes_moved"])),
    ]
    if stage.get("seconds_estimated") is not None:
        rows.append(("time", f"about {duration(stage['seconds_estimated'])}"))
    yield table((f"  {name}", value) for name, value in rows)
    for name, value in stage["details"].items():
        yield from outline(name, value)


def outline(name: str, value: Any) -> Iterator[str]:
    """A pass's own table in the generic way: rows as columns, lists as words, nothing for what is empty."""
    label = name.replace("_", " ")
    if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value):
        head = list(dict.fromkeys(str(key) for row in value for key in row))
        yield f"  {label}:"
        yield table(
            ([("  " if i == 0 else "") + _cell(key, row.get(key)) for i, key in enumerate(head)] for row in value),
            head=[("  " if i == 0 else "") + _HEADS.get(key, key) for i, key in enumerate(head)],
        )
    elif isinstance(value, Mapping):
        yield f"  {label}: {_scalars(value)}"
    elif isinstance(value, list):
        if value:
            yield f"  {label}: {', '.join(figure(item) for item in value)}"
    else:
        yield f"  {label}: {figure(value)}"


def _cell(column: str, value: Any) -> str:
    """A value in the unit of its column."""
    if column not in _HEADS or value is None:
        return figure(value)
    if column == "flops":
        return operations(value)
    return duration(value) if column == "seconds_estimated" else size(value)


def _scalars(values: Mapping[str, Any]) -> str:
    flat = {key: item for key, item in values.items() if not isinstance(item, Mapping | list)}
    return ", ".join(f"{key.replace('_', ' ')} {figure(item)}" for key, item in flat.items())


def _metrics(metrics: Mapping[str, Any]) -> str:
    said = _scalars(metrics)
    return f": {said}" if said else ""
