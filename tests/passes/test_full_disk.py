"""Disks that are full or may not be written: exit 4, and what was there before is there after."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewright.formats.errors import StorageError
from rewright.passes.recipe import make
from tests.passes.conftest import STORIES
from tests.passes.fakes import go
from tests.passes.forks import Forks
from tests.passes.outputs import beside, contents

PRUNE = ("compress", "--method", "magnitude", "--bits", "16", "--sparsity", "0.3")
ROUND = ("compress", "--method", "rtn", "--group-size", "32")


def _words(dst: Path, bits: int, *run_options: str) -> list[str | Path]:
    return ["chain", "--threads", "1", *run_options, STORIES, dst, *PRUNE, "+", *ROUND, "--bits", str(bits)]


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[bool]:
    """A file system of its own at `place`; False where only root may mount one, and this is not root."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def test_a_disk_of_any_size(forks: Forks, tmp_path: Path) -> None:
    """From too small for anything to just large enough, with a previous output that takes 0.5 MB of it."""
    with _disk(tmp_path / "disk") as mounted:
        if not mounted:
            return
        dst = tmp_path / "disk" / "out"
        assert forks.run(*_words(dst, 8)).code == 0
        was = contents(dst)
        said = set()
        for room in (0, 4, 900, 1276, *range(1280, 1400, 12)):
            used = os.statvfs(dst).f_blocks - os.statvfs(dst).f_bfree
            _remount(dst.parent, f"size={used * os.statvfs(dst).f_frsize + room * 1024}")
            ended = forks.run(*_words(dst, 4, "--update"))
            _remount(dst.parent, "size=16m")
            if ended.code == 0:
                break
            assert ended.code == 4, (room, ended.err)
            assert "hint: free some space, or write to another disk" in ended.err
            assert contents(dst) == was
            said |= {part for part in ("out.lock", "` needs", "stage 2") if part in ended.err}
            left = dst.with_name("out.partial")
            if room < 1320 and left.exists():
                shutil.rmtree(left)
        assert said == {"out.lock", "` needs", "stage 2"}, "full at the start, and in the middle"
        assert ended.code == 0, "with room enough the same command finishes"
        assert contents(dst) != was
        assert beside(dst) == []


def test_a_read_only_disk(forks: Forks, tmp_path: Path) -> None:
    with _disk(tmp_path / "disk") as mounted:
        if not mounted:
            return
        dst = tmp_path / "disk" / "out"
        assert forks.run(*_words(dst, 8)).code == 0
        _remount(dst.parent, "ro")
        ended = forks.run(*_words(dst, 8))
        assert ended.code == 0
        assert ended.err.startswith("warning: the stamp was not touched: ")
        assert forks.run(*_words(dst, 8, "--check")).code == 0
        for more in ((4, "--update"), (8, "--force")):
            ended = forks.run(*_words(dst, *more))
            assert ended.code == 4, ended.err
            assert "read-only file system" in ended.err


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fdatasync", "fsync"])
def test_a_system_that_refuses(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever call the disk turns out to be full."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dst = tmp_path / "out"
    rounding = [make(1, "compress", {"method": "rtn", "bits": bits, "group-size": 32}) for bits in (8, 4)]
    go(STORIES, dst, rounding[0])
    was = contents(dst)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(StorageError, match=r"no space left|needs"):
            go(STORIES, dst, rounding[1], update=True)
    assert contents(dst) == was
    go(STORIES, dst, rounding[1], update=True)
    assert contents(dst) != was
    assert beside(dst) == []


def test_room_is_looked_for_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rewright.formats.publish.free_bytes", lambda path: 1000)
    stage = make(1, "compress", {"method": "rtn"})
    with pytest.raises(StorageError, match=r"needs \d+ bytes and its disk has 1000 free"):
        go(STORIES, tmp_path / "out", stage)
    assert beside(tmp_path / "out") == []
