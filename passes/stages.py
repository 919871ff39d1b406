"""The stages of a run, one after the other: each a pass that makes a checkpoint of the one before."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.errors import Refusal
from rewright.formats.files import storage
from rewright.passes.context import Context, Reporter
from rewright.passes.errors import BoundError, UsageError
from rewright.passes.inputs import Inputs
from rewright.passes.journal import Journal
from rewright.passes.machine import find_device, libraries, prepare
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Metrics, to_plain
from rewright.passes.workspace import Workspace
from rewright.passes.world import World


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Stages to carry out in a workspace, from `origin` on. `head` is what the stamp of each begins with."""

    origin: Checkpoint
    stages: Sequence[Stage]
    options: RunOptions
    inputs: Inputs
    threads: int
    workspace: Workspace
    head: Mapping[str, Any]
    reporter: Reporter
    world: World = field(default_factory=World)


def carry_out(chain: Chain) -> tuple[Path, list[dict[str, Any]]]:
    """Run what is not done yet; returns the last stage's checkpoint and the records of all stages.

    A stage's input is deleted when the stage is done, and at most two are on the disk at a time.
    """
    names, source = [stage.spec.name for stage in chain.stages], chain.origin

    def look() -> tuple[int, list[dict[str, Any]]]:
        done, made = chain.workspace.finished(names)
        _delete_before(chain.workspace, names, done)
        return done, made

    done, made = chain.world.lead(look)
    for number in range(done + 1, len(names) + 1):
        if number > 1:
            source = Checkpoint.open(chain.workspace.folder(number - 1, names[number - 2]))
        with named(number, chain.stages):
            made = _stage(chain, number, source, made)
        chain.world.lead(partial(_delete_before, chain.workspace, names, number))
    return chain.workspace.folder(len(names), names[-1]), made


def _stage(chain: Chain, number: int, source: Checkpoint, made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One stage, by all processes where its pass splits its work, else by the first; the records of all so far."""
    stage, world = chain.stages[number - 1], chain.world
    folder = chain.workspace.folder(number, stage.spec.name)

    def seal(draft: Draft, record: dict[str, Any]) -> list[dict[str, Any]]:
        if number > 1:
            _carry_reports(source.root, draft, number - 1)
        records = [*made, record]
        draft.seal({**chain.head, "stages": records})
        return records

    def alone() -> list[dict[str, Any]]:
        draft = Draft(folder)
        return seal(draft, _carry_out_one(chain, number, source, draft, World()))

    if world.size == 1:
        return alone()
    if not stage.spec.splits(stage.options):
        chain.reporter.info(f"`{stage.spec.name}` is done by one of the {world.size} processes: it is not split so")
        return world.lead(alone)
    # the folder is there before the others look into it
    world.lead(lambda: Draft(folder).close())
    draft = Draft(folder, rank=world.rank, meet=world.meet)
    record = _carry_out_one(chain, number, source, draft, world)
    draft.close()
    return world.lead(partial(seal, draft, record))


def _delete_before(workspace: Workspace, names: Sequence[str], done: int) -> None:
    """Delete what nobody needs when `done` stages are: their journals, and all but the last one's checkpoint."""
    for number in range(1, done + 1):
        publish.discard(workspace.scratch(number, names[number - 1]))
        if number < done:
            publish.discard(workspace.folder(number, names[number - 1]))


def _carry_reports(before: Path, draft: Draft, number: int) -> None:
    """Take over what earlier stages reported; where two have one name, the earlier gets its stage's number."""
    for file in sorted((before / "reports").rglob("*")):
        if file.is_file():
            data, name = file.read_bytes(), file.relative_to(before)
            mine = draft.path / name
            if mine.exists() and mine.read_bytes() != data:
                name = name.with_name(f"{number}-{name.name}")
            draft.put(name.as_posix(), data)


@contextlib.contextmanager
def named(number: int, stages: Sequence[Stage]) -> Iterator[None]:
    """In a chain of several, a refusal says which stage it comes from."""
    try:
        yield
    except Refusal as refusal:
        if len(stages) > 1:
            refusal.message = f"stage {number} ({stages[number - 1].spec.name}): {refusal.message}"
        raise


def _carry_out_one(chain: Chain, number: int, source: Checkpoint, draft: Draft, world: World) -> dict[str, Any]:
    """Run one pass into its draft, on from its journal; returns its record for the stamp."""
    from rewright.kernels import dispatch

    stage, options = chain.stages[number - 1], chain.options
    scratch = chain.workspace.scratch(number, stage.spec.name)
    work = scratch / f"process-{world.rank}" if world.rank else scratch
    with storage(work):
        work.mkdir(parents=True, exist_ok=True)
    dispatch.reset_tally()
    # what processes before these have left is read by all before any goes on
    world.meet()
    journal = Journal(scratch, ran=_ran, rank=world.rank)
    world.meet()
    sent = world.sent
    prepare(chain.threads)
    context = Context(
        seed=options.seed,
        device=find_device(options.device, world),
        dtype=options.dtype,
        threads=chain.threads,
        reporter=chain.reporter,
        journal=journal,
        inputs=chain.inputs,
        work=work,
        origin=chain.origin,
        world=world,
    )
    chain.reporter.debug(
        f"stage {number} ({stage.spec.name}) on {context.device}, {chain.threads} threads, kernels {options.kernels}"
    )
    chain.reporter.event("stage", number=number, name=stage.spec.name, options=to_plain(stage.options))
    metrics = _work(stage, options.kernels, context, source, draft)
    return {
        "pass": stage.spec.name,
        "version": stage.spec.version,
        "options": to_plain(stage.options),
        "files": chain.inputs.digests_of(stage.options),
        "seed": options.seed,
        "dtype": options.dtype,
        "device": str(context.device),
        "threads": chain.threads,
        "processes": world.size,
        "bytes_sent": sum(world.together(world.sent - sent)),
        "kernels": _union(world.together(journal.ran)),
        "libraries": libraries(),
        "metrics": metrics,
        "seconds": round(journal.seconds, 3),
    }


def _work(stage: Stage, kernels: str, context: Context, source: Checkpoint, draft: Draft) -> Metrics:
    """Call the pass. Raises BoundError for a metric that is not finite."""
    from rewright.kernels import dispatch

    run = stage.spec.load()
    try:
        with dispatch.asked(kernels):
            metrics = run(context, stage.options, source, draft)
    except dispatch.KernelError as error:
        raise UsageError(error.message, hint=error.hint) from error
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise BoundError(f"`{name}` came out as {value}", hint="try `--dtype f32`, or check the source")
    return metrics


def _union(ran: Sequence[Mapping[str, list[str]]]) -> dict[str, list[str]]:
    """The implementations of each op that ran in any of the processes."""
    ops = sorted({op for own in ran for op in own})
    return {op: sorted({name for own in ran for name in own.get(op, ())}) for op in ops}


def _ran() -> dict[str, list[str]]:
    """For each op the implementations that have run."""
    from rewright.kernels import dispatch

    return {op: [name for name, count in counts.items() if count] for op, counts in dispatch.tally().items()}
