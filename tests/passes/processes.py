"""Processes of a run as threads of this one, for what they say to each other and in what order; and real ones."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from rewright.passes.world import World

T = TypeVar("T")


class _Group:
    """The collective calls that are used, between threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._given: list[Any] = [None] * size
        self.rank = threading.local()

    def _all(self, value: Any) -> list[Any]:
        self._barrier.wait()
        self._given[self.rank.number] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found

    def all_to_all_single(self, out: torch.Tensor, given: torch.Tensor, taken: list[int], sizes: list[int]) -> None:
        every = self._all((given, sizes))
        mine = [torch.split(theirs, cut)[self.rank.number] for theirs, cut in every]
        assert [len(piece) for piece in mine] == taken
        out.copy_(torch.cat(mine))

    def all_gather(self, out: list[torch.Tensor], given: torch.Tensor) -> None:
        for place, theirs in zip(out, self._all(given), strict=True):
            place.copy_(theirs)

    def all_reduce(self, counts: torch.Tensor) -> None:
        total = sum(one.clone() for one in self._all(counts.clone()))
        counts.copy_(torch.as_tensor(total))


class _Thread(World):
    def __init__(self, rank: int, size: int, group: _Group) -> None:
        super().__init__()
        self.rank, self.size, self.group = rank, size, group

    def count(self, counts: torch.Tensor) -> torch.Tensor:
        self.group.all_reduce(counts)
        return counts


def together(size: int, work: Callable[[World, Any], T]) -> list[T]:
    """What each of so many processes makes of `work`."""
    group = _Group(size)
    found: list[Any] = [None] * size
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        group.rank.number = rank
        try:
            found[rank] = work(_Thread(rank, size, group), group)
        except BaseException as error:
            failed.append(error)
            group._barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return found


# A process that torchrun starts: `rewright` with units so small that a tiny matrix is cut, and what a test adds.
_MAIN = """
import os
from rewright.passes.compress import units
units.WEIGHTS = 1500
{also}
from rewright.cli.main import main
main()
"""


class Launched:
    """A command under torchrun, with the processes that it starts."""

    def __init__(self, folder: Path, size: int, words: Sequence[str | Path], also: str = "") -> None:
        script = folder / f"main-{size}.py"
        script.write_text(_MAIN.format(also=also))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), script]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self.size, self.script = size, script
        self._process = subprocess.Popen(
            [*map(str, command), *map(str, words)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def workers(self) -> dict[int, int]:
        """Process numbers by rank, of those that are running."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (folder / "cmdline").read_bytes().split(b"\0")
                said = dict(line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0"))
                if str(self.script).encode() in words and b"RANK" in said:
                    found[int(said[b"RANK"])] = int(folder.name)
        return found

    def ended(self) -> bool:
        """Whether torchrun itself is done."""
        return self._process.poll() is not None

    def wait(self, timeout: float = 240) -> tuple[int, str, str]:
        """Exit status, what was written to stdout, and what the processes themselves said on stderr."""
        out, err = self._process.communicate(timeout=timeout)
        lines = [line for line in err.decode().splitlines() if line.startswith(("error:", "hint:", "warning:"))]
        told = "\n".join(lines) if lines and self._process.returncode else err.decode()
        return self._process.returncode, out.decode(), told
