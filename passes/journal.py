"""What a stage has finished, one JSON line a unit, each on disk before the next begins."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rewright.formats.files import storage, sync_path

Ran = dict[str, list[str]]


class Journal:
    """Finished units of a stage and what each left behind.

    A record is written after the unit's data is on disk, so what the journal names is there whenever the
    process ends. A line that a kill cut short is dropped, and its unit is done again. Each line also has what a
    resumed run must not forget: the seconds spent so far, and which implementation of each op ran (`ran` tells).
    """

    def __init__(self, path: Path, ran: Callable[[], Mapping[str, list[str]]] = dict) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = {}
        self._ran = ran
        self._ran_before: Ran = {}
        self._spent_before = 0.0
        self._started = time.monotonic()
        with storage(path):
            fresh = not path.exists()
            self._read(b"" if fresh else path.read_bytes())
        if fresh:
            sync_path(path.parent)

    def _read(self, data: bytes) -> None:
        """Take in the whole lines, and cut off what follows them."""
        whole = 0
        for line in data.splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            self.done[record["unit"]] = record["data"]
            self._spent_before, self._ran_before = record["seconds"], record["ran"]
            whole += len(line)
        with self.path.open("ab") as file:
            file.truncate(whole)

    @property
    def seconds(self) -> float:
        """Time spent on the stage, by this process and by those before it up to their last record."""
        return self._spent_before + time.monotonic() - self._started

    @property
    def ran(self) -> Ran:
        """The implementations that ran for each op, in this process and in those before it."""
        here = self._ran()
        return {
            op: sorted({*self._ran_before.get(op, ()), *here.get(op, ())}) for op in sorted({*self._ran_before, *here})
        }

    def record(self, unit: str, data: dict[str, Any]) -> None:
        """Say that `unit` is finished. Returns when the line is on disk. Raises StorageError."""
        said = {"unit": unit, "data": data, "seconds": round(self.seconds, 3), "ran": self.ran}
        line = json.dumps(said, separators=(",", ":")) + "\n"
        with storage(self.path), self.path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.done[unit] = data


_KINDS: dict[str, type | tuple[type, ...]] = {"unit": str, "data": dict, "seconds": (int, float), "ran": dict}


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole record, or None."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in _KINDS.items())
    return record if whole else None
