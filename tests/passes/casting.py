"""Running `cast` in tests, and checkpoints of a few tensors for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.context import Silent
from rewright.passes.pipeline import execute, plan
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run


def cast(src: Path, dst: Path, to: str, **options: Any) -> dict[str, Any]:
    """Run the pass; its part of the document."""
    said = {"to": to, **{key.replace("_", "-"): value for key, value in options.items()}}
    document = execute(Run(src, dst, (make_stage(1, "cast", said),), RunOptions(threads=1)), Silent())
    return dict(document["stages"][0])


def dry(src: Path, to: str, **options: Any) -> dict[str, Any]:
    said = {"to": to, **{key.replace("_", "-"): value for key, value in options.items()}}
    document = plan(Run(src, Path("/nowhere/out"), (make_stage(1, "cast", said),), RunOptions(threads=1)))
    return dict(document["stages"][0])


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every tensor."""
    source = Checkpoint.open(folder)
    return {name: (e.dtype, e.shape, b"".join(source.chunks(name))) for name, e in source.entries.items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], **said: Any) -> Path:
    """A checkpoint of these tensors, with a config that says this."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(said, indent=2))
    return folder


def write_raw(folder: Path, tensors: dict[str, tuple[str, list[int], bytes]], **said: Any) -> Path:
    """The same for dtypes that torch lacks."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {}
    at = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    head = json.dumps(header).encode()
    data = b"".join(data for _, _, data in tensors.values())
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (folder / "config.json").write_text(json.dumps(said))
    return folder
