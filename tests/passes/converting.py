"""Running `convert` in tests, on a tiny model of which half is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewright.passes.context import Silent
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.survey import Run

PACKED, MASKED, DENSE = "pack-quantized", "bitmask-w4", "dense"
HALF: dict[str, Any] = {"method": "rtn", "pattern": "8:16", "group-size": 16}


def convert(src: Path, dst: Path, to: str, **options: Any) -> dict[str, Any]:
    """Run the pass; the document."""
    return execute(Run(src, dst, (make_stage(1, "convert", {"to": to}),), RunOptions(threads=1, **options)), Silent())


def config(folder: Path) -> dict[str, Any]:
    read = json.loads((folder / "config.json").read_text())
    assert isinstance(read, dict)
    return read


def forget(folder: Path) -> Path:
    """Delete what says how a checkpoint was made."""
    (folder / "rewright.json").unlink()
    shutil.rmtree(folder / "reports", ignore_errors=True)
    return folder


def reconfigure(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    found = config(folder)
    edit(found["quantization_config"])
    (folder / "config.json").write_text(json.dumps(found))
    return folder
