"""The results of `tests.bench.quality` as Markdown: a table for each model and text."""

from __future__ import annotations

from typing import Any


def page(title: str, results: dict[str, Any], recipes: list[str]) -> str:
    """The whole page."""
    lines = [
        f"# {title}",
        "",
        "Perplexity by recipe and setting, on the first 256 tokens of each document: `stories` are the 75 held-out",
        "stories on which defaults were chosen, `other stories` 75 more on which nothing was. Calibration on stories,",
        "256 tokens a sequence, 16-bit scales. With several seeds: the median, and the range in brackets. A dash: not",
        "run; `refused`: the pass says why it cannot.",
        "",
    ]
    for name, found in results["models"].items():
        lines += [f"## {name}", ""]
        lines += [f"Groups of {found['group_size']}, {found['samples']} calibration sequences.", ""]
        if "note" in found:
            lines += [found["note"], ""]
        for text, dense in found["dense"].items():
            lines += _table(found["runs"], text, dense, recipes)
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    return "\n".join(
        [
            *lines,
            "Command: `python -m tests.bench.quality MODEL --group-size G --samples N --out docs/results`, G and N as",
            "said of each model; with `--defaults` for other values of options, with `--recipes` for rows that damp",
            "the target by 0.05.",
            "",
            f"Machine: {facts}",
            "",
        ]
    )


def _table(runs: list[dict[str, Any]], text: str, dense: float, recipes: list[str]) -> list[str]:
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    used = [recipe for recipe in recipes if any(run["recipe"] == recipe for run in runs)]
    lines = [
        f"**{text}**, dense {dense:.3f}:",
        "",
        f"| recipe | {' | '.join(settings)} |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for recipe in used:
        cells = [
            _cell([run for run in runs if (run["setting"], run["recipe"]) == (of, recipe)], text) for of in settings
        ]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return [*lines, ""]


def _cell(runs: list[dict[str, Any]], text: str) -> str:
    if any("refused" in run for run in runs):
        return "refused"
    values = sorted(run["perplexity"][text] for run in runs if text in run["perplexity"])
    if not values:
        return "-"
    spread = f" ({_figure(values[0])} to {_figure(values[-1])})" if len(values) > 1 else ""
    return _figure(values[len(values) // 2]) + spread


def _figure(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"
