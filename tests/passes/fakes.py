"""A pass whose work is whatever a test says, over weights that are taken as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.passes.context import Context, Silent
from rewright.passes.pipeline import execute
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Estimate, Layout, Opt, Spec
from rewright.passes.survey import Run

Act = Callable[[Context, Checkpoint, Draft], dict[str, Any] | None]
ACTS: dict[str, Act] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeOptions:
    act: Annotated[str, Opt("what to do, by its name in ACTS")] = ""
    level: Annotated[int, Opt("a number")] = 1
    speed: Annotated[int, Opt("a number that changes no byte", affects="speed")] = 1
    file: Annotated[Path | None, Opt("a file")] = None


def _estimate(options: FakeOptions, layout: Layout) -> Estimate:
    return Estimate(layout=layout, output_bytes=0, peak_host_bytes=0, peak_device_bytes=0, flops=0, bytes_moved=0)


FAKE = Spec(
    name="fake",
    summary="do as the test says",
    version=1,
    options=FakeOptions,
    impl="tests.passes.fakes:run",
    wants=frozenset({"weights"}),
    gives="weights",
    grain="tensor",
    paper="none",
    estimate=_estimate,
)


def run(context: Context, options: FakeOptions, source: Checkpoint, draft: Draft) -> dict[str, Any]:
    metrics = ACTS[options.act](context, source, draft) if options.act else None
    draft.link_weights(source)
    draft.carry(source)
    return {"level": options.level, **(metrics or {})}


def fake(**options: Any) -> Stage:
    return Stage(FAKE, FakeOptions(**options))


def go(src: Path, dst: Path, *stages: Stage, **options: Any) -> dict[str, Any]:
    """Execute a run in this process."""
    return execute(Run(src, dst, stages or (fake(),), RunOptions(threads=1, **options)), Silent())
