"""A run from source to published destination: what stands there already, the work, the bounds, the publishing."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.errors import ConflictError, StorageError
from rewright.formats.provenance import STAMP, read_stamp
from rewright.formats.seal import write_stamp
from rewright.passes import bounds
from rewright.passes.context import Reporter, Silent
from rewright.passes.document import draw_up, fill, room
from rewright.passes.errors import BoundError, InputError, StaleError, UsageError
from rewright.passes.machine import find_device, usable_cpus, version
from rewright.passes.stages import Chain, carry_out
from rewright.passes.survey import (
    Run,
    Survey,
    checked,
    is_current,
    known_scores,
    look,
    refuse_changed_source,
    refuse_destination,
    refuse_others,
    refuse_stale,
    source_facts,
    stamp_at,
    state_of,
)
from rewright.passes.workspace import Workspace
from rewright.passes.world import World


def plan(run: Run) -> dict[str, Any]:
    """What `execute` would do, from headers: the same document, with nothing done and nothing written.

    Refuses what `execute` would refuse before its work: what stands at the destination, a disk that is too small.
    """
    from rewright.passes.rates import timed

    run = checked(run)
    survey = look(run, Silent())
    document = draw_up(run, survey, state_of(run, survey), timed)
    if run.options.force or not is_current(run, survey):
        refuse_destination(run, survey)
        if document["state"] != "resume":
            publish.ensure_room(survey.work.path, room(document))
    return document


def execute(run: Run, reporter: Reporter, world: World | None = None) -> dict[str, Any]:
    """Carry a run out and publish its result; returns the filled document.

    Every process of `world` calls this, and the first of them speaks and publishes. Nothing appears at the destination
    before everything is done. Raises a Refusal of the kind that applies; partial work stays beside the destination, and
    the same run continues it. With `check` only StaleError tells that there is work to do.
    """
    started = time.monotonic()
    run, world = checked(run), world or World()
    reporter = reporter if world.leads else Silent()
    survey = look(run, reporter, world)
    refuse_others(run, survey, world)
    document = draw_up(run, survey, state_of(run, survey))
    try:
        state = _carry_out(run, survey, document, reporter, world)
    except (BoundError, StaleError) as refusal:
        # who asked for a document gets it with the figures that missed
        refusal.document = {**document, "seconds": round(time.monotonic() - started, 3)}
        raise
    return {**document, "state": state, "seconds": round(time.monotonic() - started, 3)}


def _carry_out(run: Run, survey: Survey, document: dict[str, Any], reporter: Reporter, world: World) -> str:
    """Bring the destination up to date, filling the document; returns the state it is in then."""

    def wanted() -> bool:
        return run.options.force or not is_current(run, survey)

    if run.options.check:
        world.lead(lambda: refuse_stale(run, survey))
    elif world.lead(wanted):
        with publish.lock(run.dst) if world.leads else nullcontext():
            # another run may have finished while this one looked around
            survey = replace(survey, stamp=stamp_at(run.dst), work=Workspace.beside(run.dst))
            if world.lead(wanted):
                _build(run, survey, document, reporter, world)
                reporter.event("published", destination=str(run.dst), key=survey.key)
                return "done"
    _stand(run, survey, document, reporter, world)
    reporter.info(f"`{run.dst}` is up to date")
    reporter.event("up-to-date", destination=str(run.dst), key=survey.key)
    return "up-to-date"


def _stand(run: Run, survey: Survey, document: dict[str, Any], reporter: Reporter, world: World) -> None:
    """The destination is current: fill the document from its stamp, hold it to the bounds, touch it."""
    assert survey.stamp is not None
    fill(document, survey.stamp["stages"])
    source = survey.stamp.get("source")
    learnt = source_facts(survey.source, survey.digest)
    stamp = {**survey.stamp, "source": {**source, **learnt} if isinstance(source, dict) else learnt}
    if run.options.eval_text is not None:
        threads = run.options.threads or usable_cpus()
        stamp["evaluation"] = document["evaluation"] = _scores(run, survey, run.dst, threads, reporter, world)
    bounds.hold(run.options.require, document, missed=f"`{run.dst}` stays as it is")
    if not run.options.check and world.leads:
        _touch(run.dst, survey, stamp, reporter)


def _touch(dst: Path, survey: Survey, stamp: dict[str, Any], reporter: Reporter) -> None:
    """Give the stamp of a current destination the time of day, and what was learnt since; delete what a kill left.

    What cannot be done is no error: the destination is current all the same, be it on a read-only disk.
    """
    try:
        if stamp != survey.stamp or survey.work.is_left_over(dst):
            with publish.lock(dst):
                if stamp_at(dst) == survey.stamp:
                    write_stamp(dst, stamp)
                if survey.work.is_left_over(dst):
                    survey.work.drop()
        os.utime(dst / STAMP)
    except (OSError, ConflictError, StorageError) as error:
        reporter.warn(f"the stamp was not touched: {error}")


def _build(run: Run, survey: Survey, document: dict[str, Any], reporter: Reporter, world: World) -> None:
    """Do the work, fill the document and publish the result; the caller holds the lock."""

    def begin() -> tuple[bool, dict[str, Any] | None]:
        refuse_destination(run, survey)
        for warning in survey.source.warnings:
            reporter.warn(warning)
        find_device(run.options.device, world)
        resumes = state_of(run, survey) == "resume"
        reporter.debug(f"partial work at `{survey.work.path}` is {'taken up' if resumes else 'begun'}")
        return resumes, (_continue(run, survey, reporter) if resumes else _begin(run, survey, document)).record

    resumes, record = world.lead(begin)
    work = Workspace(survey.work.path, record)
    source = {
        "name": survey.source.path.name,
        **source_facts(survey.source, survey.digest),
        "stages": (survey.source.stamp or {}).get("stages", []),
    }
    chain = Chain(
        origin=survey.source,
        stages=run.stages,
        options=run.options,
        inputs=survey.inputs,
        threads=work.threads,
        workspace=work,
        head={"rewright": version(), "schema": 1, "key": survey.key, "run": survey.record, "source": source},
        reporter=reporter,
        world=world,
    )
    try:
        final, made = carry_out(chain)
    except (UsageError, InputError, BoundError):
        # the same run would end the same way, and one with other options must not find this work in its way
        if world.leads and not resumes and not work.finished([stage.spec.name for stage in run.stages])[0]:
            work.drop()
        raise
    fill(document, made)
    world.lead(lambda: refuse_changed_source(run, survey))
    if run.options.eval_text is not None:
        document["evaluation"] = _scores(run, survey, final, work.threads, reporter, world)
    kept = "nothing was published; the work is kept, and the same run with another bound goes on from it"

    def finish() -> None:
        scores, stamp = document["evaluation"], read_stamp(final) or {}
        if scores is not None and stamp.get("evaluation") != scores:
            write_stamp(final, {**stamp, "evaluation": scores})
        bounds.hold(run.options.require, document, missed=kept)
        refuse_destination(run, replace(survey, stamp=stamp_at(run.dst), work=work))
        work.publish(final, run.dst, replace=os.path.lexists(run.dst))

    world.lead(finish)


def _continue(run: Run, survey: Survey, reporter: Reporter) -> Workspace:
    """The partial work as it stands, with the number of threads it was begun with."""
    work = survey.work
    if run.options.threads not in (None, work.threads):
        reporter.warn(f"going on with {work.threads} threads, as the run was begun: another number rounds otherwise")
    return work


def _begin(run: Run, survey: Survey, document: dict[str, Any]) -> Workspace:
    """A new folder of partial work, if there is room for what it will hold. Raises StorageError."""
    survey.work.drop()
    publish.ensure_room(survey.work.path, room(document))
    return survey.work.begin(
        {
            "key": survey.key,
            "run": survey.record,
            "forced": run.options.force,
            "threads": run.options.threads or usable_cpus(),
            "source": source_facts(survey.source, survey.digest),
        }
    )


def _scores(run: Run, survey: Survey, result: Path, threads: int, reporter: Reporter, world: World) -> dict[str, Any]:
    """The result's scores on `--eval-text` beside the source's: those in its stamp, or newly taken."""
    text = run.options.eval_text
    assert text is not None
    known = world.lead(lambda: known_scores(stamp_at(result), survey.inputs.digest(text)))
    if known is not None:
        return known
    from rewright.passes.evaluate import evaluate

    return evaluate(
        result,
        text=text,
        compare=run.src,
        device=run.options.device,
        dtype=run.options.dtype,
        threads=threads,
        reporter=reporter,
        inputs=survey.inputs,
        world=world,
    )
