"""What distilled filters cost a model: `python -m tests.bench.distilled MODEL... --text FILE --out docs/results`.

`python -m tests.bench.train_hyena` trains such models. Each is distilled at several orders by the closed form, by
balanced truncation and by gradient descent, and at the order that `auto` finds; logits and losses are those of
documents that no order was chosen on. Runs that the results already hold are not done again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.context import Silent
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.bench.harness import machine
from tests.bench.quality import load

RECIPES: dict[str, dict[str, Any]] = {
    **{f"closed form, order {order}": {"order": order} for order in (2, 4, 8, 16, 32)},
    "closed form, order 8, weighed": {"order": 8, "weighting": "input-spectrum"},
    "closed form, auto within 0.02": {"order": "auto", "tolerance": 0.02},
    **{f"balanced, order {order}": {"order": order, "method": "balanced"} for order in (4, 8, 16)},
    "gradient, order 8": {"order": 8, "method": "gradient"},
}
SHOWN = ("states", "error", "bound", "logit_error", "loss_before", "loss_change")


def measure(model: Path, text: Path, asked: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Distil once; the metrics, and what it took."""
    options = {**asked, "calibration-text": [str(text)], "samples": given.samples}
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        run = Run(model, Path(folder) / "out", (make(1, "hyena-distill", options),), RunOptions(threads=given.threads))
        metrics = execute(run, Silent())["stages"][0]["metrics"]
    found = {name: metrics[name] for name in SHOWN}
    return {**found, "cpu_seconds": round(time.process_time() - started, 1)}


def facts(model: Path) -> dict[str, Any]:
    """What a model is, by its files."""
    source = Checkpoint.open(model)
    config = source.config or {}
    filters = config["d_model"] * (config["hyena_order"] - 1)
    heads = config.get("num_heads")
    signals = filters if heads is None else config["d_model"] * (config["d_model"] // heads)
    return {
        "model_type": config["model_type"],
        "layers": config["n_layer"],
        "width": config["d_model"],
        "filters_a_layer": heads or filters,
        "recurrences_a_layer": signals,
        "length": config["max_seq_len"],
    }


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# What distilled filters cost a trained model",
        "",
        "Error and bound are of the filters, relative to them; the error of the logits is relative to their spread",
        "over the vocabulary; the loss is in nats a token, on documents that no order was chosen on. A state is a",
        "float32 of every recurrence and sequence.",
        "",
    ]
    for name, found in results["models"].items():
        about = found["about"]
        lines += [
            f"## {name}",
            "",
            f"`{about['model_type']}`, {about['layers']} layers of width {about['width']},"
            f" {about['filters_a_layer']} filters of {about['length']} samples and {about['recurrences_a_layer']}"
            f" recurrences a layer; loss before {found['loss_before']:.4f}.",
            "",
            "| recipe | states | error | bound | error of the logits | change of the loss | CPU s |",
            "|---|---|---|---|---|---|---|",
        ]
        for run in found["runs"]:
            lines.append(
                f"| {run['recipe']} | {run['states']} | {run['error']:.3g} | {run['bound']:.3g} |"
                f" {run['logit_error']:.3g} | {run['loss_change']:+.5f} | {run['cpu_seconds']} |"
            )
        lines.append("")
    told = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    command = "Command: `python -m tests.bench.distilled MODEL... --text FILE --out docs/results`"
    return "\n".join([*lines, command, "", f"Machine: {told}", ""])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text to choose orders on; some of it is held out")
    parser.add_argument("--out", type=Path, required=True, help="folder for distilled.json and distilled.md")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "distilled.json"
    for recipe, asked in RECIPES.items():
        for model in given.models:
            results = load(store)
            found = results["models"].setdefault(model.name, {"about": facts(model), "runs": []})
            if any(run["recipe"] == recipe for run in found["runs"]):
                continue
            made = measure(model, given.text, asked, given)
            found["loss_before"] = made.pop("loss_before")
            found["runs"].append({"recipe": recipe, **made})
            results["machine"] = {**machine("cpu"), "threads": given.threads}
            store.write_text(json.dumps(results, indent=1) + "\n")
            print(model.name, recipe, made, file=sys.stderr, flush=True)
            (given.out / "distilled.md").write_text(page(results))


if __name__ == "__main__":
    main()
