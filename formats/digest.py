"""Digests of files and of a whole source, read again only where size or time of change differ."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import unreadable
from rewright.formats.shards import INDEX
from rewright.formats.sidecars import matters
from rewright.formats.strict import refuse_pointer

_PIECE = 4 * 2**20


@dataclass(frozen=True, slots=True)
class SourceDigest:
    """`files` maps a path from the root to {"size", "mtime_ns", "sha256"}; `digest` covers names and contents."""

    files: dict[str, dict[str, Any]]
    digest: str


def sha256_file(path: Path, on_bytes: Callable[[int], object] | None = None) -> str:
    """Hexadecimal sha256 of a file, links followed; `on_bytes` hears of each piece read. Raises FormatError."""
    total = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                total.update(piece)
                if on_bytes is not None:
                    on_bytes(len(piece))
    except OSError as error:
        raise unreadable(path, error) from None
    return total.hexdigest()


def source_digest(
    ckpt: Checkpoint,
    known: Mapping[str, Mapping[str, Any]] | None = None,
    on_bytes: Callable[[int], object] | None = None,
) -> SourceDigest:
    """Digest a source by content: weight files, index, config.json, tokenizer files and attachments.

    A file whose size and mtime_ns equal those in `known` (the `files` of an earlier digest) is not read again.
    """
    files: dict[str, dict[str, Any]] = {}
    for relative, path in _parts(ckpt):
        try:
            info = os.stat(path)
        except OSError as error:
            raise unreadable(path, error) from None
        before = (known or {}).get(relative, {})
        if (before.get("size"), before.get("mtime_ns")) == (info.st_size, info.st_mtime_ns):
            sha256 = str(before["sha256"])
        else:
            refuse_pointer(path)
            sha256 = sha256_file(path, on_bytes)
        files[relative] = {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "sha256": sha256}
    total = hashlib.sha256()
    for relative, record in sorted(files.items()):
        total.update(f"{len(relative.encode())}:{relative}:{record['sha256']}\n".encode())
    return SourceDigest(files, total.hexdigest())


def _parts(ckpt: Checkpoint) -> list[tuple[str, Path]]:
    parts = [(file.relative_to(ckpt.root).as_posix(), file) for file in ckpt.files]
    if ckpt.index is not None:
        parts.append((INDEX, ckpt.index))
    for relative, file in ckpt.sidecars():
        if matters(relative):
            parts.append((relative, file))
    return parts
