"""What a stage has finished, one JSON line a unit, each on disk before the next begins."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """Finished units of a stage and what each left behind.

    A record is written after the unit's data is on disk, so what the journal names is there whenever the
    process ends. A line that a kill cut short is dropped, and its unit is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.exists():
            for line in path.read_bytes().splitlines(keepends=True):
                record = self._parse(line)
                if record is None:
                    break
                self.done[record["unit"]] = record["data"]
                whole += len(line)
            os.truncate(path, whole)

    @staticmethod
    def _parse(line: bytes) -> dict[str, Any] | None:
        if not line.endswith(b"\n"):
            return None
        try:
            record = json.loads(line)
        except ValueError:
            return None
        return record if isinstance(record, dict) and {"unit", "data"} <= record.keys() else None

    def record(self, unit: str, data: dict[str, Any]) -> None:
        """Say that `unit` is finished. Returns when the line is on disk."""
        line = json.dumps({"unit": unit, "data": data}, separators=(",", ":")) + "\n"
        with self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[unit] = data
