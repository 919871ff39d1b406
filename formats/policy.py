"""The attached placement policy of a checkpoint (`flexgen-policy/1`), as far as others read it. Stdlib only."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewright.formats.errors import FormatError
from rewright.formats.strict import read_json

FOLDER, FILE = "attachments/flexgen", "policy.json"
SCHEMA = "flexgen-policy/1"
_PARTS = ("checkpoint", "workload", "hardware", "schedule", "compute", "placement", "predicted")


def read_policy(root: Path) -> dict[str, Any] | None:
    """The policy that is attached to the checkpoint in a folder, None where there is none. Raises FormatError."""
    path = root / FOLDER / FILE
    if not os.path.lexists(path):
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise FormatError(f"`{path}` is no `{SCHEMA}`", hint="search again with `rewright flexgen-policy-search`")
    for part in _PARTS:
        if not isinstance(found.get(part), Mapping):
            raise FormatError(f"`{path}` has no `{part}`", hint="search again with `rewright flexgen-policy-search`")
    return found
