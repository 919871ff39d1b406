"""`transfer`: learned prompts, used on the models and texts that they were not learned on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rewright.cli import console, measure
from rewright.cli.build import command
from rewright.cli.console import table
from rewright.cli.figures import figure
from rewright.passes.errors import UsageError
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Opt


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """What `transfer` scores."""

    text: Annotated[tuple[Path, ...], Opt("text to score (repeatable)", metavar="FILE")] = ()
    sequence_length: Annotated[int, Opt("tokens of text a window, the start token included", min=2)] = 256
    picture: Annotated[Path | None, Opt("write the grid as a heat map, SVG", metavar="FILE")] = None

    def __post_init__(self) -> None:
        if not self.text:
            raise UsageError("nothing to score", hint="give `--text FILE`")


def transfer(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="checkpoint folders of one base")],
    options: TransferOptions,
    run: RunOptions,
) -> None:
    """Use every prompt that one of the models has on all of them: the transfer grid.

    A row is a prompt, by the checkpoint it is attached to, a column a
    text and a model; all cells of a column score the same tokens.

    Example: rewright transfer w4 w3 --text heldout.txt --text wiki.txt --picture grid.svg
    """
    from rewright.formats.files import write_file
    from rewright.passes.transfer import draw, grid

    talk = measure.talk(run)
    with measure.kernels(run):
        found = grid(models, options.text, sequence_length=options.sequence_length, options=run, reporter=talk)
    if options.picture is not None:
        write_file(options.picture, draw(found).encode())
    if run.json:
        console.write_json(found)
        return
    head = ("prompt of", *(f"{column['text']} {Path(column['model']).name}" for column in found["columns"]))
    console.write(table([(row, *map(figure, cells)) for row, cells in found["perplexity"].items()], head=head))


def register(app: typer.Typer) -> None:
    """Add the command."""
    shared = ("device", "dtype", "kernels", "threads", "json", "events", "quiet", "verbose")
    command(app, "transfer", run=shared, options=TransferOptions, panel="Options", rich_help_panel="Measure")(transfer)
