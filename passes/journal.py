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
    Each process of a run, by `rank`, writes a journal of its own and begins with what all journals say, so that a run
    goes on with any number of processes.
    """

    def __init__(self, folder: Path, ran: Callable[[], Mapping[str, list[str]]] = dict, *, rank: int = 0) -> None:
        self.path = folder / (f"journal-{rank}.jsonl" if rank else "journal.jsonl")
        self.done: dict[str, dict[str, Any]] = {}
        self._ran = ran
        self._ran_before: Ran = {}
        self._spent_before = 0.0
        self._started = time.monotonic()
        with storage(self.path):
            fresh = not self.path.exists()
            for path in journals(folder):
                if path != self.path:
                    self._read(path.read_bytes())
            whole = self._read(b"" if fresh else self.path.read_bytes())
            with self.path.open("ab") as file:
                file.truncate(whole)
        if fresh:
            sync_path(folder)

    def _read(self, data: bytes) -> int:
        """Take in the whole lines; returns their bytes."""
        whole, seconds = 0, 0.0
        for line in data.splitlines(keepends=True):
            record = _parse(line)
            if record is None:
                break
            self.done[record["unit"]] = record["data"]
            seconds, ran = record["seconds"], record["ran"]
            self._ran_before = {op: sorted({*self._ran_before.get(op, ()), *ran.get(op, ())}) for op in ran}
            whole += len(line)
        self._spent_before = max(self._spent_before, seconds)
        return whole

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


def journals(folder: Path) -> list[Path]:
    """The journals of a stage, one for each process that has worked on it."""
    return sorted(folder.glob("journal*.jsonl"))


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
