"""A checkpoint on disk, read by headers first and then a tensor, or a slice of one, at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewright.formats.dtypes import to_torch
from rewright.formats.errors import FormatError, StorageError, unreadable
from rewright.formats.files import CHUNK, read_into
from rewright.formats.provenance import read_stamp
from rewright.formats.shards import INDEX, SINGLE, WeightFiles, find_weights
from rewright.formats.sidecars import sort_files
from rewright.formats.strict import printable, read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor's place: `nbytes` bytes at `offset` of `file`, elements of the safetensors code `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Headers of a checkpoint; opens its files anew for each read, maps none of them.

    `root` is the directory that holds the files; `entries` are in file order; `config` is config.json, `stamp`
    rewright.json, None where absent; `metadata` is that of the first weight file.
    """

    path: Path
    root: Path
    entries: dict[str, Entry] = field(repr=False)
    files: tuple[Path, ...]
    config: dict[str, Any] | None = field(repr=False)
    metadata: dict[str, str]
    warnings: tuple[str, ...]
    stamp: dict[str, Any] | None = field(repr=False)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Open a directory, one `.safetensors` file, or a link to either.

        Raises FormatError for whatever `find_weights` refuses and for a config.json or rewright.json that is
        not one strict JSON object. A single file takes the config.json beside it.
        """
        path = Path(path)
        if not os.path.lexists(path):
            raise FormatError(f"`{path}` is not there", hint="name a folder with `model.safetensors`, or such a file")
        root, place = (path, path) if path.is_dir() else _beside(path)
        weights = find_weights(place)
        config = None
        if os.path.lexists(root / "config.json"):
            config = read_json(root / "config.json")
            if not isinstance(config, dict):
                raise FormatError(f"`{root / 'config.json'}` is not an object")
        stamp = read_stamp(root) if path.is_dir() else None
        metadata = weights.headers[weights.files[0]].metadata
        return cls(path, root, _entries(weights), weights.files, config, metadata, weights.warnings, stamp)

    @property
    def index(self) -> Path | None:
        """The index file when the weights are read through one."""
        return self.root / INDEX if self.path.is_dir() and self.files != (self.root / SINGLE,) else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors as stored; a tied tensor stored once counts once."""
        return sum(entry.nbytes for entry in self.entries.values())

    def entry(self, name: str) -> Entry:
        """The entry of `name`. Raises FormatError naming the checkpoint when there is none."""
        found = self.entries.get(name)
        if found is None:
            raise FormatError(f"`{self.path}` has no tensor `{printable(name)}`")
        return found

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in memory of its own. Raises FormatError: no such tensor, a dtype torch lacks, file changed."""
        entry = self.entry(name)
        return load(entry, entry.shape, entry.offset, entry.nbytes)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first axis, clipped like a slice; only their bytes are read."""
        entry = self.entry(name)
        if not entry.shape:
            raise FormatError(f"tensor `{printable(name)}` has no axis to take rows from")
        rows = range(*slice(start, stop).indices(entry.shape[0]))
        row = entry.nbytes // entry.shape[0] if entry.shape[0] else 0
        return load(entry, (len(rows), *entry.shape[1:]), entry.offset + rows.start * row, len(rows) * row)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytes]:
        """The tensor's bytes in pieces of at most `size`; any dtype."""
        entry = self.entry(name)
        fd = _open(entry.file)
        try:
            for at in range(0, entry.nbytes, size):
                piece = bytearray(min(size, entry.nbytes - at))
                _fill(fd, memoryview(piece), entry, entry.offset + at)
                yield bytes(piece)
        finally:
            os.close(fd)

    def sidecars(self) -> list[tuple[str, Path]]:
        """What travels beside the weights, config.json included: (POSIX path from `root`, file), sorted."""
        return self._sorted[0]

    def left_behind(self) -> list[str]:
        """What is in the directory and does not travel: other weight sets, version control, caches."""
        return self._sorted[1]

    @cached_property
    def _sorted(self) -> tuple[list[tuple[str, Path]], list[str]]:
        # A bare file in a folder that is no checkpoint has nothing to do with its neighbours.
        if not self.path.is_dir() and self.config is None:
            return [], []
        return sort_files(self.root, [*self.files, *([self.index] if self.index else [])])


def _beside(path: Path) -> tuple[Path, Path]:
    """The folder of a bare file, and the file in it: a link's own folder when it has the config, else its target's."""
    real = Path(os.path.realpath(path))
    if not os.path.lexists(path.parent / "config.json") and os.path.lexists(real.parent / "config.json"):
        return real.parent, real
    return path.parent, path


def _entries(weights: WeightFiles) -> dict[str, Entry]:
    entries = {}
    for file in weights.files:
        header = weights.headers[file]
        for info in header.tensors.values():
            if weights.owner is None or weights.owner[info.name] == file:
                offset = header.data_start + info.start
                entries[info.name] = Entry(info.name, info.dtype, info.shape, file, offset, info.end - info.start)
    return entries


def load(entry: Entry, shape: tuple[int, ...], offset: int, nbytes: int) -> torch.Tensor:
    """A tensor of `shape` from `nbytes` bytes at `offset` of the entry's file.

    Raises FormatError: a dtype or shape torch lacks, a file that changed; StorageError when memory is short.
    """
    import torch

    dtype = to_torch(entry.dtype)
    if dtype is None:
        raise FormatError(f"tensor `{printable(entry.name)}` is {entry.dtype}, which torch cannot compute on")
    if nbytes == 0:
        try:
            return torch.empty(shape, dtype=dtype)
        except RuntimeError:
            raise FormatError(f"tensor `{printable(entry.name)}` has a shape torch cannot make") from None
    try:
        raw = torch.empty(nbytes, dtype=torch.uint8)
    except RuntimeError:
        raise StorageError(f"tensor `{printable(entry.name)}` needs {nbytes} bytes of memory") from None
    fd = _open(entry.file)
    try:
        _fill(fd, raw.numpy().data, entry, offset)
    finally:
        os.close(fd)
    return raw.view(dtype).reshape(shape)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise unreadable(file, error) from None


def _fill(fd: int, view: memoryview, entry: Entry, offset: int) -> None:
    try:
        done = read_into(fd, view, offset)
    except OSError as error:
        raise unreadable(entry.file, error) from None
    if done != len(view):
        raise FormatError(f"`{entry.file}` ended inside tensor `{printable(entry.name)}`: it changed meanwhile")
