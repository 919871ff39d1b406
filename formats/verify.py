"""Check any file or folder: structure always, digests where a stamp has them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file
from rewright.formats.errors import FormatError
from rewright.formats.header import read_header
from rewright.formats.provenance import STAMP
from rewright.formats.shards import INDEX, PICKLES, SINGLE
from rewright.formats.strict import read_json, refuse_pointer, regular_size


@dataclass(slots=True)
class Report:
    """What was checked and what is wrong; `problems` and `warnings` are lines, `nbytes` counts tensor data."""

    path: str
    files: int = 0
    tensors: int = 0
    nbytes: int = 0
    digests: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def plain(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "path": self.path,
            "ok": self.ok,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "digests": self.digests,
            "problems": list(self.problems),
            "warnings": list(self.warnings),
        }


def verify(path: str | os.PathLike[str], on_bytes: Callable[[int], object] | None = None) -> Report:
    """Check `path`; a problem is reported, never raised, except FormatError when nothing is there.

    A file: a safetensors header against its size, JSON strictly, no Git LFS pointer. A folder: each file
    like that, the checkpoint as a whole, and against its stamp the presence, size and digest of every file.
    """
    path = Path(path)
    report = Report(str(path))
    if not path.is_dir():
        regular_size(path)
        _check_file(path, report)
        return report
    if any(os.path.lexists(path / name) for name in (SINGLE, INDEX, "config.json")):
        _collect(report, lambda: _check_checkpoint(path, report, on_bytes))
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if name not in (".git", ".cache"))
        for name in sorted(names):
            _check_file(Path(folder, name), report)
    if report.files == 0:
        report.problems.append(f"`{path}` holds no files")
    return report


def _collect(report: Report, check: Callable[[], None]) -> None:
    try:
        check()
    except FormatError as error:
        if error.message not in report.problems:
            report.problems.append(error.message)


def _check_file(path: Path, report: Report) -> None:
    report.files += 1
    _collect(report, lambda: _check_content(path, report))


def _check_content(path: Path, report: Report) -> None:
    regular_size(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        report.tensors += len(header.tensors)
        report.nbytes += sum(info.end - info.start for info in header.tensors.values())
    elif path.suffix == ".json":
        read_json(path)
    elif path.suffix in PICKLES:
        report.warnings.append(f"`{path}` may be a pickle and was not looked into")
    refuse_pointer(path)


def _check_checkpoint(path: Path, report: Report, on_bytes: Callable[[int], object] | None) -> None:
    ckpt = Checkpoint.open(path)
    report.warnings += ckpt.warnings
    if ckpt.config is None:
        report.warnings.append(f"`{path}` has no `config.json`")
    if ckpt.stamp is None:
        return
    files = ckpt.stamp.get("files")
    if not isinstance(files, dict):
        raise FormatError(f"`{path / STAMP}` lists no files")
    extra = sorted({relative for relative, _ in ckpt.sidecars()} - files.keys())
    if extra:
        report.warnings.append(f"{len(extra)} files are not in the stamp, the first `{extra[0]}`")
    for relative, record in files.items():
        _collect(report, lambda r=relative, d=record: _check_record(path, r, d, report, on_bytes))  # type: ignore[misc] # defaults bind the loop's values


def _check_record(
    root: Path, relative: str, record: Any, report: Report, on_bytes: Callable[[int], object] | None
) -> None:
    if relative.startswith("/") or ".." in relative.split("/") or not isinstance(record, dict):
        raise FormatError(f"`{root / STAMP}` names the file `{relative}`, which is not inside the checkpoint")
    file = root / relative
    size = regular_size(file)
    if size != record.get("size"):
        raise FormatError(f"`{file}` has {size} bytes, but the stamp says {record.get('size')}")
    if "sha256" in record:
        report.digests += 1
        if sha256_file(file, on_bytes) != record["sha256"]:
            raise FormatError(f"`{file}` is not the file that was stamped: its digest differs")
