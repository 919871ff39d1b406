"""`eval --arms`: what a learned prompt wins back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rewright.cli import console
from rewright.cli.console import table
from rewright.cli.figures import figure
from rewright.passes import world
from rewright.passes.run_options import RunOptions

if TYPE_CHECKING:
    from rewright.cli.measure import EvalOptions


def arms(model: Path, options: EvalOptions, run: RunOptions) -> None:
    """Print the five arms of a checkpoint with a prompt."""
    from rewright.passes.arms import ARMS, compare_arms

    assert options.text is not None
    assert options.dense is not None
    # what is made is the first process's, and so is all that is scored
    found = world.current().lead(
        partial(
            compare_arms,
            model,
            options.dense,
            [options.text, *options.foreign],
            sequence_length=options.sequence_length,
            per_document=options.per_document,
            options=run,
            reporter=console.current(),
        )
    )
    if run.json:
        console.write_json({"model": str(model), "dense": str(options.dense), **found})
        return
    rows = [(arm, *(figure(text["perplexity"][arm]) for text in found["texts"])) for arm in ARMS]
    rows.append(("won back", *(_share(text["recovery"]) for text in found["texts"])))
    rows.append(("scored tokens", *(str(text["scored_tokens"]) for text in found["texts"])))
    console.write(table(rows, head=("perplexity", *(text["text"]["name"] for text in found["texts"]))))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
