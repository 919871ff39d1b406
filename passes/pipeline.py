"""A run from source to published destination: what stands there already, the work, the bounds, the publishing."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import SourceDigest, source_digest
from rewright.formats.errors import ConflictError, StorageError
from rewright.formats.provenance import STAMP, history, read_stamp
from rewright.formats.seal import write_stamp
from rewright.passes import bounds, calibration, keys
from rewright.passes.context import Reporter, RunOptions, Silent, find_device, usable_cpus
from rewright.passes.errors import BoundError, InputError, StaleError, UsageError
from rewright.passes.inputs import STDIN, Inputs, paths_of
from rewright.passes.machine import libraries, version
from rewright.passes.recipe import Stage
from rewright.passes.spec import Estimate, Layout, to_plain
from rewright.passes.stages import Chain, carry_out, named
from rewright.passes.workspace import Workspace
from rewright.passes.world import World

# Run options in which the processes of a run may differ: what they say, and where they compute.
_OF_ONE_PROCESS = ("device", "events", "json", "quiet", "verbose", "threads")


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run is: where from, where to, which stages, how."""

    src: Path
    dst: Path
    stages: tuple[Stage, ...]
    options: RunOptions


@dataclass(frozen=True, slots=True)
class _Survey:
    """What a run finds: its source, its key, what stands at the destination and what lies beside it."""

    source: Checkpoint
    inputs: Inputs
    digest: SourceDigest
    record: dict[str, Any]
    key: str
    stamp: dict[str, Any] | None
    work: Workspace


def plan(run: Run) -> dict[str, Any]:
    """What `execute` would do, from headers: the same document, with nothing done and nothing written.

    Refuses what `execute` would refuse before its work: what stands at the destination, a disk that is too small.
    """
    from rewright.passes.rates import timed

    run = _checked(run)
    survey = _survey(run, Silent())
    document = _document(run, survey, _state(run, survey), timed)
    if run.options.force or not _is_current(run, survey):
        _refuse_destination(run, survey)
        if document["state"] != "resume":
            publish.ensure_room(survey.work.path, _room(document))
    return document


def execute(run: Run, reporter: Reporter, world: World | None = None) -> dict[str, Any]:
    """Carry a run out and publish its result; returns the filled document.

    Every process of `world` calls this, and the first of them speaks and publishes. Nothing appears at the destination
    before everything is done. Raises a Refusal of the kind that applies; partial work stays beside the destination, and
    the same run continues it. With `check` only StaleError tells that there is work to do.
    """
    started = time.monotonic()
    run, world = _checked(run), world or World()
    reporter = reporter if world.leads else Silent()
    survey = _survey(run, reporter, world)
    _refuse_others(run, survey, world)
    document = _document(run, survey, _state(run, survey))
    try:
        state = _carry_out(run, survey, document, reporter, world)
    except (BoundError, StaleError) as refusal:
        # who asked for a document gets it with the figures that missed
        refusal.document = {**document, "seconds": round(time.monotonic() - started, 3)}
        raise
    return {**document, "state": state, "seconds": round(time.monotonic() - started, 3)}


def _carry_out(run: Run, survey: _Survey, document: dict[str, Any], reporter: Reporter, world: World) -> str:
    """Bring the destination up to date, filling the document; returns the state it is in then."""

    def wanted() -> bool:
        return run.options.force or not _is_current(run, survey)

    if run.options.check:
        world.lead(lambda: _refuse_stale(run, survey))
    elif world.lead(wanted):
        with publish.lock(run.dst) if world.leads else nullcontext():
            # another run may have finished while this one looked around
            survey = replace(survey, stamp=_stamp_at(run.dst), work=Workspace.beside(run.dst))
            if world.lead(wanted):
                _build(run, survey, document, reporter, world)
                reporter.event("published", destination=str(run.dst), key=survey.key)
                return "done"
    _stand(run, survey, document, reporter, world)
    reporter.info(f"`{run.dst}` is up to date")
    reporter.event("up-to-date", destination=str(run.dst), key=survey.key)
    return "up-to-date"


def _checked(run: Run) -> Run:
    """Refuse what can be refused from the words alone; one spelling of the destination for every later look at it."""
    bounds.check_words(run.options.require, run.stages, scored=run.options.eval_text is not None)
    inputs = [run.options.eval_text, *(path for stage in run.stages for path in paths_of(stage.options))]
    if inputs.count(STDIN) > 1:
        raise UsageError("two options read standard input", hint="keep one of them in a file")
    return replace(run, dst=Path(os.path.realpath(run.dst))) if ".." in run.dst.parts else run


