"""Bytes on disk: whole writes, copies, flushes, and one way to say why they failed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from rewright.formats.errors import StorageError, reason, unreadable

CHUNK = 16 * 2**20
# Names of ours that are never part of a checkpoint; what a crash left of them goes when a draft is sealed.
SCRATCH = ".rewright-"
_FICLONE = 0x40049409
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def storage(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an OSError of the block into a StorageError about `path`."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, doing) from error


def storage_error(error: OSError, path: Path, doing: str = "write") -> StorageError:
    """A StorageError that says what failed; for a full disk also how much is free."""
    if error.errno in _FULL:
        return StorageError(
            f"cannot {doing} `{path}`: {reason(error)}, {free_bytes(path)} bytes are free",
            hint="free some space, or write to another disk",
        )
    hint = "choose a place that you may write to" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None
    return StorageError(f"cannot {doing} `{path}`: {reason(error)}", hint=hint)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` is or would be."""
    path = Path(os.path.abspath(path))
    while not path.exists() and path != path.parent:
        path = path.parent
    info = os.statvfs(path)
    return info.f_bavail * info.f_frsize


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """`pwrite` until everything is written. Raises OSError."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view[: 2**30], offset)
        view, offset = view[done:], offset + done


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; returns the bytes read, fewer only at the end of the file. Raises OSError."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done : done + 2**30]], offset + done)
        if got == 0:
            break
        done += got
    return done


def copy_file(source: Path, target: Path) -> None:
    """Copy bytes, links followed, into a regular file with the umask's mode; shares blocks where the disk can.

    Raises FormatError when the source cannot be read, StorageError when the target cannot be written.
    """
    try:
        reader = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(source, error) from None
    try:
        with storage(target), _fresh(target) as writer:
            try:
                fcntl.ioctl(writer, _FICLONE, reader)
            except OSError:
                _copy_bytes(reader, writer)
    finally:
        os.close(reader)


def _copy_bytes(reader: int, writer: int) -> None:
    at = 0
    while data := os.pread(reader, CHUNK, at):
        write_all(writer, data, at)
        at += len(data)


def write_file(target: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises StorageError."""
    aside = target.with_name(f"{SCRATCH}{target.name}")
    with storage(target):
        with _fresh(aside) as writer:
            write_all(writer, data, 0)
            os.fsync(writer)
        aside.replace(target)


@contextlib.contextmanager
def _fresh(target: Path) -> Iterator[int]:
    """A new file at `target`. What was there is unlinked first: it may be a link, hard or soft, to another's bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    fd = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def sync_path(path: Path) -> None:
    """Flush a file or a directory to the disk. Raises StorageError."""
    with storage(path, "flush"):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems do not flush directories: nothing more can be done there.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
                raise
        finally:
            os.close(fd)


def remove_tree(path: Path) -> None:
    """Delete a directory, a file or a link, or nothing when it is not there. Raises StorageError."""
    with storage(path, "delete"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
