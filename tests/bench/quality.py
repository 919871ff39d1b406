"""Perplexity after `compress`, method by method: `python -m tests.bench.quality MODEL... --out docs/results`.

Every run calibrates on tests/data/tinystories.txt (128 sequences of 256 tokens, groups of 32) and is scored on
tests/data/tinystories_heldout.txt by the one protocol of `rewright eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewright.passes.context import RunOptions, Silent
from rewright.passes.evaluate import evaluate
from rewright.passes.pipeline import Run, execute
from rewright.passes.recipe import make
from tests.bench.harness import machine

DATA = Path(__file__).resolve().parent.parent / "data"

# heading -> what is asked for; method -> its options
SETTINGS: dict[str, dict[str, Any]] = {
    "W4": {"bits": 4},
    "25 %": {"bits": 16, "sparsity": 0.25},
    "50 %": {"bits": 16, "sparsity": 0.5},
    "W4 + 25 %": {"bits": 4, "sparsity": 0.25},
    "W4 + 50 %": {"bits": 4, "sparsity": 0.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "rounding (magnitude, RTN)": {"method": "rtn"},
    "Wanda, RTN": {"method": "wanda"},
    "second order (GPTQ, SparseGPT, joint)": {"method": "gptq"},
}


def cases() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(setting, method, options): Wanda only where something is pruned."""
    for setting, asked in SETTINGS.items():
        for method, how in METHODS.items():
            if how["method"] != "wanda" or "sparsity" in asked:
                yield setting, method, {**asked, **how}


def measure(model: Path, options: dict[str, Any], seed: int, threads: int) -> dict[str, Any]:
    """Compress and score once."""
    plain = {
        "group-size": 32,
        "samples": 128,
        "sequence-length": 256,
        "calibration-text": [str(DATA / "tinystories.txt")],
        **options,
    }
    with tempfile.TemporaryDirectory() as folder:
        stage = make(1, "compress", plain)
        run = Run(model, Path(folder) / "out", (stage,), RunOptions(seed=seed, threads=threads))
        started = time.process_time()
        document = execute(run, Silent())
        seconds = time.process_time() - started
        score = evaluate(Path(folder) / "out", text=DATA / "tinystories_heldout.txt", threads=threads)
    metrics = document["stages"][0]["metrics"]
    return {
        "perplexity": score["perplexity"],
        "error_held_out": metrics["error_held_out"],
        "bits_per_weight": metrics["bits_per_weight"],
        "sparsity": metrics["sparsity"],
        "cpu_seconds": round(seconds, 1),
    }


def table(results: dict[str, Any]) -> str:
    """The results as Markdown, a table for each model."""
    lines = ["# What `compress` costs in perplexity", "", results["about"], ""]
    for name, found in results["models"].items():
        lines += [f"## {name}", "", f"Dense: {found['dense']:.3f}", "", f"| method | {' | '.join(SETTINGS)} |"]
        lines += ["|---" * (len(SETTINGS) + 1) + "|"]
        for method in METHODS:
            cells = [_cell(found["runs"], setting, method) for setting in SETTINGS]
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"Command: `{results['command']}`", "", f"Machine: {_said(results['machine'])}", ""]
    return "\n".join(lines)


def _said(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _cell(runs: list[dict[str, Any]], setting: str, method: str) -> str:
    values = [run["perplexity"] for run in runs if (run["setting"], run["method"]) == (setting, method)]
    if not values:
        return "-"
    middle = sorted(values)[len(values) // 2]
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{middle:.2f}{spread}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="folder for compress.json and compress.md")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    found: dict[str, Any] = {}
    for model in given.models:
        dense = evaluate(model, text=DATA / "tinystories_heldout.txt", threads=given.threads)["perplexity"]
        runs: list[dict[str, Any]] = []
        for setting, method, options in cases():
            for seed in range(given.seeds if options["method"] != "rtn" else 1):
                result = measure(model, options, seed, given.threads)
                runs.append({"setting": setting, "method": method, "seed": seed, **result})
                print(model.name, setting, method, seed, f"{result['perplexity']:.3f}", file=sys.stderr, flush=True)
        found[model.name] = {"dense": dense, "runs": runs}
    names = [model.name for model in given.models]
    results = {
        "about": (
            "Perplexity on the 75 held-out stories, the first 256 tokens of each; groups of 32, 16-bit scales, "
            f"calibration on 128 sequences of 256 tokens; {given.seeds} seed(s), the median, and the range in brackets."
        ),
        "command": f"python -m tests.bench.quality {' '.join(names)} --seeds {given.seeds} --out docs/results",
        "machine": {**machine("cpu"), "transformers": version("transformers"), "threads": given.threads},
        "models": found,
    }
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "compress.json").write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "compress.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
