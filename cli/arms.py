"""`eval --arms`: what a learned prompt wins back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rewright.cli import console
from rewright.cli.console import table
from rewright.cli.figures import figure
from rewright.passes.run_options import RunOptions

if TYPE_CHECKING:
    from rewright.cli.measure import EvalOptions


def arms(model: Path, options: EvalOptions, run: RunOptions) -> None:
    """Print the five arms of a checkpoint with a prompt."""
    from rewright.passes.arms import ARMS, compare_arms

    assert options.text is not None
    assert options.dense is not None
    found = compare_arms(
        model,
        options.dense,
        [options.text, *options.foreign],
        sequence_length=options.sequence_length,
        options=run,
        reporter=console.current(),
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
