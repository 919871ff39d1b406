"""The stamp of a finished checkpoint: the file that a run writes last."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewright.formats.errors import FormatError
from rewright.formats.strict import read_json

STAMP = "rewright.json"


def read_stamp(directory: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The stamp in `directory`, fields of later versions kept; None where there is none. Raises FormatError."""
    path = Path(directory) / STAMP
    if not os.path.lexists(path):
        return None
    stamp = read_json(path)
    if not isinstance(stamp, dict):
        raise FormatError(f"`{path}` is not an object")
    return stamp


def history(stamp: Mapping[str, Any] | None) -> tuple[dict[str, Any], ...]:
    """The records of the stages that a stamp names, oldest first: those that made its source, then its own.

    Never raises: what is damaged tells nothing.
    """
    stamp = stamp or {}
    source = stamp.get("source")
    before = source.get("stages") if isinstance(source, Mapping) else None
    found = [stages for stages in (before, stamp.get("stages")) if isinstance(stages, list)]
    return tuple(stage for stages in found for stage in stages if isinstance(stage, dict))
