"""The ops that there are: every folder of `kernels/`."""

from __future__ import annotations

from pathlib import Path

OPS = tuple(sorted(path.parent.name for path in Path(__file__).parents[2].glob("kernels/*/triton.py")))
