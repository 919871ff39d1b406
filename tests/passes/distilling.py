"""Running `hyena-distill` in tests, and banks of impulse responses for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rewright.passes.context import Silent
from rewright.passes.pipeline import execute, plan
from rewright.passes.recipe import make
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run


def distill(src: Path, dst: Path, require: tuple[str, ...] = (), **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the pass, with little polish unless said otherwise; its part of the document, and the warnings."""
    reporter = Silent()
    asked = RunOptions(threads=1, require=require)
    document = execute(Run(src, dst, (make(1, "hyena-distill", said(**options)),), asked), reporter)
    return dict(document["stages"][0]), reporter.warnings


def dry(src: Path, **options: Any) -> dict[str, Any]:
    """What a dry run says of the pass."""
    stage = make(1, "hyena-distill", said(**options))
    return dict(plan(Run(src, Path("/nowhere/out"), (stage,), RunOptions(threads=1)))["stages"][0])


def said(**options: Any) -> dict[str, Any]:
    plain = {key.replace("_", "-"): value for key, value in {"refine": 4, **options}.items()}
    return {key: str(value) if isinstance(value, Path) else value for key, value in plain.items()}


def words(src: Path, dst: Path, **options: Any) -> list[str | Path]:
    """The same as words of a command line."""
    flags = [word for key, value in said(**options).items() for word in (f"--{key}", str(value))]
    return ["hyena-distill", "--threads", "1", src, dst, *flags]


def waves(filters: int, pairs: int, length: int, seed: int = 0) -> torch.Tensor:
    """Sums of so many decaying pairs, float64 [filters, length]: recurrences of twice as many states."""
    draw = torch.Generator().manual_seed(seed)
    decay, angle = (torch.rand(2, filters, pairs, generator=draw, dtype=torch.float64) + 0.02).unbind()
    residues = torch.randn(filters, pairs, generator=draw, dtype=torch.complex128)
    exponents = torch.complex(-0.1 * decay, 3 * angle)[..., None] * torch.arange(length)
    return (residues[..., None] * exponents.exp()).sum(1).real


def bank(path: Path, **tensors: torch.Tensor) -> Path:
    """A file of impulse responses."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def report(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "reports" / "hyena-distill.json").read_text())
    assert isinstance(found, dict)
    return found
