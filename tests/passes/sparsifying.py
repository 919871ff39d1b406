"""Running `dejavu-predictor-train` in tests, and looking at what it attached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rewright.formats import dejavu
from rewright.formats.checkpoint import Checkpoint
from rewright.passes.context import Silent
from rewright.passes.loading import load
from rewright.passes.models.sparse import flow_of
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run

PASS = "dejavu-predictor-train"
STORIES = Path(__file__).resolve().parent.parent / "data" / "opt-stories"
QUICK: dict[str, Any] = {"tokens": 4096, "sequence-length": 64, "rank": "8"}


def said(text: Path, **options: Any) -> dict[str, Any]:
    """A stage's words as a recipe has them: quick ones."""
    plain = {**QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
    plain = {key: value for key, value in plain.items() if value is not None}
    return {**plain, "calibration-text": [str(text)]}


def train(src: Path, dst: Path, text: Path, **options: Any) -> dict[str, Any]:
    """Run the pass; its part of the document."""
    run = {key: options.pop(key) for key in ("seed", "update", "require") if key in options}
    stage = make_stage(1, PASS, said(text, **options))
    document = execute(Run(src, dst, (stage,), RunOptions(threads=1, **run)), Silent())
    return dict(document["stages"][0])


def words(text: Path, **options: Any) -> list[str]:
    """The same as words of a command line."""
    found = []
    for key, value in said(text, **options).items():
        for one in value if isinstance(value, list) else [value]:
            found += [f"--{key}", str(one)]
    return found


def attached(folder: Path) -> dejavu.Attached:
    """What is attached to a checkpoint."""
    found = dejavu.attached(Checkpoint.open(folder))
    assert found is not None
    return found


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "reports" / f"{PASS}.json").read_text())
    assert isinstance(found, dict)
    return found


def tokens(count: int = 48, rows: int = 2) -> torch.Tensor:
    """Tokens that no text has in this order, (rows, count)."""
    return torch.randint(3, 512, (rows, count), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def decoded(model: Any, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """Logits of ids (rows, length): of the first `prefix` at once, of the rest one by one."""
    from rewright.passes.models.running import new_cache

    cache = new_cache(model)
    parts = [ids[:, :prefix], *ids[:, prefix:].split(1, dim=1)]
    return torch.cat([model(input_ids=part, use_cache=True, **cache).logits for part in parts], dim=1)


@torch.inference_mode()
def at_once(model: Any, ids: torch.Tensor, prefix: int) -> torch.Tensor:
    """The same logits from one forward that chooses as decoding does after `prefix` tokens."""
    flow = flow_of(model)
    assert flow is not None
    with flow.scored(prefix):
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@torch.inference_mode()
def dense(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the model without its predictors, in float32."""
    model, _ = load(folder, torch.float32, predictors=False)
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found
