"""The stamp of a finished checkpoint: the file that a run writes last."""

from __future__ import annotations

import os
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