def _check_text(run: Run, source: Checkpoint, inputs: Inputs) -> None:
    """Raise InputError when there would be nothing to score at the end."""
    text = run.options.eval_text
    if text is None:
        return
    if not calibration.read_documents(text, inputs):
        raise InputError(f"`{text}` has no document to score")
    if not calibration.has_tokenizer(source):
        raise InputError(f"`{source.path}` has no tokenizer, and `--eval-text` needs one")


def _refuse_others(run: Run, survey: _Survey, world: World) -> None:
    """Raise ConflictError where the processes of a run are not at the same work."""
    options = {name: str(value) for name, value in to_plain(run.options).items() if name not in _OF_ONE_PROCESS}
    said = {"key": survey.key, "run": survey.record, "libraries": libraries(), "rewright": version(), **options}
    first, *others = world.together(said)
    for rank, other in enumerate(others, start=1):
        differing = keys.differences(first["run"], other["run"])
        differing += [
            f"{name} {first[name]} and {other[name]}"
            for name in first
            if name not in ("key", "run") and first[name] != other[name]
        ]
        if differing or first["key"] != other["key"]:
            raise ConflictError(
                f"process {rank} is not at the work of process 0: {'; '.join(differing)}",
                hint="start every process with the same command, version and source",
            )


def _survey(run: Run, reporter: Reporter, world: World | None = None) -> _Survey:
    publish.check_apart(run.src, run.dst)
    if os.path.ismount(run.dst):
        # a destination takes its name by one rename, and nothing is renamed onto a mount
        raise StorageError(f"`{run.dst}` is a mount point", hint="name a folder inside it")
    source = Checkpoint.open(run.src)
    stamp, work = _stamp_at(run.dst), Workspace.beside(run.dst)
    known = {} if run.options.force else {**_known_files(stamp, source), **_known_files(work.record, source)}

    def read(known: Mapping[str, Mapping[str, Any]]) -> SourceDigest:
        with reporter.progress("read the source, MB", source.total_bytes / 1e6) as bar:
            return source_digest(source, known, lambda count: bar.advance(count / 1e6))

    if world is not None and world.size > 1:
        # whoever sees the same files, by sizes and times, need not read them again
        known = world.lead(lambda: read(known).files)
    digest = read(known)
    inputs = Inputs()
    _check_text(run, source, inputs)
    record = keys.record(run.stages, run.options, digest, inputs)
    reporter.debug(f"key {keys.key_of(record)}")
    return _Survey(source, inputs, digest, record, keys.key_of(record), stamp, work)


def _stamp_at(folder: Path) -> dict[str, Any] | None:
    return read_stamp(folder) if folder.is_dir() else None


def _place(source: Checkpoint) -> str:
    """Stands for where a source is, without saying it: other models may have files of equal sizes and times."""
    return hashlib.sha256(os.fsencode(os.path.realpath(source.path))).hexdigest()


def _source_facts(source: Checkpoint, digest: SourceDigest) -> dict[str, Any]:
    return {"place": _place(source), "digest": digest.digest, "files": digest.files}


def _known_files(record: Mapping[str, Any] | None, source: Checkpoint) -> dict[str, dict[str, Any]]:
    """What a stamp or a record of partial work knows of the files of the source that is at the same place."""
    facts = (record or {}).get("source")
    if not isinstance(facts, dict) or facts.get("place") != _place(source) or not isinstance(facts.get("files"), dict):
        return {}
    return {name: file for name, file in facts["files"].items() if isinstance(file, dict) and {"sha256"} <= file.keys()}


def _state(run: Run, survey: _Survey) -> str:
    if _is_current(run, survey) and not run.options.force:
        return "up-to-date"
    if survey.work.continues(survey.key, run.options.force) and not survey.work.is_left_over(run.dst):
        return "resume"
    return "fresh" if _is_free(run.dst) else "stale"


def _is_current(run: Run, survey: _Survey) -> bool:
    """Whether the destination is what this run would make, with every file at its size; `verify` reads the bytes."""
    stamp = survey.stamp
    if stamp is None or stamp.get("key") != survey.key:
        return False
    try:
        whole = all((run.dst / name).stat().st_size == facts["size"] for name, facts in stamp["files"].items())
        return whole and [made["pass"] for made in stamp["stages"]] == [stage.spec.name for stage in run.stages]
    except (OSError, KeyError, TypeError, AttributeError):
        return False


