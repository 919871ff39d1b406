"""Perplexity after `compress`, recipe by recipe: `python -m tests.bench.quality MODEL... --out docs/results`.

Every run calibrates on stories of tests/data/tinystories.txt (128 sequences of 256 tokens, groups of 32 unless said
otherwise) and is scored by the one protocol of `rewright eval` on the 75 stories of tests/data/tinystories_heldout.txt,
on which choices were made, on 75 other stories, on which none was, and on whatever `--text NAME=FILE` adds. Runs that
the results already hold are not done again, so that a study may be done in parts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rewright.passes.calibration import read_documents
from rewright.passes.context import Silent
from rewright.passes.evaluate import evaluate
from rewright.passes.inputs import Inputs
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.bench.harness import machine
from tests.bench.quality_page import page

DATA = Path(__file__).resolve().parent.parent / "data"
# Every so many stories one is kept from calibration, for the text that no choice was made on.
APART = 29
STORIES = 75
# Of a text that comes in lines, the first of those that fill a window.
LINES, LINE_CHARACTERS = 150, 600

PLAIN: dict[str, Any] = {"target": "own", "mask": "sweep", "refine": 0}
ZEROS: dict[str, dict[str, Any]] = {
    "": {},
    "25 %": {"sparsity": 0.25},
    "50 %": {"sparsity": 0.5},
    "16:32": {"pattern": "16:32"},
    "2:4": {"pattern": "2:4"},
}


@dataclass(frozen=True)
class Recipe:
    """Stages of options, to which a setting adds its bits and zeros; where it makes sense, and how it is drawn.

    One that is `named` is run where `--recipes` names it, not along with all.
    """

    name: str
    stages: tuple[dict[str, Any], ...]
    prunes: bool = False
    quantises: bool = False
    seeded: bool = True
    unstructured: bool = False
    unpruned: bool = False
    named: bool = False

    def fits(self, bits: int, zeros: str) -> bool:
        """Whether this recipe can make a setting, and is not another recipe there."""
        # a budget deals out zeros, or else bits
        if self.unstructured and (":" in zeros or (not zeros and bits > 4)):
            return False
        if self.unpruned and zeros:
            return False
        return (bool(zeros) or not self.prunes) and (bits < 16 or not self.quantises) and (bits < 16 or bool(zeros))


RECIPES: tuple[Recipe, ...] = (
    Recipe("RTN (magnitude)", ({"method": "rtn", "clip": "mse"},), seeded=False),
    Recipe("Wanda, RTN", ({"method": "wanda", "clip": "mse"},), prunes=True),
    Recipe("sweep (GPTQ, SparseGPT, joint)", (PLAIN,)),
    Recipe("SparseGPT, then GPTQ on the zeros too", ({"zeros": True, **PLAIN}, {"bits": True, **PLAIN}), True, True),
    Recipe(
        "SparseGPT, then GPTQ that keeps them",
        ({"zeros": True, **PLAIN}, {"bits": True, **PLAIN, "mask": "keep"}),
        True,
        True,
    ),
    Recipe("sweep + refine", ({**PLAIN, "refine": 3},)),
    Recipe("sweep to the dense target", ({**PLAIN, "target": "dense"},)),
    Recipe("default", ({},)),
    Recipe("default, budget", ({"budget": "measured"},), unstructured=True),
    Recipe("default, tune", ({"tune": 100},)),
    Recipe("default, budget, tune", ({"budget": "measured", "tune": 100},), unstructured=True),
    Recipe("default, tune, polish", ({"tune": 100, "polish": 80},)),
    Recipe("default, budget, tune, polish", ({"budget": "measured", "tune": 100, "polish": 80},), unstructured=True),
)

# The target's damping as it was before it grew with the columns a token.
RECIPES += tuple(
    replace(
        recipe,
        name=f"{recipe.name}, target damped by 0.05",
        stages=tuple({**stage, "target.SCARCE": 0.0} for stage in recipe.stages),
        named=True,
    )
    for recipe in RECIPES
    if recipe.name.startswith(("default", "sweep to the dense"))
)

# What defaults were chosen among, run by `--defaults`. A key with a dot is a constant of a module of the pass.
VARIANTS = (
    Recipe("default", ({},)),
    *(
        Recipe(f"--{option} {value}", ({option: value},), prunes=prunes)
        for option, values, prunes in (
            ("target", ("own",), False),
            ("refine", (0, 10), False),
            ("clip", ("mse", "minmax"), False),
            ("sequential", ("layer",), False),
            ("damp", (0.001, 0.05), False),
            ("mask", ("sweep",), True),
            ("mask-block", (32, 96), True),
            ("samples", (2, 8, 32, 384), False),
        )
        for value in values
    ),
    *(Recipe(f"--samples {few} --target own", ({"samples": few, "target": "own"},)) for few in (2, 8)),
    *(Recipe(f"--samples {few}, target damped by 0.05", ({"samples": few, "target.SCARCE": 0.0},)) for few in (2, 8)),
    Recipe("--order act", ({"order": "act"},), unpruned=True),
    Recipe("--mask sweep --saliency quant-aware", ({"mask": "sweep", "saliency": "quant-aware"},), prunes=True),
    *(
        Recipe(f"{said} {value}", ({constant: value},), prunes=prunes)
        for said, constant, values, prunes in (
            ("damping of the target", "target.DAMP", (0.0, 0.2), False),
            ("damping of the target by columns a token", "target.SCARCE", (0.0, 20.0), False),
            ("damping of ADMM", "admm.DAMP", (0.001, 0.1), True),
            ("rho of ADMM", "admm.RHO", (0.3, 3.0), True),
        )
        for value in values
    ),
    Recipe("--tune 100", ({"tune": 100},)),
    *(Recipe(f"--tune 100, rate {value}", ({"tune": 100, "tune.RATE": value},), prunes=True) for value in (0.01, 0.04)),
    Recipe("--polish 80", ({"polish": 80},)),
)


def setting(bits: int, zeros: str) -> str:
    return " + ".join(part for part in (f"W{bits}" if bits < 16 else "", zeros) if part)


def cases(recipes: Sequence[Recipe]) -> Iterator[tuple[str, Recipe, list[dict[str, Any]]]]:
    """(setting, recipe, options by stage)."""
    for bits in (16, 8, 4, 3):
        for zeros, asked in ZEROS.items():
            for recipe in recipes:
                if recipe.fits(bits, zeros):
                    yield setting(bits, zeros), recipe, [_options(stage, bits, asked) for stage in recipe.stages]


def _options(stage: dict[str, Any], bits: int, zeros: dict[str, Any]) -> dict[str, Any]:
    """A stage's options: all that the setting asks for, or the part that the stage names."""
    own = {key: value for key, value in stage.items() if key not in ("zeros", "bits")}
    if "zeros" in stage:
        return {"bits": 16, **zeros, **own}
    return {"bits": bits, **({} if "bits" in stage else zeros), **own}


