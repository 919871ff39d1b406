"""Processes of a run as threads of this one, for what they say to each other and in what order; and real ones."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
