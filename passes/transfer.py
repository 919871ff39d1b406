"""The transfer grid: prompts learned on one model and text, used on others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rewright.formats import peft
from rewright.formats.checkpoint import Checkpoint
from rewright.formats.text_config import positions_of
from rewright.passes import soft_prompt, svg
from rewright.passes.context import Reporter
from rewright.passes.errors import InputError
from rewright.passes.evaluate import evaluate
from rewright.passes.inputs import Inputs
from rewright.passes.run_options import RunOptions

NONE = "no prompt"
# Of the picture: a cell, the room for a row's name, and that above the cells.
CELL, HIGH, NAMES, HEAD = 96, 30, 300, 110
BETTER, SAME, WORSE = "#0072B2", "#ffffff", "#D55E00"


def grid(
    models: Sequence[Path], texts: Sequence[Path], *, sequence_length: int, options: RunOptions, reporter: Reporter
) -> dict[str, Any]:
    """Perplexity of every model on every text with every prompt that one of the models has, and with none.

    A row is a prompt, by the checkpoint that it is attached to; a column a text and a model. All cells of a column
    score the same targets. Raises InputError for models of several bases, or when none has a prompt.
    """
    opened = {str(path): Checkpoint.open(path) for path in models}
    prompts = {name: it for name, source in opened.items() if (it := soft_prompt.attached(source)) is not None}
    if not prompts:
        raise InputError("none of the models has a prompt attached", hint="learn one with `rewright prompt`")
    bases = {name: soft_prompt.base_of(source) for name, source in opened.items()}
    for row, adapter in prompts.items():
        for name, base in bases.items():
            for difference in soft_prompt.check(adapter, base, opened[name]):
                raise InputError(f"the prompt of `{row}` cannot be used on `{name}`: {difference}")
    most = max(adapter.tokens for adapter in prompts.values())
    limits = [positions - most for source in opened.values() if (positions := positions_of(source.config or {}))]
    length = min([sequence_length, *limits])
    if length < 2:
        raise InputError(f"a prompt of {most} tokens leaves no position for text in one of the models")
    inputs, rows = Inputs(), [NONE, *prompts]
    cells: dict[str, list[float]] = {row: [] for row in rows}
    with reporter.progress("transfer, cells", len(rows) * len(models) * len(texts)) as bar:
        for text in texts:
            for path in models:
                for row in rows:
                    found = evaluate(
                        path,
                        text=text,
                        sequence_length=length,
                        prompt=False if row == NONE else peft.found_in(Path(row)),
                        device=options.device,
                        dtype=options.dtype,
                        threads=options.threads,
                        inputs=inputs,
                    )
                    cells[row].append(found["perplexity"])
                    bar.advance(1)
    columns = [{"text": text.name, "model": str(path)} for text in texts for path in models]
    learned = {row: adapter.learned for row, adapter in prompts.items()}
    return {"sequence_length": length, "columns": columns, "learned": learned, "perplexity": cells}


def draw(found: Mapping[str, Any]) -> str:
    """The grid as a heat map: blue where a prompt lowers a column's perplexity, orange where it raises it."""
    cells, columns = found["perplexity"], found["columns"]
    width, height = NAMES + CELL * len(columns) + 24, HEAD + HIGH * len(cells) + 40
    parts = [svg.text(16, 28, "Prompts learned on one model, used on others", 16, font_weight="bold")]
    parts.append(svg.text(16, 48, "perplexity; row: the prompt, column: text and model", 12, fill=svg.FAINT))
    for place, column in enumerate(columns):
        middle = NAMES + CELL * (place + 0.5)
        named = (column["text"], Path(column["model"]).name)
        for line, words in enumerate(named):
            told = svg.fit(words, 11, CELL - 6)
            parts.append(svg.text(middle, HEAD - 26 + 14 * line, told, 11, text_anchor="middle"))
    for line, (row, values) in enumerate(cells.items()):
        y = HEAD + HIGH * line
        name = row if row == NONE else f"learned on {Path(row).name}"
        parts.append(svg.text(16, y + 19, svg.fit(name, 12, NAMES - 24), 12))
        for place, value in enumerate(values):
            x, colour = NAMES + CELL * place, _colour(value / cells[NONE][place])
            box = svg.tag("rect", x=x, y=y, width=CELL - 2, height=HIGH - 2, fill=colour, stroke="#ccc")
            parts += [box, svg.text(x + CELL / 2 - 1, y + 19, f"{value:.3f}", 12, text_anchor="middle")]
    return svg.document(
        width, height, "Transfer of prompts", f"{len(cells) - 1} prompts, {len(columns)} columns", parts
    )


def _colour(ratio: float) -> str:
    """Half-way to a full colour at a perplexity tenth lower or higher."""
    if ratio <= 1:
        return svg.blend(SAME, BETTER, min(0.6, 5 * (1 - ratio)))
    return svg.blend(SAME, WORSE, min(0.6, 5 * (1 - 1 / ratio)))
