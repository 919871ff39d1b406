"""A checkpoint in the making: weights streamed to their places, sidecars carried, a stamp written last."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from rewright.formats import seal
from rewright.formats.carry import carry_sidecars, link_weights
from rewright.formats.checkpoint import Checkpoint, Entry, load
from rewright.formats.dtypes import from_torch
from rewright.formats.errors import ConflictError, FormatError
from rewright.formats.files import SCRATCH, storage, storage_error, sync_path, write_all, write_file
from rewright.formats.jsonedit import edit_object
from rewright.formats.layout import Shard, TensorSpec, encode_index, plan_shards
from rewright.formats.provenance import STAMP
from rewright.formats.reserve import open_shard, reserve
from rewright.formats.shards import INDEX
from rewright.formats.strict import printable, read_small

if TYPE_CHECKING:
    import torch

__all__ = ["WRITTEN", "Draft", "TensorSpec"]

# Names of the tensors that are on the disk for certain, one a line; gone when the draft is sealed.
WRITTEN = f"{SCRATCH}written"
# Entries of a tensor along its first axis, from the first up to the second.
Rows = tuple[int, int]
_MOST_JSON = 256 * 2**20


class Draft:
    """The directory of a checkpoint to be, made if it is not there.

    Not for two runs at a time: hold `publish.lock` on the destination. The processes of one run may share it, told
    apart by `rank`: each writes tensors, or rows of them, and the first does all the rest, which is nothing to the
    others. They wait for each other by `meet`, which returns when every process has called it.
    """

    def __init__(self, path: str | os.PathLike[str], *, rank: int = 0, meet: Callable[[], None] | None = None) -> None:
        self.path = Path(path)
        self._follows, self._meet = rank > 0, meet
        self._log = self.path / (f"{WRITTEN}-{rank}" if rank else WRITTEN)
        if not self._follows:
            with storage(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
        self._specs: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Shard, int, int]] = {}
        self._shards: list[Shard] = []
        self._written: set[str] = set()
        self._synced: set[str] = set()
        self._parts: dict[str, set[Rows]] = {}
        self._fds: dict[str, int] = {}
        self._links: dict[str, str | None] = {}
        self._linked = False

    @property
    def written(self) -> frozenset[str]:
        """Tensors that have their bytes; after a resume those that were there at the last `sync`."""
        return frozenset(self._written)

    def declare(self, layout: Sequence[TensorSpec], max_shard_bytes: int = 5 * 10**9) -> None:
        """Write the headers and reserve the room of every weight file.

        Called again with the same layout, in this process or a later one, it keeps the data. Raises StorageError
        naming needed and free bytes when the disk is too small, ConflictError when the directory holds work of
        another layout, FormatError for a layout that cannot be written.
        """
        shards = plan_shards(layout, max_shard_bytes)
        self.close()
        if self._follows:
            self._wait()
            kept = {shard.file for shard in shards}
        else:
            kept = self._begin(shards)
        self._shards = shards
        self._specs = {spec.name: spec for spec in layout}
        self._places = {name: (shard, start, end) for shard in shards for name, (start, end) in shard.places.items()}
        self._written, self._synced, self._parts = set(), set(), {}
        self._learn(kept)
        if not self._follows:
            # of what an earlier run left on record, what still holds
            self._record(sorted(self._synced), "w")
            for other in self._logs():
                if other != self._log:
                    other.unlink()
            self._wait()

    def _begin(self, shards: Sequence[Shard]) -> set[str]:
        """Make the weight files and their index; returns the files that were there already."""
        names = {shard.file for shard in shards}
        strays = sorted(file.name for file in self.path.glob("*.safetensors") if file.name not in names)
        if strays:
            raise ConflictError(
                f"`{self.path}` holds `{strays[0]}`, which belongs to another layout",
                hint="finish that run with its own options, or delete the folder",
            )
        self._unseal()
        kept = reserve(self.path, shards)
        if len(shards) > 1:
            self.put(INDEX, encode_index(shards))
        return kept

    def write(self, name: str, tensor: torch.Tensor, part: int | None = None, *, rows: int | None = None) -> None:
        """Write a declared tensor, or with `part` one entry along its first axis; any device and strides.

        With `rows` the tensor is as many entries as it has, and this is the first of them. A tensor that comes in parts
        is written when all of them are. Raises FormatError when dtype or shape differ.
        """
        import torch

        spec, shard, start, end = self._place(name)
        shape, span = spec.shape, None
        if part is not None:
            shape, span = spec.shape[1:], (part, part + 1)
        elif rows is not None:
            shape, span = (len(tensor), *spec.shape[1:]), (rows, rows + len(tensor))
        code = from_torch(tensor.dtype)
        if code != spec.dtype or tuple(tensor.shape) != shape:
            raise FormatError(
                f"tensor `{printable(name)}` is {code} {list(tensor.shape)}, "
                f"but the layout says {spec.dtype} {list(shape)}"
            )
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        if flat.numel():
            self._pwrite(shard, flat.view(torch.uint8).numpy().data, _part(spec, start, end, span)[0])
        self._take(name, span)

    def _take(self, name: str, span: Rows | None) -> None:
        """Note that a tensor, or some of its entries, are written."""
        if span is not None:
            parts = self._parts.setdefault(name, set())
            parts.add(span)
            if sum(stop - first for first, stop in parts) < self._specs[name].shape[0]:
                return
        self._written.add(name)

    def copy(self, name: str, src: Checkpoint, source_name: str | None = None) -> None:
        """Copy a tensor byte for byte, in pieces. Raises FormatError when dtype or shape differ from the layout."""
        spec, shard, start, _ = self._place(name)
        entry = src.entry(source_name or name)
        if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
            raise FormatError(
                f"tensor `{printable(entry.name)}` is {entry.dtype} {list(entry.shape)}, "
                f"but the layout says {spec.dtype} {list(spec.shape)}"
            )
        for piece in src.chunks(entry.name):
            self._pwrite(shard, piece, start)
            start += len(piece)
        self._written.add(name)

    def read(self, name: str, part: int | None = None) -> torch.Tensor:
        """A tensor that was written, or one part of it. Raises FormatError when it was not."""
        spec, shard, start, end = self._place(name)
        span = None if part is None else (part, part + 1)
        if name not in self._written and span not in self._parts.get(name, ()):
            raise FormatError(f"tensor `{printable(name)}` was not written yet")
        entry = Entry(name, spec.dtype, spec.shape, self.path / shard.file, start, end - start)
        shape = spec.shape if part is None else spec.shape[1:]
        return load(entry, shape, *_part(spec, start, end, span))

    def sync(self) -> None:
        """Put what was written on the disk, then on record: a later process keeps it. Raises StorageError."""
        for file, fd in self._fds.items():
            with storage(self.path / file, "flush"):
                os.fdatasync(fd)
        parts = {_line(name, span) for name, found in self._parts.items() for span in found}
        whole = {name for name in self._written if name not in self._parts}
        fresh = sorted((whole | parts) - self._synced)
        if fresh:
            self._record(fresh, "a")
            self._synced |= set(fresh)

    def _record(self, lines: Sequence[str], mode: Literal["a", "w"]) -> None:
        """Put lines on record, on the disk for certain."""
        if mode == "w":
            write_file(self._log, "".join(f"{line}\n" for line in lines).encode("utf-8"))
            return
        with storage(self._log), self._log.open(mode, encoding="utf-8") as log:
            log.writelines(f"{line}\n" for line in lines)
            log.flush()
            os.fsync(log.fileno())

    def share(self) -> None:
        """Let all processes have what each has written. Without others nothing needs doing."""
        if self._meet is None:
            return
        self.sync()
        self._wait()
        self._learn({shard.file for shard in self._shards})

    def _wait(self) -> None:
        if self._meet is not None:
            self._meet()

    def close(self) -> None:
        """Close the weight files; they open again when needed."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def carry(self, src: Checkpoint) -> list[str]:
        """Copy every sidecar of `src` byte for byte; returns what stayed behind, for a warning.

        Raises FormatError when two names differ only in case and this disk does not tell them apart.
        """
        if self._follows:
            return []
        self._unseal()
        return carry_sidecars(src, self.path)

    def link_weights(self, src: Checkpoint) -> None:
        """Take the source's weight files as they are: hard links, or copies where links cannot be or should not.

        A linked file keeps the mode of the source, and in the stamp the digest on the source's record, or none.
        """
        if self._follows:
            return
        self._unseal()
        record = (src.stamp or {}).get("files")
        for name in link_weights(src, self.path):
            found = record.get(name) if isinstance(record, dict) else None
            self._links[name] = found.get("sha256") if isinstance(found, dict) else None
        self._linked = True

    def edit_config(self, changes: Mapping[str, Any], remove: Collection[str] = ()) -> None:
        """Change top-level keys of config.json; every other byte of it stays. Without the file, start one."""
        if self._follows:
            return
        self._unseal()
        path = self.path / "config.json"
        data = read_small(path, _MOST_JSON) if os.path.lexists(path) else b"{}\n"
        write_file(path, edit_object(data, changes, remove, f"`{path}`"))

    def put(self, relative: str, data: bytes) -> None:
        """Write a file of the checkpoint, whole or not at all. Raises FormatError for a path that leaves it."""
        parts = PurePosixPath(relative).parts
        if not parts or relative.startswith("/") or ".." in parts or "\0" in relative:
            raise FormatError(f"`{printable(relative)}` is not a path inside a checkpoint")
        if relative == STAMP:
            raise FormatError(f"`{STAMP}` is written by `seal`")
        if self._follows:
            return
        self._unseal()
        write_file(self.path.joinpath(*parts), data)

    def seal(self, stamp: Mapping[str, Any], known: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Check the whole, flush it and write the stamp, with size and sha256 of each file under `files`.

        `known` maps relative paths to digests that the caller has already; those files are not read again.
        Returns the stamp as written. Raises FormatError: no weights, a declared tensor that was not written, a
        config.json that does not parse, something that is neither file nor folder. The first process alone seals, when
        the others are done.
        """
        self._learn({shard.file for shard in self._shards})
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise FormatError(f"{len(missing)} declared tensors were not written, the first `{printable(missing[0])}`")
        if not self._linked and not self._shards:
            raise FormatError(f"`{self.path}` has no weights to seal")
        self.close()
        self._unseal()
        files = seal.describe(self.path, {**self._links, **(known or {})})
        document = {**stamp, "files": files}
        seal.write_stamp(self.path, document)
        # Only now: until the stamp is there, a resume needs the record of what was written.
        seal.sweep(self.path)
        sync_path(self.path)
        return document

    def _unseal(self) -> None:
        """Before anything changes, what an earlier run may have sealed is finished no more."""
        with storage(self.path / STAMP):
            (self.path / STAMP).unlink(missing_ok=True)

    def _place(self, name: str) -> tuple[TensorSpec, Shard, int, int]:
        if name not in self._places:
            raise FormatError(f"tensor `{printable(name)}` is not in the layout")
        return self._specs[name], *self._places[name]

    def _pwrite(self, shard: Shard, data: bytes | memoryview, offset: int) -> None:
        path = self.path / shard.file
        if shard.file not in self._fds:
            self._fds[shard.file] = open_shard(path)
        try:
            write_all(self._fds[shard.file], data, offset)
        except OSError as error:
            raise storage_error(error, path) from error

    def _logs(self) -> list[Path]:
        """What processes have put on record, this one and others."""
        return [
            path for path in self.path.glob(f"{WRITTEN}*") if path.name == WRITTEN or path.name[len(WRITTEN)] == "-"
        ]

    def _learn(self, kept: Collection[str]) -> None:
        """Take in what is on record, as far as the file that holds it is among those kept."""
        for log in self._logs():
            # A name that a crash cut short has no line break after it, and is dropped.
            for line in log.read_text(encoding="utf-8").split("\n")[:-1]:
                name, span = (line, None) if line in self._places else _parted(line)
                if name in self._places and self._places[name][0].file in kept:
                    self._synced.add(line)
                    self._take(name, span)


def _part(spec: TensorSpec, start: int, end: int, span: Rows | None) -> tuple[int, int]:
    """Where a tensor's bytes, or those of some entries along its first axis, begin in the file, and how many."""
    if span is None:
        return start, end - start
    first, stop = span
    if not (spec.shape and 0 <= first < stop <= spec.shape[0]):
        raise FormatError(
            f"tensor `{printable(spec.name)}` of shape {list(spec.shape)} has no entries {first} to {stop}"
        )
    size = (end - start) // spec.shape[0]
    return start + first * size, (stop - first) * size


def _line(name: str, span: Rows) -> str:
    """How some entries of a tensor are put on record."""
    return f"{name}\t{span[0]}\t{span[1]}"


def _parted(line: str) -> tuple[str, Rows | None]:
    """The tensor and the entries that a line of the record speaks of; a name alone has none."""
    words = line.rsplit("\t", 2)
    if len(words) == 3 and words[1].isdecimal() and words[2].isdecimal():
        return words[0], (int(words[1]), int(words[2]))
    return line, None
