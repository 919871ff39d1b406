"""The document of a run: what is planned, what each stage would take, and in the end what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rewright.passes import wants
from rewright.passes.machine import version
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Estimate, Layout, to_plain
from rewright.passes.stages import named
from rewright.passes.survey import Run, Survey


def draw_up(
    run: Run,
    survey: Survey,
    state: str,
    timed: Callable[[Estimate, RunOptions], tuple[float, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The document of a run with nothing done yet. Raises what the passes refuse at the sight of the headers."""
    stages: list[dict[str, Any]] = []
    layout = Layout.of(survey.source)
    for number, stage in enumerate(run.stages, start=1):
        with named(number, run.stages):
            wants.refuse(stage, survey.source, layout)
            guess = stage.spec.estimate(stage.options, layout)
        planned = {"pass": stage.spec.name, "options": to_plain(stage.options)}
        layout = replace(guess.layout, made=(*layout.made, planned))
        seconds, details = timed(guess, run.options) if timed else (None, guess.details)
        stages.append(
            {
                "pass": stage.spec.name,
                "version": stage.spec.version,
                "options": to_plain(stage.options),
                "output_bytes": guess.output_bytes,
                "peak_host_bytes": guess.peak_host_bytes,
                "peak_device_bytes": guess.peak_device_bytes,
                "flops": guess.flops,
                "bytes_moved": guess.bytes_moved,
                "seconds_estimated": seconds,
                "details": details,
                "seconds": None,
                "metrics": None,
            }
        )
    return {
        "rewright": version(),
        "source": str(run.src),
        "destination": str(run.dst),
        "key": survey.key,
        "state": state,
        "stages": stages,
        "evaluation": None,
        "seconds": None,
    }


def fill(document: dict[str, Any], made: list[dict[str, Any]]) -> None:
    """Put in what the stages were measured to be and to take."""
    for shown, record in zip(document["stages"], made, strict=True):
        shown["metrics"], shown["seconds"] = record.get("metrics"), record.get("seconds")


def room(document: dict[str, Any]) -> int:
    """The most bytes that the stages hold at once: a stage's input stays until the stage is done."""
    sizes = [stage["output_bytes"] for stage in document["stages"]]
    return max(map(sum, zip([0, *sizes], sizes, strict=False)))
