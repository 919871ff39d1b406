"""What a run finds before it begins: its source and key, what stands at its destination, what lies beside it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import SourceDigest, source_digest
from rewright.formats.errors import ConflictError, StorageError
from rewright.formats.provenance import read_stamp
from rewright.passes import bounds, calibration, keys
from rewright.passes.context import Reporter
from rewright.passes.errors import InputError, StaleError, UsageError
from rewright.passes.inputs import STDIN, Inputs, paths_of
from rewright.passes.machine import libraries, version
from rewright.passes.recipe import Stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import to_plain
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
class Survey:
    """What a run finds: its source, its key, what stands at the destination and what lies beside it."""

    source: Checkpoint
    inputs: Inputs
    digest: SourceDigest
    record: dict[str, Any]
    key: str
    stamp: dict[str, Any] | None
    work: Workspace


def checked(run: Run) -> Run:
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


def look(run: Run, reporter: Reporter, world: World | None = None) -> Survey:
    """Open the source and read it once for its digest; look at the destination. Raises the Refusal that applies."""
    publish.check_apart(run.src, run.dst)
    if os.path.ismount(run.dst):
        # a destination takes its name by one rename, and nothing is renamed onto a mount
        raise StorageError(f"`{run.dst}` is a mount point", hint="name a folder inside it")
    source = Checkpoint.open(run.src)
    stamp, work = stamp_at(run.dst), Workspace.beside(run.dst)
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
    return Survey(source, inputs, digest, record, keys.key_of(record), stamp, work)


def stamp_at(folder: Path) -> dict[str, Any] | None:
    """The stamp of what stands there, if it is ours and whole."""
    return read_stamp(folder) if folder.is_dir() else None


def _place(source: Checkpoint) -> str:
    """Stands for where a source is, without saying it: other models may have files of equal sizes and times."""
    return hashlib.sha256(os.fsencode(os.path.realpath(source.path))).hexdigest()


def source_facts(source: Checkpoint, digest: SourceDigest) -> dict[str, Any]:
    """What a stamp keeps of a source: by its place and files a later run need not read it again."""
    return {"place": _place(source), "digest": digest.digest, "files": digest.files}


def _known_files(record: Mapping[str, Any] | None, source: Checkpoint) -> dict[str, dict[str, Any]]:
    """What a stamp or a record of partial work knows of the files of the source that is at the same place."""
    facts = (record or {}).get("source")
    if not isinstance(facts, dict) or facts.get("place") != _place(source) or not isinstance(facts.get("files"), dict):
        return {}
    return {name: file for name, file in facts["files"].items() if isinstance(file, dict) and {"sha256"} <= file.keys()}


def state_of(run: Run, survey: Survey) -> str:
    """What there is to do: nothing (`up-to-date`), `resume`, begin (`fresh`), or replace (`stale`)."""
    if is_current(run, survey) and not run.options.force:
        return "up-to-date"
    if survey.work.continues(survey.key, run.options.force) and not survey.work.is_left_over(run.dst):
        return "resume"
    return "fresh" if _is_free(run.dst) else "stale"


def is_current(run: Run, survey: Survey) -> bool:
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


def _why_stale(run: Run, survey: Survey) -> str:
    if survey.stamp is None:
        return "nothing is there" if _is_free(run.dst) else "what is there is not Rewright's"
    return "; ".join(keys.differences(survey.stamp.get("run"), survey.record)) or "files are missing or changed"


def refuse_others(run: Run, survey: Survey, world: World) -> None:
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


def refuse_stale(run: Run, survey: Survey) -> None:
    """Raise StaleError when there is work to do, be it only scoring."""
    if not is_current(run, survey):
        raise StaleError(f"`{run.dst}` is not up to date: {_why_stale(run, survey)}")
    text = run.options.eval_text
    if text is not None and known_scores(survey.stamp, survey.inputs.digest(text)) is None:
        raise StaleError(f"`{run.dst}` has no scores on `{text}`")


def refuse_destination(run: Run, survey: Survey) -> None:
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


def refuse_changed_source(run: Run, survey: Survey) -> None:
    """Raise InputError when the source is no longer what the key was made of."""
    if source_digest(Checkpoint.open(run.src), survey.digest.files).digest != survey.digest.digest:
        raise InputError(f"`{run.src}` changed while it was read", hint="run again with `--force`")


def known_scores(stamp: Mapping[str, Any] | None, digest: str) -> dict[str, Any] | None:
    """The scores that a stamp holds on the text of this digest."""
    scores = (stamp or {}).get("evaluation")
    text = scores.get("text") if isinstance(scores, dict) else None
    return scores if isinstance(text, dict) and text.get("digest") == digest else None
