"""The folder of partial work beside a destination: whose work it is, how far it is, and how it ends."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewright.formats import publish
from rewright.formats.errors import ConflictError
from rewright.formats.files import SCRATCH, storage, write_file
from rewright.formats.provenance import STAMP, read_stamp
from rewright.passes import keys
from rewright.passes.journal import journals
from rewright.passes.machine import usable_cpus

RECORD = "run.json"


@dataclass(frozen=True, slots=True)
class Workspace:
    """`<dst>.partial` as it stands.

    `record` tells of the run that began it: None where none has, empty where its file says nothing to be read.
    """

    path: Path
    record: dict[str, Any] | None

    @classmethod
    def beside(cls, dst: Path) -> Workspace:
        """Look at the partial work of a destination. Raises ConflictError for a folder that is not Rewright's."""
        path = publish.partial_path(dst)
        data = _record(path)
        if data is None and not _is_unbegun(path):
            # another process of this run may have begun it between the two looks
            data = _record(path)
            if data is None:
                raise _foreign(path)
        if data is None:
            return cls(path, None)
        try:
            found = json.loads(data)
        except ValueError:
            found = {}
        return cls(path, found if isinstance(found, dict) else {})

    def continues(self, key: str, forced: bool) -> bool:
        """Whether a run of this key goes on from here. A forced run takes nothing but what it began itself."""
        record = self.record or {}
        return record.get("key") == key and (record.get("forced") is True or not forced)

    @property
    def threads(self) -> int:
        """The number of threads the run was begun with."""
        found = (self.record or {}).get("threads")
        return found if isinstance(found, int) and found > 0 else usable_cpus()

    def holds_work(self) -> bool:
        """Whether something is finished in it, be it one unit of a stage."""
        found = (journal for folder in self.path.glob("*.work") for journal in journals(folder))
        return any(journal.stat().st_size for journal in found) or any(self.path.glob(f"*/{STAMP}"))

    def is_left_over(self, dst: Path) -> bool:
        """Whether nobody needs it: its result is published, or it was never begun."""
        if self.record is None:
            return self.path.is_dir()
        try:
            return self.record.get("publishing") == os.stat(dst).st_ino
        except OSError:
            return False

    def refuse_other(self, run: Mapping[str, Any]) -> None:
        """Raise ConflictError: the partial work is of another run than the one recorded as `run`."""
        differing = keys.differences((self.record or {}).get("run"), run)
        raise ConflictError(
            f"partial work at `{self.path}` is from another run: {'; '.join(differing)}",
            hint="repeat that run to finish it, or add `--force` to drop it",
        )

    def begin(self, record: dict[str, Any]) -> Workspace:
        """Put the record of a new run there. Raises StorageError."""
        write_file(self.path / RECORD, json.dumps(record, indent=1).encode())
        return Workspace(self.path, record)

    def folder(self, number: int, name: str) -> Path:
        """Where a stage's checkpoint is made."""
        return self.path / f"{number}-{name}"

    def scratch(self, number: int, name: str) -> Path:
        """Where a stage keeps its journal and scratch files."""
        return self.path / f"{number}-{name}.work"

    def finished(self, names: Sequence[str]) -> tuple[int, list[dict[str, Any]]]:
        """How many of the stages, by their passes' names, are done, and the records of those."""
        for number in range(len(names), 0, -1):
            folder = self.folder(number, names[number - 1])
            stamp = read_stamp(folder) if folder.is_dir() else None
            if stamp is not None:
                return number, stamp["stages"]
        return 0, []

    def publish(self, final: Path, dst: Path, replace: bool) -> None:
        """Give the last stage's checkpoint the destination's name, and delete the rest."""
        assert self.record is not None
        self.begin({**self.record, "publishing": os.stat(final).st_ino})
        publish.publish(final, dst, replace)
        self.drop()

    def drop(self) -> None:
        """Delete the folder, its record last: what a kill leaves of it is known for what it is."""
        if self.path.is_dir():
            with storage(self.path, "delete"):
                names = [name for name in os.listdir(self.path) if name != RECORD]
            for name in names:
                publish.discard(self.path / name)
        publish.discard(self.path)


def _record(path: Path) -> bytes | None:
    """The record's bytes, or None where there is none."""
    try:
        return (path / RECORD).read_bytes()
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise _foreign(path) from None


def _is_unbegun(path: Path) -> bool:
    """Whether a folder without a record may be ours: only where it is empty, or holds a record being written."""
    try:
        names = os.listdir(path)
    except FileNotFoundError:
        return True
    return all(name.startswith(SCRATCH) for name in names)


def _foreign(path: Path) -> ConflictError:
    return ConflictError(
        f"`{path}` is in the way, and is not Rewright's", hint="move it, or choose another destination"
    )
