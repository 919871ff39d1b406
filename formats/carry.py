"""What a draft takes over from its source: sidecars copied, weights linked."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.errors import FormatError
from rewright.formats.files import SCRATCH, copy_file, remove_tree, storage, storage_error
from rewright.formats.shards import INDEX, SINGLE
from rewright.formats.sidecars import matters
from rewright.formats.strict import refuse_pointer, regular_size

_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EACCES}


def carry_sidecars(src: Checkpoint, target: Path) -> list[str]:
    """Copy the sidecars into `target`, links followed; returns what stays behind."""
    sidecars = src.sidecars()
    by_fold: dict[str, str] = {}
    for relative, file in sidecars:
        regular_size(file)
        if matters(relative):
            refuse_pointer(file)
        twin = by_fold.setdefault(relative.casefold(), relative)
        if twin != relative and not tells_case(target):
            raise FormatError(
                f"`{twin}` and `{relative}` differ only in case, and `{target}` is on a disk that takes them for one",
                hint="rename one of them, or write to another disk",
            )
    for relative, file in sidecars:
        copy_file(file, target / relative)
    return src.left_behind()


def tells_case(folder: Path) -> bool:
    """Whether names that differ only in case are two files in `folder`."""
    probe = folder / f"{SCRATCH}probe"
    with storage(probe):
        probe.touch()
        try:
            return not probe.with_name(probe.name.upper()).exists()
        finally:
            probe.unlink()


def link_weights(src: Checkpoint, target: Path) -> set[str]:
    """Hard-link each weight file and copy the index, keeping names; a bare file becomes `model.safetensors`.

    Returns the relative paths that became hard links, not copies.
    """
    if not src.path.is_dir():
        return {SINGLE} if _link(src.files[0], target / SINGLE) else set()
    names = {file.relative_to(src.root).as_posix(): file for file in src.files}
    if src.index is not None:
        copy_file(src.index, target / INDEX)
    return {name for name, file in names.items() if _link(file, target / name)}


def _link(file: Path, target: Path) -> bool:
    # A hard link to a symbolic link is another symbolic link, and dangles in the new folder.
    real = Path(os.path.realpath(file))
    regular_size(real)
    if file.is_symlink() and real.parent.name == "blobs":
        # The download cache owns its blobs and prunes them by what it thinks they are used for.
        copy_file(real, target)
        return False
    remove_tree(target)
    with storage(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise storage_error(error, target, "link") from error
        copy_file(real, target)
        return False
    return True
