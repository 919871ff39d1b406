"""One writer a destination: a lock file made by exclusive creation, which network file systems keep too."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rewright.formats.errors import ConflictError, FormatError
from rewright.formats.files import remove_tree, storage
from rewright.formats.strict import strict_json


@contextlib.contextmanager
def lock(dst: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold `<dst>.lock` for the block; yields its path.

    The file says host, pid and start time of its holder. A holder on this host that no longer runs is taken
    over, and an output that a crash left without its name gets it back.

    Raises ConflictError while another holds it, StorageError when the folder may not be written.
    """
    place = Path(os.path.realpath(dst))
    path = place.with_name(f"{place.name}.lock")
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    record = json.dumps(_this_process()).encode()
    if not _create(path, record):
        _take_over(path, place, record)
    try:
        _recover(place)
        yield path
    finally:
        # Whoever took the lock over by hand keeps it.
        with contextlib.suppress(FileNotFoundError):
            if path.read_bytes() == record:
                path.unlink()


def aside_path(place: Path) -> Path:
    """Where `publish` puts the old output for a moment on a file system that cannot exchange names."""
    return place.with_name(f".{place.name}.aside")


def _recover(place: Path) -> None:
    aside = aside_path(place)
    if not os.path.lexists(aside):
        return
    if os.path.lexists(place):
        remove_tree(aside)
    else:
        with storage(place, "restore"):
            aside.rename(place)


def _create(path: Path, record: bytes) -> bool:
    """Make the lock with its content in one step; False when it is there already."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    with storage(path):
        try:
            draft.write_bytes(record)
            os.link(draft, path)
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            return _create_exclusive(path, record)
        finally:
            draft.unlink(missing_ok=True)


def _create_exclusive(path: Path, record: bytes) -> bool:
    """For file systems without hard links: the content follows a moment after the name."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(fd, record)
    finally:
        os.close(fd)
    return True


def _take_over(path: Path, place: Path, record: bytes) -> None:
    """Replace a dead holder's lock. Raises ConflictError when it lives, or another is taking it over."""
    if not _is_dead(path):
        raise _held(path, place)
    with _sole_taker(path) as sole:
        # Between the look and now another may have taken it.
        if not sole or not _is_dead(path):
            raise _held(path, place)
        with storage(path):
            fresh = path.with_name(f"{path.name}.{os.getpid()}.fresh")
            fresh.write_bytes(record)
            fresh.replace(path)


@contextlib.contextmanager
def _sole_taker(path: Path) -> Iterator[bool]:
    """Whether this process alone may replace the lock, for the block.

    The system's lock on the dead holder's file goes with the process that holds it. File systems that refuse such
    locks get a second file, made exclusively; only there can a kill during the takeover leave work for a person.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            with _guard(path) as made:
                yield made
            return
        # Whoever came first has put another file in its place.
        yield _inode(path) == os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


@contextlib.contextmanager
def _guard(path: Path) -> Iterator[bool]:
    guard = path.with_name(f"{path.name}.takeover")
    if not _create(guard, json.dumps(_this_process()).encode()):
        yield False
        return
    try:
        yield True
    finally:
        guard.unlink(missing_ok=True)


def _held(path: Path, place: Path) -> ConflictError:
    holder = _holder(path) or {}
    who = f"process {holder['pid']} on `{holder['host']}`" if {"pid", "host"} <= holder.keys() else "another run"
    return ConflictError(
        f"`{place}` is being written by {who}", hint=f"wait for it; if it is gone for certain, delete `{path}`"
    )


def _holder(path: Path) -> dict[str, Any] | None:
    try:
        found = strict_json(path.read_bytes(), "the lock")
    except (OSError, FormatError):
        return None
    return found if isinstance(found, dict) else None


def _is_dead(path: Path) -> bool:
    """Whether the holder ran in this very process space and is gone; anything uncertain counts as alive."""
    holder = _holder(path)
    if holder is None:
        return False
    here = _this_process()
    if any(holder.get(key) != here[key] for key in ("host", "machine", "space")):
        return False
    if holder.get("boot") != here["boot"]:
        return True
    pid = holder.get("pid")
    if type(pid) is not int or pid <= 0:
        return False
    started = _started(pid)
    return started is None or (started != "running" and started != holder.get("started"))


def _this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _read("/etc/machine-id"),
        "pid": pid,
        "started": _started(pid),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
    }


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number: its start in clock ticks; None when it is gone."""
    text = _read(f"/proc/{pid}/stat")
    if text is not None:
        # The command's name may hold blanks and brackets: the fields start after the last bracket.
        fields = text.rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None
