"""A run from source to published destination: keys, resume, stages, bounds."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import SourceDigest, source_digest
from rewright.formats.draft import Draft
from rewright.formats.errors import ConflictError, Refusal
from rewright.formats.files import write_file
from rewright.formats.provenance import STAMP, read_stamp
from rewright.passes import bounds, keys
from rewright.passes.context import Context, Reporter, RunOptions, find_device, usable_cpus
from rewright.passes.errors import InputError, StaleError
from rewright.passes.inputs import Inputs
from rewright.passes.journal import Journal
from rewright.passes.machine import libraries, set_threads, version
from rewright.passes.recipe import Stage
from rewright.passes.spec import Estimate, Layout, to_plain

RUN_RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a run is: where from, where to, which stages, how."""

    src: Path
    dst: Path
    stages: tuple[Stage, ...]
    options: RunOptions


@dataclass(frozen=True, slots=True)
class _Prepared:
    source: Checkpoint
    inputs: Inputs
    digest: SourceDigest
    record: dict[str, Any]
    key: str
    stamp: dict[str, Any] | None
    partial: dict[str, Any] | None


def layout_of(source: Checkpoint) -> Layout:
    """A checkpoint's headers as estimates want them."""
    tensors = {name: (entry.dtype, tuple(entry.shape)) for name, entry in source.entries.items()}
    return Layout(tensors, source.config or {})


def _prepare(run: Run) -> _Prepared:
    publish.check_apart(run.src, run.dst)
    source = Checkpoint.open(run.src)
    stamp = _stamp_at(run.dst)
    partial = _read_run_record(publish.partial_path(run.dst))
    inputs = Inputs()
    known = (partial or stamp or {}).get("source", {}).get("files")
    digest = source_digest(source, known)
    record = keys.record(run.stages, run.options, digest, inputs)
    return _Prepared(source, inputs, digest, record, keys.key_of(record), stamp, partial)


def _stamp_at(folder: Path) -> dict[str, Any] | None:
    return read_stamp(folder) if folder.is_dir() else None


def _read_run_record(partial: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((partial / RUN_RECORD).read_bytes())
        return record if isinstance(record, dict) else None
    return None


def _state(run: Run, prepared: _Prepared) -> str:
    if prepared.stamp and prepared.stamp.get("key") == prepared.key and _complete(run.dst, prepared.stamp):
        return "up-to-date"
    if prepared.partial and prepared.partial.get("key") == prepared.key:
        return "resume"
    return "stale" if run.dst.exists() else "fresh"


def _complete(dst: Path, stamp: dict[str, Any]) -> bool:
    """Whether every file the stamp lists is there at its size; `verify` reads the bytes too."""
    for name, facts in stamp.get("files", {}).items():
        try:
            if (dst / name).stat().st_size != facts["size"]:
                return False
        except OSError:
            return False
    return True


def plan(run: Run) -> dict[str, Any]:
    """What `execute` would do, from headers: the same document, with nothing done and nothing written."""
    from rewright.passes.rates import seconds_of

    prepared = _prepare(run)
    return _document(run, prepared, _state(run, prepared), seconds_of)


def _document(
    run: Run,
    prepared: _Prepared,
    state: str,
    seconds_of: Callable[[Estimate, RunOptions], float] | None = None,
) -> dict[str, Any]:
    stages: list[dict[str, Any]] = []
    layout = layout_of(prepared.source)
    for stage in run.stages:
        _check_wants(stage, prepared.source)
        guess = stage.spec.estimate(stage.options, layout)
        layout = guess.layout
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
                "seconds_estimated": seconds_of(guess, run.options) if seconds_of else None,
                "details": guess.details,
                "seconds": None,
                "metrics": None,
            }
        )
    return {
        "rewright": version(),
        "source": str(run.src),
        "destination": str(run.dst),
        "key": prepared.key,
        "state": state,
        "stages": stages,
        "evaluation": None,
        "seconds": None,
    }


def _check_wants(stage: Stage, source: Checkpoint) -> None:
    if "config" in stage.spec.wants and source.config is None:
        raise InputError(
            f"`{source.path}` has no `config.json`",
            hint=f"`{stage.spec.name}` needs the whole checkpoint directory",
        )


