"""How a finished draft takes its destination's name: whole, once, or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from rewright.formats.errors import ConflictError, OverlapError, StorageError
from rewright.formats.files import SCRATCH, free_bytes, remove_tree, storage_error, sync_path
from rewright.formats.locks import aside_path, lock

__all__ = ["check_apart", "discard", "ensure_room", "lock", "partial_path", "publish"]

_AT_FDCWD = -100
_NOREPLACE = 1
_EXCHANGE = 2
_ELSEWHERE = "write to another folder"
_REFUSED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}

discard = remove_tree


def partial_path(dst: str | os.PathLike[str]) -> Path:
    """Where the draft of `dst` is built: beside it, on the same file system. A link `dst` is followed."""
    place = _place(dst)
    return place.with_name(f"{place.name}.partial")


def check_apart(src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    """Refuse (OverlapError) a destination that is the source, is inside it, holds it, or holds files it links to.

    Compares what names resolve to, and device and inode, so that links and bind mounts do not hide it.
    """
    sources = [Path(os.path.realpath(src))]
    if sources[0].is_file():
        # A bare file beside a config is read with its folder, wherever a link says that is.
        beside = (Path(os.path.realpath(Path(src).parent)), sources[0].parent)
        sources += [folder for folder in beside if (folder / "config.json").exists()]
    place = _place(dst)
    # What stands at the draft's name is partial work to this run, and may be deleted.
    for target in (place, partial_path(dst), aside_path(place)):
        for source in sources:
            _check_pair(source, target, src, dst)
        _check_links(sources[-1], target)


def _check_pair(source: Path, target: Path, src: str | os.PathLike[str], dst: str | os.PathLike[str]) -> None:
    if _same(source, target):
        raise OverlapError(f"source and destination are the same, `{target}`", hint=_ELSEWHERE)
    if any(_same(source, above) for above in target.parents):
        raise OverlapError(f"the destination `{dst}` is inside the source `{src}`", hint=_ELSEWHERE)
    if any(_same(target, above) for above in source.parents):
        raise OverlapError(f"the source `{src}` is inside the destination `{target}`", hint=_ELSEWHERE)


def _check_links(source: Path, target: Path) -> None:
    """Refuse a source with a link to something below the destination: replacing that changes the source."""
    if not target.exists():
        return
    for folder, folders, files in os.walk(source):
        for path in (Path(folder, name) for name in folders + files):
            if path.is_symlink():
                real = Path(os.path.realpath(path))
                if any(_same(target, above) for above in (real, *real.parents)):
                    raise OverlapError(f"`{path}` is a link into the destination `{target}`", hint=_ELSEWHERE)


def ensure_room(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raise StorageError unless `nbytes` more bytes fit where `path` is or would be."""
    free = free_bytes(Path(path))
    if nbytes > free:
        raise StorageError(
            f"`{path}` needs {nbytes} bytes and its disk has {free} free",
            hint="free some space, or write to another disk",
        )


def publish(ready: str | os.PathLike[str], dst: str | os.PathLike[str], replace: bool) -> None:
    """Give the sealed directory `ready` the name `dst`; both are on one file system.

    When something was replaced, `ready` holds it afterwards: check, then `discard` it. Raises ConflictError when
    `dst` exists and `replace` is false, or `dst` is not a directory; StorageError when the system refuses.
    """
    ready, dst = Path(ready), _place(dst)
    # A crash just after the stamp may have left these.
    for scratch in ready.glob(f"{SCRATCH}*"):
        remove_tree(scratch)
    try:
        if os.path.lexists(dst):
            _replace(ready, dst, replace)
        else:
            _first(ready, dst)
    except OSError as error:
        raise storage_error(error, dst, "publish") from error
    sync_path(dst.parent)


def _first(ready: Path, dst: Path) -> None:
    try:
        _renameat2(ready, dst, _NOREPLACE)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise _exists(dst) from None
        if error.errno not in _REFUSED:
            raise
        ready.rename(dst)


def _replace(ready: Path, dst: Path, replace: bool) -> None:
    if not replace:
        raise _exists(dst)
    if not dst.is_dir():
        raise ConflictError(f"`{dst}` exists and is not a folder", hint="choose another destination")
    try:
        _renameat2(ready, dst, _EXCHANGE)
        return
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
    aside = aside_path(dst)
    remove_tree(aside)
    dst.rename(aside)
    try:
        ready.rename(dst)
    except OSError:
        aside.rename(dst)
        raise
    aside.rename(ready)


def _exists(dst: Path) -> ConflictError:
    return ConflictError(f"`{dst}` exists", hint="choose another destination, or replace it with `--force`")


def _renameat2(old: Path, new: Path, flags: int) -> None:
    """The system call of that name. Raises OSError; ENOSYS where there is none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(new))
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(new))


def _place(dst: str | os.PathLike[str]) -> Path:
    place = Path(os.path.realpath(dst))
    if not place.name:
        raise ConflictError(f"`{dst}` cannot be a destination", hint="name a folder that is not there yet")
    return place


def _same(one: Path, other: Path) -> bool:
    if one == other:
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False
