"""Room for weight files: headers written and every byte reserved before the first tensor comes."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from rewright.formats.errors import ConflictError, StorageError
from rewright.formats.files import free_bytes, storage_error, write_all
from rewright.formats.layout import Shard

_NO_FALLOCATE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def reserve(root: Path, shards: Sequence[Shard]) -> set[str]:
    """Create each shard with its header and full size; returns the names of those that were there already.

    Raises StorageError with needed and free bytes, ConflictError when a file has another header. A file that a
    crash left without a header is made anew; none of this call's files stay when the disk is too small.
    """
    kept = {shard.file for shard in shards if _is_kept(root / shard.file, shard)}
    fresh = [shard for shard in shards if shard.file not in kept]
    needed = sum(shard.size for shard in fresh)
    free = free_bytes(root)
    if needed > free:
        raise _too_small(root, needed, free)
    for at, shard in enumerate(fresh):
        try:
            _create(root / shard.file, shard)
        except OSError as error:
            for made in fresh[: at + 1]:
                (root / made.file).unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _too_small(root, needed, free_bytes(root)) from error
            raise storage_error(error, root / shard.file) from error
    return kept


def open_shard(path: Path) -> int:
    """A descriptor to read and write a shard that `reserve` made. Raises StorageError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise storage_error(error, path) from error


def _is_kept(path: Path, shard: Shard) -> bool:
    if not path.exists():
        return False
    with path.open("rb") as file:
        head = file.read(len(shard.header))
    if head == shard.header and path.stat().st_size == shard.size:
        return True
    # The length field is written last: zeros there mean that no tensor ever was.
    if not any(head[:8]):
        return False
    raise ConflictError(
        f"`{path}` is partial work of another layout", hint="finish that run with its own options, or delete the folder"
    )


def _create(path: Path, shard: Shard) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(fd, 0, shard.size)
        except OSError as error:
            if error.errno not in _NO_FALLOCATE:
                raise
            os.ftruncate(fd, shard.size)
        write_all(fd, shard.header[8:], 8)
        write_all(fd, shard.header[:8], 0)
    finally:
        os.close(fd)


def _too_small(root: Path, needed: int, free: int) -> StorageError:
    return StorageError(
        f"`{root}` needs {needed} bytes and its disk has {free} free",
        hint="free some space, or write to another disk",
    )
