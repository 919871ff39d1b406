"""`chain`, `run` and one command per pass: three spellings of the same thing, with one body."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewright.cli import console, usage
from rewright.cli.build import command, completer, metavar, parser
from rewright.cli.describe import describe
from rewright.formats.errors import reason
from rewright.passes import registry, world
from rewright.passes.errors import BoundError, InputError, StaleError, UsageError
from rewright.passes.inputs import paths_of
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Spec, fields_of

if TYPE_CHECKING:
    from rewright.passes.recipe import Stage

Source = Annotated[Path, typer.Argument(metavar="SRC", help="checkpoint to read: a folder or one .safetensors file")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="folder to write; it appears when it is complete")]


def perform(src: Path, dst: Path, stages: tuple[Stage, ...], run: RunOptions) -> None:
    """Run the stages, or with `--dry-run` only say what they would take. Stdout is silent but for `--json`."""
    from rewright.passes import pipeline
    from rewright.passes.survey import Run

    talk = console.current()
    if run.events is not None:
        _refuse_events(run.events, src, dst)
    shared = world.current()
    talk.configure(
        quiet=run.quiet or not shared.leads, verbose=run.verbose, events=run.events if shared.leads else None
    )
    job = Run(src=src, dst=dst, stages=stages, options=run)
    try:
        document = shared.lead(lambda: pipeline.plan(job)) if run.dry_run else pipeline.execute(job, talk, shared)
    except (BoundError, StaleError) as refusal:
        if run.json and refusal.document is not None:
            console.write_json(refusal.document)
        raise
    if run.json:
        console.write_json(document)
    else:
        for line in describe(document, dry=run.dry_run):
            talk.info(line)


def _refuse_events(events: Path, src: Path, dst: Path) -> None:
    """Raise UsageError for an events file that would be written over something else."""
    place = Path(os.path.realpath(events))
    for folder in (src, dst):
        root = Path(os.path.realpath(folder))
        if place == root or root in place.parents:
            raise UsageError(f"`--events {events}` is inside `{folder}`", hint="write events elsewhere")
    if place.is_file():
        with place.open("rb") as file:
            if file.read(8) not in (b"", b'{"time":'):
                raise UsageError(f"`--events {events}` exists and holds something else", hint="name another file")


def split(words: Sequence[str]) -> list[list[str]]:
    """The stages of a chain: runs of words between `+`. Raises UsageError for an empty stage."""
    stages: list[list[str]] = [[]]
    for word in words:
        if word == "+":
            stages.append([])
        else:
            stages[-1].append(word)
    for number, stage in enumerate(stages, start=1):
        if not stage:
            raise UsageError(
                f"stage {number} of the chain is empty", hint="a chain is `PASS [OPTIONS] + PASS [OPTIONS] ...`"
            )
    return stages


def stage_of(number: int, words: Sequence[str], prog: str = "rewright chain SRC DST") -> Stage | None:
    """One stage from its words; None after it printed its help. Raises UsageError naming stage and word."""
    from rewright.passes.recipe import Stage

    name, *rest = words
    if name.startswith("-"):
        raise UsageError(f"stage {number} starts with `{name}`, which is no pass", hint=_place(name, None))
    try:
        spec = registry.get(name)
    except UsageError as error:
        raise UsageError(f"stage {number}: {error.message}", hint=error.hint) from None
    flags = [flag for item in fields_of(spec.options) for flag in (f"--{item.flag}",)]
    app = parser(name, spec.options, _pass_doc(spec))
    try:
        options = usage.parse(app, rest, prog=f"{prog} {name}", known=flags)
    except UsageError as error:
        hint = _place(error.message, rest) or error.hint
        raise UsageError(f"stage {number} ({name}): {error.message}", hint=hint) from None
    return None if isinstance(options, int) else Stage(spec, options)


def _place(message: str, rest: Sequence[str] | None) -> str | None:
    """The hint for a word that is known, but not where it stands."""
    for item in fields_of(RunOptions):
        spellings = {f"--{item.flag}", f"-{item.opt.short}" if item.opt.short else f"--{item.flag}"}
        if rest is None and message.partition("=")[0] in spellings:
            return f"`{message}` is a run option: put it before SRC"
        for spelling in sorted(spellings):
            if f"no option `{spelling}`" in message:
                return f"`{spelling}` is a run option: put it before SRC"
    if rest is not None and "unexpected word" in message and any(word in registry.SPECS for word in rest):
        return "put `+` between two passes"
    return None


def _pass_doc(spec: Spec) -> str:
    known = fields_of(spec.options)
    words = [f"--{item.flag} {item.choices[-1] if item.choices else metavar(item)}" for item in known if item.required]
    words += [f"--{item.flag} text.txt" for item in known if item.name in ("calibration_text", "text")]
    example = " ".join(["rewright", spec.name, "model", "out", *words])
    return f"{spec.summary[:1].upper()}{spec.summary[1:]}.\n\nExample: {example}\n\nPaper: {spec.paper}"


def chain(
    src: Source,
    dst: Target,
    stages: Annotated[
        list[str],
        typer.Argument(
            metavar="STAGE",
            help="passes with their options, `+` between two",
            autocompletion=completer(registry.SPECS),
        ),
    ],
    run: RunOptions,
    emit: Annotated[
        str | None, typer.Option(metavar="toml", help="print the chain as a recipe, and do nothing else")
    ] = None,
) -> None:
    """Run several passes as one, and publish the result of the last.

    Run options stand before SRC; what follows DST belongs to the passes.

    Example: rewright chain --seed 1 model out compress --bits 4 --group-size 32 --calibration-text text.txt
    """
    if emit not in (None, "toml"):
        raise UsageError(f"`--emit` must be toml, not `{emit}`")
    parsed = []
    for number, words in enumerate(split(stages), start=1):
        stage = stage_of(number, words)
        if stage is None:
            return
        parsed.append(stage)
    if emit:
        from rewright.passes import recipe

        console.write(recipe.dump(parsed), end="")
        return
    perform(src, dst, tuple(parsed), run)


def run_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML recipe, `-` for stdin")],
    src: Source,
    dst: Target,
    run: RunOptions,
    set: Annotated[  # noqa: A002 - the parameter's name is the option's
        list[str] | None,
        typer.Option(
            metavar="PASS.OPTION=VALUE", help="change an option of the recipe; a stage's number also names it"
        ),
    ] = None,
) -> None:
    """Run a recipe: the stages of a chain, kept in a TOML file.

    Example: rewright run recipe.toml model out --set compress.bits=3
    """
    from rewright.passes import recipe as recipes

    stages = recipes.parse(_text(recipe), set or ())
    named = [path for stage in stages for path in paths_of(stage.options)] + [run.eval_text]
    if str(recipe) == "-" and any(str(path) == "-" for path in named):
        raise UsageError("the recipe and an option both read standard input", hint="keep one of them in a file")
    perform(src, dst, stages, run)


def _text(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"recipe `{path}` is not UTF-8: byte {error.start}") from None
    except OSError as error:
        raise InputError(f"cannot read recipe `{path}`: {reason(error)}") from None


def _add_pass(app: typer.Typer, spec: Spec) -> None:
    @command(app, spec.name, run=None, options=spec.options, doc=_pass_doc(spec), rich_help_panel="Passes")
    def one_pass(src: Source, dst: Target, options: Any, run: RunOptions) -> None:
        from rewright.passes.recipe import Stage

        perform(src, dst, (Stage(spec, options),), run)


def register(app: typer.Typer) -> None:
    """Add `chain`, `run` and the passes to the root app."""
    for spec in registry.SPECS.values():
        _add_pass(app, spec)
    panel = "Several passes at once"
    verbatim = {"allow_interspersed_args": False}
    command(app, "chain", run=None, context_settings=verbatim, rich_help_panel=panel)(chain)
    command(app, "run", run=None, rich_help_panel=panel)(run_recipe)
