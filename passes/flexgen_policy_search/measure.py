"""What a machine does in a second: products, attention, copies, the disk, and how much is left when all run at once.

Of products, attention and copies the best of several tries counts, with operands that no cache holds from the try
before; of the disk the median.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional

from rewright.formats.files import free_bytes, read_into, storage, write_all
from rewright.passes.errors import ResourceError

# Bytes of operands in turn, past any cache; of a copy; of the file that the disk is measured with.
TURN, COPY, FILE = 128 << 20, 64 << 20, 256 << 20
# Kernels that are started between two looks at the clock of a GPU.
_BURST = 20


class Meter:
    """Times work on a device in a dtype. `share` scales the time that is spent on each figure."""

    def __init__(self, device: torch.device, dtype: torch.dtype, share: float = 1.0) -> None:
        self.device, self.dtype, self.share = device, dtype, share

    def product(self, rows: int, out: int, width: int) -> float:
        """Seconds of `rows` times a matrix [out, width] that was not read before."""
        size = out * width * self.dtype.itemsize
        matrices = [self._new(out, width) for _ in range(max(2, TURN // size))]
        given, turns = self._new(rows, width), itertools.cycle(matrices)
        return self._best(lambda: functional.linear(given, next(turns)))

    def attention(self, batch: int, heads: int, kept: int, context: int, width: int) -> float:
        """Seconds of a new token's attention to keys and values [batch, kept, context, width] not read before."""
        size = 2 * batch * kept * context * width * self.dtype.itemsize
        shape = (batch, kept, context, width)
        pairs = [(self._new(*shape), self._new(*shape)) for _ in range(max(2, TURN // size))]
        query, turns = self._new(batch, heads, 1, width), itertools.cycle(pairs)
        return self._best(
            lambda: functional.scaled_dot_product_attention(query, *next(turns), enable_gqa=heads != kept)
        )

    def start(self) -> float:
        """Seconds of an operation on next to nothing."""
        given = self._new(16, 16)
        return self._best(lambda: given + given)

    def copy(self, way: str, count: int = COPY) -> float:
        """Seconds of a copy of bytes, `h2d` from pinned memory to the device or `d2h` back."""
        copied = self.copier(way, count)
        return self._best(copied, burst=1)

    def copier(self, way: str, count: int) -> Callable[[], object]:
        """What copies bytes once, from other memory each time."""
        pin = self.device.type == "cuda"
        host = [torch.empty(count, dtype=torch.uint8, pin_memory=pin).fill_(1) for _ in range(2)]
        there = torch.empty(count, dtype=torch.uint8, device=self.device).fill_(1)
        turns = itertools.cycle(host)
        if way == "h2d":
            return lambda: there.copy_(next(turns), non_blocking=True)
        return lambda: next(turns).copy_(there, non_blocking=True)

    def together(self, jobs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
        """How often a second each job ends while all run, each in a thread of its own."""
        ended = threading.Event()

        def work(job: Callable[[], object]) -> float:
            count, began = 0, time.perf_counter()
            with self._lane(), torch.inference_mode():
                while not ended.is_set():
                    job()
                    self._wait()
                    count += 1
            return count / (time.perf_counter() - began)

        with ThreadPoolExecutor(len(jobs)) as pool:
            working = {name: pool.submit(work, job) for name, job in jobs.items()}
            try:
                time.sleep(seconds * self.share)
            finally:
                ended.set()
            return {name: found.result() for name, found in working.items()}

    @contextlib.contextmanager
    def _lane(self) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.stream(torch.cuda.Stream(self.device)):  # type: ignore[no-untyped-call]  # torch's stubs
            yield

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).fill_(0.5)

    def _best(self, action: Callable[[], object], *, burst: int | None = None) -> float:
        """The least seconds of an action: a tenth of a second of tries, at least three."""
        count = burst or (_BURST if self.device.type == "cuda" else 1)
        least, tries, end = float("inf"), 0, time.perf_counter() + 0.1 * self.share
        action()
        with torch.inference_mode():
            while tries < 3 or time.perf_counter() < end:
                self._wait()
                began = time.perf_counter()
                for _ in range(count):
                    action()
                self._wait()
                least = min(least, (time.perf_counter() - began) / count)
                tries += 1
        return least


class Disk:
    """A file without a name on the disk of a folder, read and written past the system's cache where that is possible.

    Raises ResourceError where there is too little room, StorageError where the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if free_bytes(folder) < 2 * FILE:
            raise ResourceError(
                f"too little room on the disk of `{folder}`: measuring it takes {FILE >> 20} MiB for a moment",
                hint="name a file on another disk",
            )

    def __enter__(self) -> Disk:
        with storage(self.folder), tempfile.TemporaryFile(dir=self.folder) as made:
            self._fd, self.direct = os.dup(made.fileno()), False
            with contextlib.suppress(OSError, AttributeError):
                past = os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_DIRECT)
                os.dup2(past, self._fd)
                os.close(past)
                self.direct = True
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self) -> float:
        """Bytes a second of writing the file until it is on the disk."""
        block = 16 << 20
        with mmap.mmap(-1, block) as page, storage(self.folder):
            page.write(os.urandom(block))
            began = time.perf_counter()
            for at in range(0, FILE, block):
                write_all(self._fd, memoryview(page), at)
            os.fsync(self._fd)
            return FILE / (time.perf_counter() - began)

    def read(self, count: int, block: int, threads: int, at: int = 0) -> float:
        """Seconds of reading `count` bytes from `at` on, in blocks by so many threads. Raises StorageError."""
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, 0, FILE, os.POSIX_FADV_DONTNEED)
        starts, lock = iter(range(at, at + count, block)), threading.Lock()

        def work(page: mmap.mmap) -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                view = memoryview(page)[: min(block, at + count - start)]
                if read_into(self._fd, view, start) != len(view):
                    raise OSError(errno.EIO, os.strerror(errno.EIO))

        pages = [mmap.mmap(-1, block) for _ in range(threads)]
        with storage(self.folder, "read"), ThreadPoolExecutor(threads) as pool:
            began = time.perf_counter()
            list(pool.map(work, pages))
            return time.perf_counter() - began

    def typical(self, count: int, block: int, threads: int) -> float:
        """The median of reads from places in turn, after some that do not count.

        What a disk shares with others differs from read to read, and one that has rested may be faster for a while.
        """
        self.read(FILE // 2, 4 << 20, 2)
        places = range(0, FILE - count + 1, block)
        return statistics.median(self.read(count, block, threads, places[at * 37 % len(places)]) for at in range(3))