class Texts:
    """The calibration text and the texts to score on, as files in a folder."""

    def __init__(self, folder: Path, others: dict[str, Path]) -> None:
        stories = self._documents(DATA / "tinystories.txt")
        apart = stories[APART // 2 :: APART][:STORIES]
        self.calibration = self._write(folder / "calibration.jsonl", [one for one in stories if one not in set(apart)])
        self.scored = {
            "stories": DATA / "tinystories_heldout.txt",
            "other stories": self._write(folder / "other.jsonl", apart),
        }
        for name, path in others.items():
            lines = [line.strip() for line in path.read_text().splitlines() if len(line) > LINE_CHARACTERS]
            self.scored[name] = self._write(folder / f"{name}.jsonl", lines[:LINES])

    @staticmethod
    def _documents(path: Path) -> list[str]:
        return read_documents(path, Inputs())

    @staticmethod
    def _write(path: Path, documents: list[str]) -> Path:
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return path

    def score(self, model: Path, threads: int) -> dict[str, float]:
        return {
            name: evaluate(model, text=text, threads=threads, per_document="first")["perplexity"]
            for name, text in self.scored.items()
        }


def measure(model: Path, texts: Texts, stages: list[dict[str, Any]], seed: int, given: argparse.Namespace) -> Any:
    """Compress and score once."""
    common = {
        "group-size": given.group_size,
        "samples": given.samples,
        "sequence-length": 256,
        "calibration-text": [str(texts.calibration)],
    }
    constants = {key: value for stage in stages for key, value in stage.items() if "." in key}
    stages = [{key: value for key, value in stage.items() if "." not in key} for stage in stages]
    made = tuple(
        make(number, "compress", {**common, "format": "dense" if number < len(stages) else "pack-quantized", **stage})
        for number, stage in enumerate(stages, 1)
    )
    with tempfile.TemporaryDirectory() as folder, _set(constants):
        out = Path(folder) / "out"
        started = time.process_time()
        document = execute(Run(model, out, made, RunOptions(seed=seed, threads=given.threads)), Silent())
        seconds = time.process_time() - started
        perplexity = texts.score(out, given.threads)
    metrics = document["stages"][-1]["metrics"]
    wanted = ("layer_error_held_out", "error_held_out", "bits_per_weight", "sparsity")
    return {"perplexity": perplexity, **{key: metrics[key] for key in wanted}, "cpu_seconds": round(seconds, 1)}


@contextmanager
def _set(constants: dict[str, Any]) -> Iterator[None]:
    """Constants of the pass's modules at other values, for a while."""
    with ExitStack() as stack:
        for key, value in constants.items():
            module, _, name = key.partition(".")
            stack.enter_context(patch(f"rewright.passes.compress.{module}.{name}", value))
        yield


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {"models": {}}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder for compress.json and compress.md")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="another text to score on")
    parser.add_argument("--settings", default=".*", help="those that this regular expression matches whole")
    parser.add_argument("--defaults", action="store_true", help="other values of options, one at a time")
    parser.add_argument("--recipes", default=".*", help="those that this regular expression matches whole")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    recipes, name = (VARIANTS, "compress-defaults") if given.defaults else (RECIPES, "compress")
    store = given.out / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        texts = Texts(Path(folder), {name: Path(path) for name, _, path in (one.partition("=") for one in given.text)})
        for model in given.models:
            _study(model, texts, recipes, store, given)
    title = "What other defaults of `compress` give" if given.defaults else "What `compress` costs in perplexity"
    (given.out / f"{name}.md").write_text(page(title, load(store), [recipe.name for recipe in recipes]))


def _study(model: Path, texts: Texts, recipes: Sequence[Recipe], store: Path, given: argparse.Namespace) -> None:
    """Every case of a model that is asked for and not there yet; each is on record when it is done."""
    for name, recipe, stages in cases(recipes):
        if not re.fullmatch(given.settings, name):
            continue
        if not re.fullmatch(given.recipes, recipe.name) or (recipe.named and given.recipes == ".*"):
            continue
        for seed in range(given.seeds if recipe.seeded else 1):
            results = load(store)
            found = results["models"].setdefault(model.name, {"runs": []})
            key = {"setting": name, "recipe": recipe.name, "seed": seed}
            if any(all(run[part] == value for part, value in key.items()) for run in found["runs"]):
                continue
            found["dense"] = found.get("dense") or texts.score(model, given.threads)
            found.update(group_size=given.group_size, samples=given.samples)
            try:
                made = measure(model, texts, stages, seed, given)
            except Exception as error:
                # a width that a pattern does not divide, say: the table shows it
                made = {"refused": str(error)}
            found["runs"].append({**key, **made})
            results["machine"] = {**machine("cpu"), "transformers": version("transformers"), "threads": given.threads}
            store.write_text(json.dumps(results, indent=1) + "\n")
            print(model.name, name, recipe.name, seed, made.get("perplexity", made), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
