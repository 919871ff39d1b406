"""Predictors of contextual sparsity against each other: `python -m tests.bench.dejavu MODEL --out docs/results`.

Each variant trains predictors on `--text`, and is scored at every budget of its ladder on `--held-out`, as decoding
would read it: bytes a token, predictors included, as a share of the dense rows' bytes, against the divergence from the
dense model. Other ways to choose are scored beside the default. A variant that the results hold already is not trained
again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.against import against
from rewright.passes.context import Silent
from rewright.passes.models.sites import Shape, shape_of
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from rewright.passes.values import Method
from tests.bench.harness import machine

DATA = Path(__file__).resolve().parents[1] / "data"
PASS = "dejavu-predictor-train"
# Divergences at which bytes are compared, in nats a token.
LEVELS = (0.05, 0.02, 0.01, 0.005, 0.002)
# Deja Vu's predictors have rank 1000; at OPT-6.7B their share of the MLP's bytes is this.
WIDE = 1000 * (4096 + 16384) / (2 * 4096 * 16384)
NEURONS: dict[str, dict[str, Any]] = {
    "default": {},
    "as Deja Vu": {
        "method": "bce",
        "rank": "wide",
        "predictor-dtype": "bf16",
        "cost": "energy",
        "allocation": "layer",
    },
    "bce": {"method": "bce"},
    "one share for each layer": {"allocation": "layer"},
    "as SVDP": {"method": "svd", "predictor-dtype": "bf16", "cost": "energy", "allocation": "layer"},
    "bf16": {"predictor-dtype": "bf16"},
    "svd": {"method": "svd"},
    "energy": {"cost": "energy"},
    "from the layer's input": {"input": "block_in"},
}
INPUTS: dict[str, dict[str, Any]] = {
    "default": {},
    "energy": {"cost": "energy"},
    "one share for each layer": {"allocation": "layer"},
}
BESIDE: tuple[Method, ...] = ("oracle", "random", "static", "teal", "griffin")


def options_of(variant: dict[str, Any], shape: Shape, given: argparse.Namespace) -> dict[str, Any]:
    """A variant as the pass takes it."""
    found = dict(variant)
    if found.get("rank") == "wide":
        dense = shape.row_weights(neuron=True) * shape.neurons
        found["rank"] = str(max(1, round(WIDE * dense / (shape.width + shape.neurons))))
    if not shape.sparse:
        found["budget"] = given.budget
    return {**found, "calibration-text": [str(given.text)], "tokens": given.tokens, "sequence-length": given.length}


def bytes_at(rows: Sequence[dict[str, Any]], level: float) -> float | None:
    """The share of bytes at a divergence, between the budgets on either side by the logarithm; None outside of them."""
    points = sorted((max(row["kl"], 1e-9), row["bytes_share"]) for row in rows)
    for (low, less), (high, more) in pairwise(points):
        if low <= level <= high:
            part = (math.log(level) - math.log(low)) / max(1e-12, math.log(high) - math.log(low))
            return less + part * (more - less)
    return None


def study(given: argparse.Namespace, found: dict[str, Any], keep: Callable[[], None]) -> None:
    """Add the rows of every variant that was asked for to those known; `keep` is called after each."""
    shape = shape_of(Checkpoint.open(given.model).config or {})
    variants = NEURONS if shape.sparse else INPUTS
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in variants.items():
            if name in found or not re.search(given.variants, name):
                continue
            out, began = Path(folder) / f"{len(found)}", time.monotonic()
            stage = make(1, PASS, options_of(variant, shape, given))
            document = execute(Run(given.model, out, (stage,), RunOptions(threads=given.threads)), Silent())
            seconds = round(time.monotonic() - began, 1)
            methods = BESIDE if name == "default" else ()
            told = against(out, given.held_out, methods, sequence_length=given.length, threads=given.threads)
            report = json.loads((out / f"reports/{PASS}.json").read_text())
            found[name] = {
                "seconds": seconds,
                "metrics": document["stages"][-1]["metrics"],
                "ranks": [row["rank"] for row in report["places"] if row["rank"]],
                "rows": [row for row in told["methods"] if row["method"] == "predicted"],
                "places": told["places"],
            }
            for method in methods:
                found[method] = {"rows": [row for row in told["methods"] if row["method"] == method]}
            print(name, found[name]["metrics"], file=sys.stderr, flush=True)
            keep()


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    parts = [
        "# Predictors of contextual sparsity, measured\n",
        "Written by `python -m tests.bench.dejavu`, a model at a time. Bytes are those of the targeted rows that a",
        "token reads, predictors included, as a share of all of them; divergence is from the dense model, in nats a",
        "token, on held-out stories, with the first 32 tokens of each window dense. Between budgets bytes are",
        "interpolated.\n",
    ]
    for name, model in results["models"].items():
        parts += [f"## {name}\n", f"{model['told']}\n"]
        heads = [f"{level:g}" for level in LEVELS]
        parts.append(f"| bytes at a divergence of | {' | '.join(heads)} |")
        parts.append(f"| --- |{' ---: |' * len(heads)}")
        for variant, found in model["variants"].items():
            cells = [bytes_at(found["rows"], level) for level in LEVELS]
            told = ["-" if cell is None else f"{100 * cell:.1f} %" for cell in cells]
            parts.append(f"| {variant} | {' | '.join(told)} |")
        places = model["variants"].get("default", {}).get("places", [])
        parts += ["\nThe default at its own budget, layer by layer:\n"]
        keys = ("natural_density", "density", "recall", "precision", "energy_recall")
        parts.append(f"| layer | site | {' | '.join(key.replace('_', ' ') for key in keys)} |")
        parts.append(f"| ---: | --- |{' ---: |' * len(keys)}")
        for row in places:
            cells = ["-" if row[key] is None else f"{row[key]:.3f}" for key in keys]
            parts.append(f"| {row['layer']} | {row['site']} | {' | '.join(cells)} |")
        parts.append("")
    told = ", ".join(f"{key} {value}" for key, value in results["machine"].items())
    return "\n".join([*parts, f"Machine: {told}", ""])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.dejavu", description=(__doc__ or "").split(":")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--told", default="", help="what the page says of the model")
    parser.add_argument("--text", type=Path, default=DATA / "tinystories.txt")
    parser.add_argument("--held-out", type=Path, default=DATA / "tinystories_heldout.txt")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--budget", type=float, default=0.55, help="where the ladder is made around, without neurons")
    parser.add_argument("--variants", default=".", help="a regular expression")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    path = given.out / "dejavu.json"
    results = json.loads(path.read_text()) if path.exists() else {"models": {}}
    results["machine"] = machine("cpu")
    model = results["models"].setdefault(given.model.name, {"told": given.told, "variants": {}})
    model["told"] = given.told or model["told"]

    def keep() -> None:
        path.write_text(json.dumps(results, indent=1) + "\n")
        (given.out / "dejavu.md").write_text(page(results))

    study(given, model["variants"], keep)
    keep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
