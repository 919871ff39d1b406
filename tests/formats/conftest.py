"""Small checkpoints, whole and broken, and disks that are too small."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from tests.formats.samples import CONFIG, tensors, write_index


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one file, written by the safetensors library without metadata."""
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.torch.save_file(tensors(), folder / "model.safetensors")
    (folder / "config.json").write_text(CONFIG)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards and an index: a.weight and b.weight in the first, c.weight in the second."""
    folder = tmp_path / "sharded"
    folder.mkdir()
    parts = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(2)},
        "model-00002-of-00002.safetensors": {"c.weight": torch.full((3,), 7.0)},
    }
    weight_map: dict[str, str] = {}
    for file, part in parts.items():
        safetensors.torch.save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    (folder / "config.json").write_text(CONFIG)
    return folder


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on a disk of one megabyte; where mounting is not allowed, system calls that behave like one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    mounted = mount is not None and (
        subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode == 0
    )
    if mounted:
        yield place
        subprocess.run(["umount", place], check=True)
        return
    limit, fallocate, pwrite = 2**20, os.posix_fallocate, os.pwrite

    def used() -> int:
        return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())

    def small_fallocate(fd: int, offset: int, size: int) -> None:
        if used() + size > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(fd, offset, size)

    def small_pwrite(fd: int, data: Any, offset: int) -> int:
        if used() + max(0, offset + len(data) - os.fstat(fd).st_size) > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "posix_fallocate", small_fallocate)
    monkeypatch.setattr(os, "pwrite", small_pwrite)
    yield place
