"""Running `compress` in tests, and looking at what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rewright.kernels.pack import unpack
from rewright.passes.context import Silent
from rewright.passes.pipeline import execute, plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run
from tests.passes.conftest import STORIES

QUICK = {"samples": 8, "sequence-length": 64, "group-size": 16}


def compress(src: Path, dst: Path, text: Path | None = None, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the pass; the run's document and its warnings."""
    run_options = {key: options.pop(key) for key in ("seed", "dtype", "force") if key in options}
    plain = {**QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
    if text is not None:
        plain["calibration-text"] = [str(text)]
    reporter = Silent()
    stage = make_stage(1, "compress", plain)
    return execute(Run(src, dst, (stage,), RunOptions(threads=1, **run_options)), reporter), reporter.warnings


def report(dst: Path) -> dict[str, Any]:
    return json.loads((dst / "reports/compress.json").read_text())


def logits(model: Any) -> torch.Tensor:
    tokens = torch.randint(3, 512, (3, 33), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def plain(path: Path, **options: Any) -> torch.Tensor:
    """Logits through transformers alone."""
    return logits(AutoModelForCausalLM.from_pretrained(path, **options).eval())


def zeros(folder: Path) -> dict[str, int]:
    """Zero codes of each packed matrix, counted from the file."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name in tensors:
        if name.endswith(".weight_packed"):
            shape = tensors[name.replace("_packed", "_shape")]
            found[name] = int((unpack(tensors[name], 4, int(shape[1])) == 0).sum())
    return found


def change(src: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Edit a checkpoint's tensors in place."""
    tensors = load_file(src / "model.safetensors")
    edit(tensors)
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    return src


def plan_words(said: dict[str, Any]) -> None:
    stage = make_stage(1, "compress", said)
    plan(Run(STORIES, Path("/nowhere/out"), (stage,), RunOptions()))
