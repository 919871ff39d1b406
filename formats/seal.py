"""The last steps of a draft: cross-check, digests, flush, stamp."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.digest import sha256_file
from rewright.formats.files import sync_path, write_file
from rewright.formats.provenance import STAMP


def describe(root: Path, known: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Check that `root` opens as a checkpoint, flush each file and folder; size and sha256 of each file."""
    Checkpoint.open(root)
    files: dict[str, dict[str, Any]] = {}
    for path in walk(root):
        relative = path.relative_to(root).as_posix()
        sync_path(path)
        if path.is_dir():
            continue
        info = path.stat()
        files[relative] = {"size": info.st_size}
        if relative in known:
            files[relative]["sha256"] = known[relative]
        elif info.st_nlink == 1:
            files[relative]["sha256"] = sha256_file(path)
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
