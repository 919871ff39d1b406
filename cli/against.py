"""`eval --against`: attached predictors of sparsity beside other ways to choose what is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.cli import console
from rewright.cli.console import table
from rewright.cli.figures import figure
from rewright.formats.files import write_file
from rewright.passes.run_options import RunOptions

if TYPE_CHECKING:
    from rewright.cli.measure import EvalOptions


def against(model: Path, options: EvalOptions, run: RunOptions) -> None:
    """Print every method at every budget, and draw them."""
    from rewright.passes import frontier
    from rewright.passes.against import against as compared

    assert options.text is not None
    assert options.against is not None
    found = compared(
        model,
        options.text,
        options.against.names,
        sequence_length=options.sequence_length,
        device=run.device,
        dtype=run.dtype,
        threads=run.threads,
        seed=run.seed,
        reporter=console.current(),
    )
    if options.picture is not None:
        write_file(options.picture, frontier.draw(found).encode())
    if run.json:
        console.write_json({"model": str(model), **found})
        return
    console.write(table(_rows(found), head=("", "bytes", "KL (nats)", "ratio", "top-1 agreement")))


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for row in found["methods"]:
        share = f"{100 * row['bytes_share']:.1f} %"
        yield row["method"], share, *(figure(row[key]) for key in ("kl", "perplexity_ratio", "top1_agreement"))
