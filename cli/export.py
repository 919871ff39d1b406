"""`export-predictors`: attached predictors for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rewright.cli import console, measure
from rewright.cli.build import command
from rewright.cli.figures import size
from rewright.passes.errors import UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Opt


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """How `export-predictors` writes."""

    relu: Annotated[bool, Opt("for programs with a ReLU between the two halves: twice the rank")] = False


def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="checkpoint folder with predictors of neurons")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="a new folder for them")],
    options: ExportOptions,
    run: RunOptions,
) -> None:
    """Write attached predictors as PowerInfer's files are laid out: `model_0.pt` and so on, a layer each.

    Each has fc1.weight [rank, width], fc2.weight [neurons, rank] and
    fc2.bias [neurons], float32: a neuron is on where
    fc2 (fc1 x) + bias > 0. PowerInfer itself has a ReLU between the
    halves, which --relu makes up for, and no bias.

    Example: rewright export-predictors sparse predictors
    """
    from rewright.formats.files import SCRATCH, remove_tree, storage, write_file
    from rewright.passes.export_predictors import files

    measure.talk(run)
    if folder.exists():
        raise UsageError(f"`{folder}` is there already", hint="name a folder that is not")
    made: dict[str, int] = {}
    aside = folder.with_name(f"{SCRATCH}{folder.name}")
    remove_tree(aside)
    try:
        for name, data in files(model, relu=options.relu):
            write_file(aside / name, data)
            made[name] = len(data)
        with storage(folder):
            aside.rename(folder)
    finally:
        # of what did not come to its end nothing stays
        remove_tree(aside)
    if run.json:
        console.write_json({"model": model, "folder": folder, "files": made})
    else:
        console.write(f"{len(made)} files, {size(sum(made.values()))}, in {console.safe(str(folder))}")


def register(app: typer.Typer) -> None:
    """Add the command."""
    run, group = ("json", "quiet", "verbose", "events"), "Measure"
    command(app, "export-predictors", run=run, options=ExportOptions, panel="Options", rich_help_panel=group)(export)