def execute(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Carry a run out and publish its result; returns the filled document.

    Nothing appears at the destination before everything is done. Raises a Refusal of the kind that applies;
    partial work stays beside the destination, and the same run continues it.
    """
    started = time.monotonic()
    bounds.check_words(run.options.require)
    prepared = _prepare(run)
    state = _state(run, prepared)
    if run.options.check and state != "up-to-date":
        raise StaleError(f"`{run.dst}` is not up to date: {_why_stale(run, prepared)}")
    if state == "up-to-date" and (run.options.check or not run.options.force):
        return _stand(run, prepared, reporter)
    document = _document(run, prepared, state)
    for warning in prepared.source.warnings:
        reporter.warn(warning)
    with publish.lock(run.dst):
        # another run may have finished while this one waited to look
        prepared = replace(prepared, stamp=_stamp_at(run.dst), partial=_read_run_record(publish.partial_path(run.dst)))
        if _state(run, prepared) == "up-to-date" and not run.options.force:
            return _stand(run, prepared, reporter)
        _refuse_destination(run, prepared)
        work = _open_partial(run, prepared, document)
        final = _stages(run, prepared, document, work, reporter)
        if run.options.eval_text is not None:
            document["evaluation"] = _evaluate(run, final, prepared.inputs, reporter)
            _restamp(final, document["evaluation"])
        bounds.hold(run.options.require, document)
        publish.publish(final, run.dst, replace=run.dst.exists())
        publish.discard(work)
    document["state"] = "done"
    document["seconds"] = round(time.monotonic() - started, 3)
    reporter.event("published", destination=str(run.dst), key=prepared.key)
    return document


def _stand(run: Run, prepared: _Prepared, reporter: Reporter) -> dict[str, Any]:
    """The destination is current: say so, hold it against the bounds, touch its stamp."""
    stamp = prepared.stamp or {}
    document = _document(run, prepared, "up-to-date")
    for shown, made in zip(document["stages"], stamp["stages"], strict=True):
        shown["metrics"], shown["seconds"] = made.get("metrics"), made.get("seconds")
    if run.options.eval_text is not None:
        known = stamp.get("evaluation")
        if known and known["text"]["digest"] == prepared.inputs.digest(run.options.eval_text):
            document["evaluation"] = known
        else:
            document["evaluation"] = _evaluate(run, run.dst, prepared.inputs, reporter)
    bounds.hold(run.options.require, document)
    if not run.options.check:
        os.utime(run.dst / STAMP)
        if prepared.partial and prepared.partial.get("key") == prepared.key:
            publish.discard(publish.partial_path(run.dst))
    reporter.info(f"`{run.dst}` is up to date")
    return document


def _why_stale(run: Run, prepared: _Prepared) -> str:
    if prepared.stamp is None:
        return "nothing of Rewright's is there"
    differing = keys.differences(prepared.stamp.get("run", {}), prepared.record)
    return "; ".join(differing) or "files are missing or changed"


def _refuse_destination(run: Run, prepared: _Prepared) -> None:
    """What stands at the destination or beside it, and may not be replaced. Raises ConflictError."""
    dst, options = run.dst, run.options
    if dst.exists() and prepared.stamp is None and not (dst.is_dir() and not any(dst.iterdir())):
        raise ConflictError(f"`{dst}` exists and is not Rewright's", hint="choose another destination")
    if prepared.stamp is not None and not (options.force or options.update):
        raise ConflictError(
            f"`{dst}` exists and differs: {_why_stale(run, prepared)}",
            hint="add `--update` to replace it, or choose another destination",
        )
    if prepared.partial is not None and not options.force and prepared.partial.get("key") != prepared.key:
        differing = keys.differences(prepared.partial.get("run", {}), prepared.record)
        raise ConflictError(
            f"partial work at `{publish.partial_path(dst)}` is from another run: {'; '.join(differing)}",
            hint="repeat that run to finish it, or add `--force` to drop it",
        )


def _open_partial(run: Run, prepared: _Prepared, document: dict[str, Any]) -> Path:
    """The folder of partial work, continued or new; a new one is begun when there is room for what it will hold."""
    work = publish.partial_path(run.dst)
    if prepared.partial is not None and prepared.partial.get("key") == prepared.key and not run.options.force:
        return work
    publish.discard(work)
    publish.ensure_room(run.dst, max(stage["output_bytes"] for stage in document["stages"]))
    record = {
        "key": prepared.key,
        "run": prepared.record,
        "threads": run.options.threads or usable_cpus(),
        "source": {"files": prepared.digest.files},
    }
    write_file(work / RUN_RECORD, json.dumps(record, indent=1).encode())
    return work


def _stages(run: Run, prepared: _Prepared, document: dict[str, Any], work: Path, reporter: Reporter) -> Path:
    threads = (_read_run_record(work) or {}).get("threads") or usable_cpus()
    source, previous = prepared.source, None
    made: list[dict[str, Any]] = []
    folder = work
    for number, stage in enumerate(run.stages, start=1):
        folder = work / f"{number}-{stage.spec.name}"
        stamp = _stamp_at(folder)
        if stamp is None:
            with _named(number, stage, len(run.stages)):
                draft = Draft(folder)
                made.append(_one_stage(run, prepared, stage, source, draft, threads, reporter))
                draft.seal(_stamp(prepared, made))
        else:
            made = stamp["stages"]
        document["stages"][number - 1].update(metrics=made[-1]["metrics"], seconds=made[-1]["seconds"])
        if previous is not None:
            publish.discard(previous)
        source, previous = Checkpoint.open(folder), folder
    return folder


@contextlib.contextmanager
def _named(number: int, stage: Stage, count: int) -> Iterator[None]:
    """In a chain a refusal says which stage it comes from."""
    try:
        yield
    except Refusal as refusal:
        if count > 1 and not refusal.message.startswith("stage "):
            refusal.message = f"stage {number} ({stage.spec.name}): {refusal.message}"
            refusal.args = (refusal.message,)
        raise


def _one_stage(
    run: Run,
    prepared: _Prepared,
    stage: Stage,
    source: Checkpoint,
    draft: Draft,
    threads: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Run one pass into its draft; returns its record for the stamp."""
    from rewright.kernels import dispatch

    started = time.monotonic()
    scratch = draft.path.with_name(draft.path.name + ".work")
    scratch.mkdir(exist_ok=True)
    set_threads(threads)
    context = Context(
        seed=run.options.seed,
        device=find_device(run.options.device),
        dtype=run.options.dtype,
        threads=threads,
        reporter=reporter,
        journal=Journal(scratch / "journal.jsonl"),
        inputs=prepared.inputs,
        work=scratch,
    )
    reporter.event("stage", name=stage.spec.name, options=to_plain(stage.options))
    dispatch.reset_tally()
    work: Callable[..., dict[str, Any]] = stage.spec.load()
    # `auto` leaves the choice to the environment
    forced = run.options.kernels != "auto"
    with dispatch.use(run.options.kernels) if forced else contextlib.nullcontext():
        metrics = work(context, stage.options, source, draft)
    publish.discard(scratch)
    return {
        "pass": stage.spec.name,
        "version": stage.spec.version,
        "options": to_plain(stage.options),
        "files": prepared.inputs.digests_of(stage.options),
        "seed": run.options.seed,
        "dtype": run.options.dtype,
        "device": str(context.device),
        "threads": threads,
        "kernels": dispatch.tally(),
        "libraries": libraries(),
        "metrics": metrics,
        "seconds": round(time.monotonic() - started, 3),
    }


def _stamp(prepared: _Prepared, made: list[dict[str, Any]]) -> dict[str, Any]:
    source = {
        "name": prepared.source.path.name,
        "digest": prepared.digest.digest,
        "files": prepared.digest.files,
        "stages": (prepared.source.stamp or {}).get("stages", []),
    }
    return {
        "rewright": version(),
        "schema": 1,
        "key": prepared.key,
        "run": prepared.record,
        "source": source,
        "stages": made,
    }


def _evaluate(run: Run, result: Path, inputs: Inputs, reporter: Reporter) -> dict[str, Any]:
    from rewright.passes.evaluate import evaluate

    return evaluate(
        result,
        text=run.options.eval_text,
        compare=run.src,
        device=run.options.device,
        dtype=run.options.dtype,
        threads=run.options.threads,
        reporter=reporter,
        inputs=inputs,
    )


def _restamp(folder: Path, evaluation: dict[str, Any]) -> None:
    """Add the scores to a sealed stage, so that a second run need not take them again."""
    stamp = read_stamp(folder)
    assert stamp is not None
    stamp["evaluation"] = evaluation
    write_file(folder / STAMP, json.dumps(stamp, indent=1).encode() + b"\n")
