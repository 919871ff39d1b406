"""The last steps of a draft: cross-check, digests, flush, stamp."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file
from rewright.formats.errors import FormatError
from rewright.formats.files import SCRATCH, remove_tree, sync_path, write_file
from rewright.formats.provenance import STAMP


def describe(root: Path, known: Mapping[str, str | None]) -> dict[str, dict[str, Any]]:
    """Check that `root` opens as a checkpoint, flush each file and folder; size and sha256 of each file.

    A file in `known` takes the digest there, or none for None. Scratch files are left out.
    """
    paths = [path for path in walk(root) if not path.name.startswith(SCRATCH)]
    for path in paths:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise FormatError(f"`{path}` is neither a file nor a folder, and a checkpoint holds nothing else")
    Checkpoint.open(root)
    files: dict[str, dict[str, Any]] = {}
    for path in paths:
        relative = path.relative_to(root).as_posix()
        sync_path(path)
        if path.is_dir():
            continue
        info = path.stat()
        files[relative] = {"size": info.st_size}
        digest = known[relative] if relative in known else sha256_file(path)
        if digest is not None:
            files[relative]["sha256"] = digest
    return files


def walk(root: Path) -> Iterator[Path]:
    """Every file and folder below `root`, sorted, folders after what they hold."""
    for folder, folders, names in os.walk(root, topdown=False):
        for name in sorted(names) + sorted(folders):
            yield Path(folder, name)


def write_stamp(root: Path, document: Mapping[str, Any]) -> None:
    """Write the stamp. Raises ValueError when it holds what JSON cannot, such as NaN."""
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    write_file(root / STAMP, (text + "\n").encode("utf-8"))


def sweep(root: Path) -> None:
    """Remove scratch files, also those that a crash left behind."""
    for path in list(walk(root)):
        if path.name.startswith(SCRATCH):
            remove_tree(path)
