"""What a learned prompt wins back: `python -m tests.bench.prompts MODEL... --out docs/results`.

Each setting compresses a model as its defaults do; each recipe learns a prompt on that, from stories of
tests/data/tinystories.txt. The five arms score the same targets, on the 75 held-out stories and on whatever `--text
NAME=FILE` adds. The dense model's own prompt is learned once for each kind of prompt. Runs that the results already
hold are not done again, so that a study may be done in parts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rewright.formats import peft
from rewright.passes import svg
from rewright.passes.arms import ARMS
from rewright.passes.context import Silent
from rewright.passes.evaluate import evaluate
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.bench.harness import machine
from tests.bench.quality import Texts, load

SETTINGS: dict[str, dict[str, Any]] = {
    "W4 + 50 %": {"bits": 4, "sparsity": 0.5},
    "W3": {"bits": 3},
    "W2": {"bits": 2},
}
# The hint that people give a compressed model in words, as the paper's motivation does.
WORDS = (
    "Some weights of this model were removed or rounded. Mind the errors that this makes, and go on as well as before. "
)
RECIPES: dict[str, dict[str, Any]] = {
    "words": {"init-text": WORDS, "steps": 0},
    "next-token": {"loss": "next-token"},
    "distill": {"loss": "distill"},
    "next-token, all layers": {"loss": "next-token", "depth": "all"},
    "distill, all layers": {"loss": "distill", "depth": "all"},
}
# Other values, one at a time, at one setting.
ONE = "W4 + 50 %"
VARIANTS: dict[str, dict[str, Any]] = {
    "distill, 1000 steps": {"loss": "distill", "steps": 1000},
    "distill from random": {"loss": "distill", "init": "random"},
    "distill, rate 0.5": {"loss": "distill", "learning-rate": 0.5},
    "distill, all layers, 1000 steps": {"loss": "distill", "depth": "all", "steps": 1000},
    "distill, all layers, 128 tokens": {"loss": "distill", "depth": "all", "tokens": 128},
}
# Of the picture: a row, the room for its name, the width of the bars.
ROW, NAMES, BARS = 22, 400, 420


class Study:
    """One model: what was compressed and learned in a folder, and the scores of it."""

    def __init__(self, model: Path, folder: Path, texts: Texts, given: argparse.Namespace) -> None:
        self.model, self.folder, self.texts, self.given = model, folder, texts, given

    def _make(self, name: str, source: Path, stage: str, **options: Any) -> Path:
        out = self.folder / name
        run = Run(source, out, (make(1, stage, options),), RunOptions(threads=self.given.threads, update=True))
        execute(run, Silent())
        return out

    def compressed(self, setting: str) -> Path:
        calibration = [str(self.texts.calibration)]
        options = {**SETTINGS[setting], "group-size": self.given.group_size, "calibration-text": calibration}
        return self._make(f"compressed {setting}", self.model, "compress", **options)

    def learned(self, name: str, source: Path, recipe: dict[str, Any]) -> Path:
        if recipe.get("steps") == 0:
            return self._make(name, source, "prompt", **recipe)
        options: dict[str, Any] = {"text": [str(self.texts.calibration)], **recipe}
        if options["loss"] == "distill":
            options["teacher"] = str(self.model)
        for key in ("tokens", "steps", "batch_size", "sequence_length", "learning_rate"):
            options.setdefault(key.replace("_", "-"), getattr(self.given, key))
        return self._make(name, source, "prompt", **options)

    def score(self, model: Path, prompt: bool | Path) -> dict[str, float]:
        score = partial(evaluate, model, prompt=prompt, sequence_length=self.given.sequence_length)
        return {
            name: score(text=text, threads=self.given.threads, per_document="first")["perplexity"]
            for name, text in self.texts.scored.items()
        }

    def arms(self, setting: str, recipe: str, asked: dict[str, Any]) -> dict[str, Any]:
        compressed = self.compressed(setting)
        started = time.process_time()
        own = self.learned(f"{recipe} {setting}", compressed, asked)
        seconds = time.process_time() - started
        twin = {**asked, "loss": "next-token"} if "loss" in asked else asked
        dense = self.learned(f"dense {twin}", self.model, twin)
        prompts: list[tuple[Path, bool | Path]] = [
            (self.model, False),
            (compressed, False),
            (own, True),
            (dense, True),
            (compressed, peft.found_in(dense)),
        ]
        scores = [self.score(*one) for one in prompts]
        found = {name: {arm: one[name] for arm, one in zip(ARMS, scores, strict=True)} for name in scores[0]}
        return {"perplexity": found, "cpu_seconds": round(seconds, 1)}


def recovery(arms: dict[str, float]) -> float:
    """The share of the lost perplexity that is won back."""
    dense, compressed, prompted = (arms[arm] for arm in ARMS[:3])
    return (compressed - prompted) / (compressed - dense)


def page(results: dict[str, Any], beside: dict[str, Any] | None) -> str:
    """The results as Markdown; `beside` is what `tests.bench.prompt_peft` measured."""
    lines = [
        "# What a learned prompt wins back",
        "",
        "Perplexity of the five arms, on the same targets in every row: the dense model; the compressed one; with the",
        "prompt learned on it; the dense one with a prompt learned on it by the next token, which shows what fitting",
        "the text is worth without any compression; and the compressed one with that. Won back: of what compression",
        "lost, the share that the prompt brings. `stories` are 75 that were not learned from; `words` is a hint in",
        "plain words, as it is.",
        "",
        "![Won back on held-out stories](prompt.svg)",
        "",
    ]
    for name, found in results["models"].items():
        asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["asked"].items())
        lines += [f"## {name}", "", f"{asked[0].upper()}{asked[1:]}.", ""]
        for text in found["runs"][0]["perplexity"]:
            lines += [
                f"**{text}**:",
                "",
                "| setting | recipe | dense | compressed | + prompt | dense + its own | compressed + that | won back |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for run in found["runs"]:
                arms = run["perplexity"][text]
                cells = " | ".join(f"{arms[arm]:.3f}" for arm in ARMS)
                share = f"{100 * recovery(arms):.1f} %"
                lines.append(f"| {run['setting']} | {run['recipe']} | {cells} | {share} |")
            lines.append("")
    if beside is not None:
        lines += _beside(beside)
    facts = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    command = "Command: `python -m tests.bench.prompts MODEL --out docs/results`, with options as said of each model."
    return "\n".join([*lines, command, "", f"Machine: {facts}", ""])


def _beside(found: dict[str, Any]) -> list[str]:
    asked = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["asked"].items())
    rows = [
        ("seconds of a step", "step", 1.0),
        ("peak memory, MiB", "memory", 1 / 2**20),
        ("perplexity", "perplexity", 1.0),
    ]
    lines = [
        "## Beside PEFT's prompt tuning",
        "",
        f"On `{found['checkpoint']}`, {asked}; the same windows, start and optimiser. PEFT learns",
        "on the model as plain transformers loads it, which is expanded. Seconds are of a processor; memory is over an",
        "idle process; perplexity is of the validation text after the last step.",
        "",
        "| | Rewright | PEFT | ratio |",
        "|---|---|---|---|",
    ]
    for name, key, unit in rows:
        one, other = found["rewright"][key] * unit, found["peft"][key] * unit
        lines.append(f"| {name} | {one:.4g} | {other:.4g} | {found['ratios'][key]:.3f} |")
    return [*lines, "", "Command: `python -m tests.bench.prompt_peft CHECKPOINT --out docs/results`", ""]


def picture(results: dict[str, Any]) -> str:
    """What every run won back on the held-out stories, as bars."""
    rows = [
        (f"{name}, {run['setting']}, {run['recipe']}", recovery(run["perplexity"]["stories"]))
        for name, found in results["models"].items()
        for run in found["runs"]
    ]
    most = max([0.1, *(share for _, share in rows)])
    parts = [svg.text(16, 28, "Won back of what compression lost, on held-out stories", 16, font_weight="bold")]
    for place, (name, share) in enumerate(rows):
        y = 48 + ROW * place
        width = BARS * max(0.0, share) / most
        parts.append(svg.text(NAMES - 8, y + 13, svg.fit(name, 11, NAMES - 20), 11, text_anchor="end"))
        parts.append(svg.tag("rect", x=NAMES, y=y + 2, width=width, height=ROW - 8, fill="#0072B2"))
        parts.append(svg.text(NAMES + width + 6, y + 13, f"{100 * share:.1f} %", 11))
    described = "; ".join(f"{name} {100 * share:.0f} %" for name, share in rows)
    return svg.document(NAMES + BARS + 90, 60 + ROW * len(rows), "Won back by prompts", described, parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for prompt.json, prompt.md and prompt.svg")
    parser.add_argument("--work", type=Path, help="folder that keeps what is made, for a study in parts")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another text to score on")
    parser.add_argument("--settings", default=".*", help="those that this regular expression matches whole")
    parser.add_argument("--recipes", default=".*", help="those that this regular expression matches whole")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=224)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    store = given.out / "prompt.json"
    named = {name: Path(path) for name, _, path in (one.partition("=") for one in given.text)}
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        texts = Texts(work, named)
        for model in given.models:
            (work / model.name).mkdir(exist_ok=True)
            _study(Study(model, work / model.name, texts, given), store)
    results = load(store)
    beside = given.out / "prompt-peft.json"
    (given.out / "prompt.md").write_text(page(results, load(beside) if beside.exists() else None))
    (given.out / "prompt.svg").write_text(picture(results))


def _study(study: Study, store: Path) -> None:
    """Every setting and recipe that is asked for and not there yet; each is on record when it is done."""
    given = study.given
    asked = {key: getattr(given, key) for key in ("tokens", "steps", "batch_size", "sequence_length", "learning_rate")}
    for setting in (one for one in SETTINGS if re.fullmatch(given.settings, one)):
        recipes = {**RECIPES, **(VARIANTS if setting == ONE else {})}
        for recipe, options in recipes.items():
            if not re.fullmatch(given.recipes, recipe):
                continue
            results = load(store)
            found = results["models"].setdefault(study.model.name, {"asked": asked, "runs": []})
            key = {"setting": setting, "recipe": recipe}
            if any(all(run[part] == value for part, value in key.items()) for run in found["runs"]):
                continue
            found["runs"].append({**key, **study.arms(setting, recipe, options)})
            results["machine"] = {**machine("cpu"), "transformers": version("transformers"), "threads": given.threads}
            store.write_text(json.dumps(results, indent=1) + "\n")
            shares = {name: round(recovery(arms), 3) for name, arms in found["runs"][-1]["perplexity"].items()}
            print(study.model.name, setting, recipe, shares, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
