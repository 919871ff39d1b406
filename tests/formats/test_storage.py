"""Disks that are full, and memory that stays small."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft, TensorSpec
from rewright.formats.errors import StorageError
from rewright.formats.files import copy_file
from rewright.formats.publish import ensure_room, lock, partial_path, publish
from rewright.formats.verify import verify

SMALL = [TensorSpec("a", "U8", (300_000,))]
LARGE = [TensorSpec("a", "U8", (600_000,)), TensorSpec("b", "U8", (600_000,))]


def sealed(path: Path, layout: list[TensorSpec], value: int) -> Draft:
    draft = Draft(path)
    draft.declare(layout)
    for spec in layout:
        draft.write(spec.name, torch.full(spec.shape, value, dtype=torch.uint8))
    draft.put("config.json", b"{}")
    draft.seal({})
    return draft


@pytest.mark.parametrize("shards", [1, 2])
def test_full_disk_says_so_and_leaves_the_old_output(shards: int, small_disk: Path) -> None:
    publish(sealed(small_disk / "out.partial", SMALL, 1).path, small_disk / "out", replace=False)
    draft = Draft(partial_path(small_disk / "out"))
    with pytest.raises(StorageError, match=r"needs 12\d{5} bytes and its disk has \d+ free") as caught:
        draft.declare(LARGE, max_shard_bytes=10**6 // shards)
    assert caught.value.hint
    assert list(draft.path.glob("*.safetensors")) == []
    assert verify(small_disk / "out").ok
    assert Checkpoint.open(small_disk / "out").read("a").eq(1).all()
    publish(sealed(draft.path, SMALL, 2).path, small_disk / "out", replace=True)
    assert Checkpoint.open(small_disk / "out").read("a").eq(2).all()


@pytest.mark.parametrize("shards", [1, 2])
def test_reservation_that_fails_leaves_no_files(shards: int, small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The free space read beforehand was another's by the time of the reservation: the reservation decides."""
    monkeypatch.setattr("rewright.formats.reserve.free_bytes", lambda path: 2**40)
    draft = Draft(small_disk / "out.partial")
    with pytest.raises(StorageError, match="needs 12"):
        draft.declare(LARGE, max_shard_bytes=10**6 // shards)
    assert list(draft.path.iterdir()) == []


def test_full_disk_while_writing_files(small_disk: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 2**21)
    with pytest.raises(StorageError, match=r"no space left on device, \d+ bytes are free"):
        copy_file(big, small_disk / "copy")
    (small_disk / "copy").unlink(missing_ok=True)
    draft = Draft(small_disk / "out.partial")
    draft.put("report.json", b"old")
    with pytest.raises(StorageError, match="no space left"):
        draft.put("report.json", b"x" * 2**21)
    assert (draft.path / "report.json").read_bytes() == b"old"


def test_disk_without_reservations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse posix_fallocate: the file gets its size, and a full disk shows while writing."""

    def refuse(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    draft = Draft(tmp_path / "out")
    draft.declare(SMALL)

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(StorageError, match=r"cannot write .*: no space left on device"):
            draft.write("a", torch.zeros(300_000, dtype=torch.uint8))
    draft.write("a", torch.ones(300_000, dtype=torch.uint8))
    assert draft.read("a").eq(1).all()


def test_room_is_checked_first(small_disk: Path) -> None:
    ensure_room(small_disk / "out", 100_000)
    with pytest.raises(StorageError, match="needs 1099511627776 bytes"):
        ensure_room(small_disk / "out", 2**40)


@pytest.fixture
def not_root() -> Iterator[Path]:
    """A world-readable folder, and a user whom modes stop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "parent").mkdir()
        (folder / "ready").mkdir()
        (folder / "parent").chmod(0o555)
        folder.chmod(0o755)
        before = os.geteuid()
        if before == 0:
            os.seteuid(65534)
        try:
            yield folder / "parent"
        finally:
            os.seteuid(before)
            (folder / "parent").chmod(0o755)


def test_parent_that_may_not_be_written(not_root: Path) -> None:
    for attempt in (
        lambda: lock(not_root / "out").__enter__(),
        lambda: Draft(not_root / "out.partial"),
        lambda: publish(not_root.parent / "ready", not_root / "out", replace=False),
    ):
        with pytest.raises(StorageError, match="permission denied"):
            attempt()
    with pytest.raises(StorageError, match="permission denied") as caught, lock(not_root / "out"):
        pass
    assert caught.value.hint == "choose a place that you may write to"
    assert os.listdir(not_root) == []


@pytest.mark.slow
def test_copying_two_gibibytes_takes_little_memory(tmp_path: Path) -> None:
    """2 GiB in three tensors, one of them 1.5 GiB, sparse on disk; the growth of the peak is asked of the system."""
    script = tmp_path / "stream.py"
    script.write_text(
        "import os, resource, sys\n"
        "from pathlib import Path\n"
        "from rewright.formats.checkpoint import Checkpoint\n"
        "from rewright.formats.draft import Draft, TensorSpec\n"
        "from rewright.formats.header import encode_header\n"
        "os.posix_fallocate = lambda fd, at, size: os.ftruncate(fd, size)\n"
        "src, dst = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "src.mkdir()\n"
        "layout = [TensorSpec(n, 'BF16', (s, 2**20)) for n, s in (('a', 768), ('b', 250), ('c', 6))]\n"
        "head, places = encode_header(layout)\n"
        "with (src / 'model.safetensors').open('wb') as file:\n"
        "    file.write(head)\n"
        "    file.truncate(len(head) + 2**31)\n"
        "    file.seek(len(head) + 2**31 - 4)\n"
        "    file.write(b'tail')\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "ckpt, draft = Checkpoint.open(src), Draft(dst)\n"
        "draft.declare(layout)\n"
        "for name in ckpt.entries:\n"
        "    draft.copy(name, ckpt)\n"
        "draft.put('config.json', b'{}')\n"
        "draft.seal({})\n"
        "tail = b''.join(Checkpoint.open(dst).chunks('c'))[-4:]\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(ckpt.total_bytes, tail.decode(), grown * 1024)\n"
    )
    words: list[str | Path] = [sys.executable, script, tmp_path / "src", tmp_path / "dst"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    total, tail, grown = done.stdout.split()
    assert (int(total), tail) == (2**31, "tail")
    assert int(grown) < 200 * 2**20
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