def _is_free(dst: Path) -> bool:
    return not os.path.lexists(dst) or (dst.is_dir() and not any(dst.iterdir()))


def _document(
    run: Run,
    survey: _Survey,
    state: str,
    timed: Callable[[Estimate, RunOptions], tuple[float, dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """The document of a run with nothing done yet. Raises what the passes refuse at the sight of the headers."""
    stages: list[dict[str, Any]] = []
    tensors = {name: (entry.dtype, tuple(entry.shape)) for name, entry in survey.source.entries.items()}
    layout = Layout(tensors, survey.source.config or {}, history(survey.source.stamp))
    for number, stage in enumerate(run.stages, start=1):
        with named(number, run.stages):
            _check_wants(stage, survey.source)
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


def _fill(document: dict[str, Any], made: list[dict[str, Any]]) -> None:
    for shown, record in zip(document["stages"], made, strict=True):
        shown["metrics"], shown["seconds"] = record.get("metrics"), record.get("seconds")


def _check_wants(stage: Stage, source: Checkpoint) -> None:
    if "config" in stage.spec.wants and source.config is None:
        raise InputError(
            f"`{source.path}` has no `config.json`",
            hint=f"`{stage.spec.name}` needs the whole checkpoint directory",
        )


def _refuse_stale(run: Run, survey: _Survey) -> None:
    """Raise StaleError when there is work to do, be it only scoring."""
    if not _is_current(run, survey):
        raise StaleError(f"`{run.dst}` is not up to date: {_why_stale(run, survey)}")
    text = run.options.eval_text
    if text is not None and _known_scores(survey.stamp, survey.inputs.digest(text)) is None:
        raise StaleError(f"`{run.dst}` has no scores on `{text}`")


def _why_stale(run: Run, survey: _Survey) -> str:
    if survey.stamp is None:
        return "nothing is there" if _is_free(run.dst) else "what is there is not Rewright's"
    return "; ".join(keys.differences(survey.stamp.get("run"), survey.record)) or "files are missing or changed"


def _stand(run: Run, survey: _Survey, document: dict[str, Any], reporter: Reporter, world: World) -> None:
    """The destination is current: fill the document from its stamp, hold it to the bounds, touch it."""
    assert survey.stamp is not None
    _fill(document, survey.stamp["stages"])
    source = survey.stamp.get("source")
    learnt = _source_facts(survey.source, survey.digest)
    stamp = {**survey.stamp, "source": {**source, **learnt} if isinstance(source, dict) else learnt}
    if run.options.eval_text is not None:
        threads = run.options.threads or usable_cpus()
        stamp["evaluation"] = document["evaluation"] = _scores(run, survey, run.dst, threads, reporter, world)
    bounds.hold(run.options.require, document, missed=f"`{run.dst}` stays as it is")
    if not run.options.check and world.leads:
        _touch(run.dst, survey, stamp, reporter)


def _touch(dst: Path, survey: _Survey, stamp: dict[str, Any], reporter: Reporter) -> None:
    """Give the stamp of a current destination the time of day, and what was learnt since; delete what a kill left.

    What cannot be done is no error: the destination is current all the same, be it on a read-only disk.
    """
    try:
        if stamp != survey.stamp or survey.work.is_left_over(dst):
            with publish.lock(dst):
                if _stamp_at(dst) == survey.stamp:
                    write_stamp(dst, stamp)
                if survey.work.is_left_over(dst):
                    survey.work.drop()
        os.utime(dst / STAMP)
    except (OSError, ConflictError, StorageError) as error:
        reporter.warn(f"the stamp was not touched: {error}")


def _build(run: Run, survey: _Survey, document: dict[str, Any], reporter: Reporter, world: World) -> None:
    """Do the work, fill the document and publish the result; the caller holds the lock."""

    def begin() -> tuple[bool, dict[str, Any] | None]:
        _refuse_destination(run, survey)
        for warning in survey.source.warnings:
            reporter.warn(warning)
        find_device(run.options.device)
        resumes = _state(run, survey) == "resume"
        reporter.debug(f"partial work at `{survey.work.path}` is {'taken up' if resumes else 'begun'}")
        return resumes, (_continue(run, survey, reporter) if resumes else _begin(run, survey, document)).record

    resumes, record = world.lead(begin)
    work = Workspace(survey.work.path, record)
    source = {
        "name": survey.source.path.name,
        **_source_facts(survey.source, survey.digest),
        "stages": (survey.source.stamp or {}).get("stages", []),
    }
    chain = Chain(
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
        final, made = carry_out(chain, survey.source)
    except (UsageError, InputError, BoundError):
        # the same run would end the same way, and one with other options must not find this work in its way
        if world.leads and not resumes and not work.finished([stage.spec.name for stage in run.stages])[0]:
            work.drop()
        raise
    _fill(document, made)
    world.lead(lambda: _refuse_changed_source(run, survey))
    if run.options.eval_text is not None:
        document["evaluation"] = _scores(run, survey, final, work.threads, reporter, world)
    kept = "nothing was published; the work is kept, and the same run with another bound goes on from it"

    def finish() -> None:
        scores, stamp = document["evaluation"], read_stamp(final) or {}
        if scores is not None and stamp.get("evaluation") != scores:
            write_stamp(final, {**stamp, "evaluation": scores})
        bounds.hold(run.options.require, document, missed=kept)
        _refuse_destination(run, replace(survey, stamp=_stamp_at(run.dst), work=work))
        work.publish(final, run.dst, replace=os.path.lexists(run.dst))

    world.lead(finish)


def _refuse_destination(run: Run, survey: _Survey) -> None:
    """What stands at the destination or beside it, and may not be replaced. Raises ConflictError."""
    dst, options = run.dst, run.options
    if survey.stamp is None and not _is_free(dst):
        raise ConflictError(f"`{dst}` exists and is not Rewright's", hint="choose another destination")
    if survey.stamp is not None and not (options.force or options.update):
        raise ConflictError(
            f"`{dst}` exists and differs: {_why_stale(run, survey)}",
            hint="add `--update` to replace it, or choose another destination",
        )
    work = survey.work
    others = work.holds_work() and not work.continues(survey.key, options.force)
    if others and not options.force and not work.is_left_over(dst):
        work.refuse_other(survey.record)


def _continue(run: Run, survey: _Survey, reporter: Reporter) -> Workspace:
    """The partial work as it stands, with the number of threads it was begun with."""
    work = survey.work
    if run.options.threads not in (None, work.threads):
        reporter.warn(f"going on with {work.threads} threads, as the run was begun: another number rounds otherwise")
    return work


def _begin(run: Run, survey: _Survey, document: dict[str, Any]) -> Workspace:
    """A new folder of partial work, if there is room for what it will hold. Raises StorageError."""
    survey.work.drop()
    publish.ensure_room(survey.work.path, _room(document))
    return survey.work.begin(
        {
            "key": survey.key,
            "run": survey.record,
            "forced": run.options.force,
            "threads": run.options.threads or usable_cpus(),
            "source": _source_facts(survey.source, survey.digest),
        }
    )


def _room(document: dict[str, Any]) -> int:
    """The most bytes that the stages hold at once: a stage's input stays until the stage is done."""
    sizes = [stage["output_bytes"] for stage in document["stages"]]
    return max(map(sum, zip([0, *sizes], sizes, strict=False)))


def _refuse_changed_source(run: Run, survey: _Survey) -> None:
    """Raise InputError when the source is no longer what the key was made of."""
    if source_digest(Checkpoint.open(run.src), survey.digest.files).digest != survey.digest.digest:
        raise InputError(f"`{run.src}` changed while it was read", hint="run again with `--force`")


def _known_scores(stamp: Mapping[str, Any] | None, digest: str) -> dict[str, Any] | None:
    """The scores that a stamp holds on the text of this digest."""
    scores = (stamp or {}).get("evaluation")
    text = scores.get("text") if isinstance(scores, dict) else None
    return scores if isinstance(text, dict) and text.get("digest") == digest else None


def _scores(run: Run, survey: _Survey, result: Path, threads: int, reporter: Reporter, world: World) -> dict[str, Any]:
    """The result's scores on `--eval-text` beside the source's: those in its stamp, or newly taken."""
    text = run.options.eval_text
    assert text is not None
    known = world.lead(lambda: _known_scores(_stamp_at(result), survey.inputs.digest(text)))
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
