"""Running `prompt` in tests, looking at what it attached, and its parts one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.peft import FOLDER, TENSOR, WEIGHTS
from rewright.passes.context import Context, Silent
from rewright.passes.inputs import Inputs
from rewright.passes.journal import Journal
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run

QUICK: dict[str, Any] = {"tokens": 4, "steps": 8, "batch-size": 4, "sequence-length": 32}


def said(text: Path | list[Path] | None = None, **options: Any) -> dict[str, Any]:
    """A stage's words as a recipe has them: quick ones, with another length of the text where one is given."""
    quick = {} if options.get("steps") == 0 else dict(QUICK)
    plain = {**quick, **{key.replace("_", "-"): value for key, value in options.items()}}
    if plain.get("init") not in (None, "text", "vocab", "random"):
        plain.setdefault("tokens", None)
    if text is not None:
        plain["text"] = [str(one) for one in (text if isinstance(text, list) else [text])]
    return {
        key: value if isinstance(value, int | float | list) else str(value)
        for key, value in plain.items()
        if value is not None
    }


def prompt(
    src: Path, dst: Path, text: Path | list[Path] | None = None, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    """Run the pass; its part of the document, and the warnings."""
    run = {key: options.pop(key) for key in ("seed", "dtype", "update", "require") if key in options}
    reporter = Silent()
    stage = make_stage(1, "prompt", said(text, **options))
    document = execute(Run(src, dst, (stage,), RunOptions(threads=1, **run)), reporter)
    return dict(document["stages"][0]), reporter.warnings


def words(text: Path | list[Path] | None = None, **options: Any) -> list[str]:
    """The same as words of a command line."""
    found = []
    for key, value in said(text, **options).items():
        for one in value if isinstance(value, list) else [value]:
            found += [f"--{key}", str(one)]
    return found


def attached(folder: Path) -> torch.Tensor:
    """The tensor that a checkpoint has attached."""
    return load_file(folder / FOLDER / WEIGHTS)[TENSOR]


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "reports" / "prompt.json").read_text())
    assert isinstance(found, dict)
    return found


def context(folder: Path, source: Path, seed: int = 0) -> Context:
    """What the pass is handed when it stands alone."""
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        seed=seed,
        device=torch.device("cpu"),
        dtype="f32",
        threads=1,
        reporter=Silent(),
        journal=Journal(folder),
        inputs=Inputs(),
        work=folder,
        origin=Checkpoint.open(source),
    )
