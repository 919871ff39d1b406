"""The processes that share a run: one, or as many as torchrun has started. `torch.distributed` is the engine.

Whatever is split is split in fixed units, and each unit's arithmetic and the order in which units are added up are
the same however many processes there are, so the bytes are too. What processes say to each other is JSON in the
launcher's store; tensors go through the process group.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from rewright.formats import errors as formats_errors
from rewright.formats.errors import ConflictError, Refusal
from rewright.passes import errors as passes_errors
from rewright.passes.errors import ResourceError

if TYPE_CHECKING:
    import torch

    from rewright.passes.chunks import Span
    from rewright.passes.sums import OrderedSum

T = TypeVar("T")

# A process that is gone closes its connections, and that is noticed at once; one that computes may take its time.
PATIENCE = timedelta(days=7)
# Between two looks at the store, in seconds: at first, and at most.
LOOK, LOOK_MOST = 0.0005, 0.05
# How long an ended process waits to see whether the first has said the same, in seconds.
ECHO = 2.0


class World:
    """One process alone, which is every run without torchrun; what several do differently is in `Torchrun`.

    `local` is the process's place on its machine; `sent` counts the bytes of tensors that it has sent to others.
    """

    rank = 0
    size = 1
    local = 0

    def __init__(self) -> None:
        self.sent = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and publishes."""
        return self.rank == 0

    def shares(self, costs: Sequence[float]) -> list[range]:
        """Units in a row, one run of them for each process, by what each unit costs; the same in every process."""
        total, spent, owners = sum(costs) or 1.0, 0.0, []
        for cost in costs:
            owners.append(min(self.size - 1, int(self.size * (spent + cost / 2) / total)))
            spent += cost
        starts = [sum(owner < rank for owner in owners) for rank in range(self.size + 1)]
        return [range(first, last) for first, last in pairwise(starts)]

    def share(self, costs: Sequence[float]) -> range:
        """The units of this process."""
        return self.shares(costs)[self.rank]

    def lead(self, work: Callable[[], T]) -> T:
        """Have the first process do something, and return in all what it returned, which is JSON.

        A Refusal that it raises is raised in all.
        """
        return work()

    def together(self, value: Any) -> list[Any]:
        """What each process says, by rank; JSON."""
        return [value]

    def meet(self) -> None:
        """Return when every process has come here."""
        self.together(None)

    def add_up(self, own: OrderedSum, spans: Sequence[Sequence[Span]]) -> torch.Tensor:
        """The whole sum from the parts of all processes, which are `spans` by rank, in all of them."""
        return own.total()

    def count(self, counts: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of whole numbers, int64, in place."""
        return counts

    def end(self, message: str, error: BaseException) -> bool:
        """Tell the others how this process ends; whether another has said it already."""
        return False

    def close(self) -> None:
        """Part in peace."""


class Torchrun(World):
    """One of several processes. Raises ResourceError where another one is gone, or what that one was refused."""

    def __init__(self, rank: int, size: int, local: int = 0) -> None:
        # what torch documents of it is not all in its `__all__`
        dist: Any = importlib.import_module("torch.distributed")
        super().__init__()
        self.rank, self.size, self.local = rank, size, local
        self._dist = dist
        try:
            self._store, *_ = next(dist.rendezvous("env://", rank, size))
        except (ValueError, RuntimeError) as error:
            raise ResourceError(
                f"cannot meet the other processes: {str(error).partition(chr(10))[0]}",
                hint="start them with torchrun, or unset `WORLD_SIZE` to run alone",
            ) from error
        self._turn = 0
        # what this process has said and others may still have to hear
        self._mine: list[str] = []
        self._begun = False

    def _group(self) -> Any:
        """The process group, made when the first tensor is to be sent."""
        if not self._begun:
            backend = "cpu:gloo,cuda:nccl" if self._dist.is_nccl_available() else "gloo"
            store = self._dist.PrefixStore("tensors", self._store)
            self._dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
            self._begun = True
        return self._dist

    def _say(self, key: str, value: Any) -> None:
        with self._touch():
            self._store.set(key, json.dumps(value))
        self._mine.append(key)

    def _hear(self, key: str) -> Any:
        """Wait for what another process says. Interruptible, unlike the store's own wait."""
        pause = LOOK
        while True:
            with self._touch():
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
                gone = None if pause < LOOK_MOST else self._ended()
            if gone:
                raise self._gone(gone)
            time.sleep(pause)
            pause = min(2 * pause, LOOK_MOST)

    @contextlib.contextmanager
    def _touch(self) -> Any:
        """Turn what the engine raises where a process is gone into a refusal."""
        try:
            yield
        except RuntimeError as error:
            raise self._gone(self._ended_soon()) from error

    def _ended(self) -> dict[int, Any]:
        """What other processes said when they ended."""
        found = {}
        with contextlib.suppress(RuntimeError):
            for rank in range(self.size):
                if rank != self.rank and self._store.check([f"ended/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"ended/{rank}"))
        return found

    def _ended_soon(self) -> dict[int, Any]:
        until = time.monotonic() + ECHO / 4
        while not (found := self._ended()) and time.monotonic() < until:
            time.sleep(LOOK_MOST)
        return found

    def _gone(self, ended: Mapping[int, Any]) -> Refusal:
        hint = "run the same command again: it goes on from what is finished"
        # one that ended because another did is not the cause
        told = [(rank, said) for rank, said in sorted(ended.items()) if not said["message"].startswith(_LOST)]
        if not told:
            return ResourceError(f"{_LOST}: another of the {self.size} processes is gone", hint=hint)
        rank, said = told[0]
        if said["refused"] is not None:
            # as if it had been refused here
            return _refusal(said)
        return ResourceError(f"{_LOST}: process {rank} of {self.size} ended: {said['message']}", hint=hint)

    def lead(self, work: Callable[[], T]) -> T:
        self._turn += 1
        key = f"led/{self._turn}"
        if not self.leads:
            said = self._hear(key)
            if "refused" in said:
                raise _refusal(said)
            result: T = said["value"]
            return result
        try:
            made = work()
        except Refusal as refusal:
            name = type(refusal).__name__
            self._say(key, {"refused": name, "message": refusal.message, "hint": refusal.hint})
            raise
        self._say(key, {"value": made})
        return made

    def together(self, value: Any) -> list[Any]:
        self._turn += 1
        self._say(f"said/{self._turn}/{self.rank}", value)
        found = [value if rank == self.rank else self._hear(f"said/{self._turn}/{rank}") for rank in range(self.size)]
        # whoever has spoken now has heard all that was said before
        with self._touch():
            for key in self._mine[:-1]:
                self._store.delete_key(key)
        self._mine = self._mine[-1:]
        return found

    def add_up(self, own: OrderedSum, spans: Sequence[Sequence[Span]]) -> torch.Tensor:
        from rewright.passes.sums import exchange

        with self._touch():
            return exchange(self, self._group(), own, spans)

    def count(self, counts: torch.Tensor) -> torch.Tensor:
        with self._touch():
            self._group().all_reduce(counts)
        self.sent += counted_bytes(counts.nbytes, self.size)
        return counts

    def end(self, message: str, error: BaseException) -> bool:
        kind = type(error).__name__ if isinstance(error, Refusal) else None
        said = {"refused": kind, "message": message, "hint": getattr(error, "hint", None)}
        with contextlib.suppress(RuntimeError):
            self._store.set(f"ended/{self.rank}", json.dumps(said))
            until = time.monotonic() + ECHO * (not self.leads)
            while not self._said(said):
                if time.monotonic() >= until:
                    return False
                time.sleep(LOOK_MOST)
            return True
        return False

    def _said(self, mine: Mapping[str, Any]) -> bool:
        """Whether a process before this one ends with the same words, or this one only because others did."""
        before = [said for rank, said in self._ended().items() if rank < self.rank]
        return any(said["message"] == mine["message"] or mine["message"].startswith(_LOST) for said in before)

    def close(self) -> None:
        if self._begun:
            self._dist.destroy_process_group()
            self._begun = False


_LOST = "the run lost a process"


def counted_bytes(size: int, world: int) -> int:
    """What a process sends for the sum of `size` bytes over all processes, by the ring."""
    return 2 * size * (world - 1) // world


def _refusal(said: Mapping[str, Any]) -> Refusal:
    """What the first process was refused, as this one raises it."""
    kinds = {**vars(formats_errors), **vars(passes_errors)}
    kind = kinds.get(said["refused"], ConflictError)
    made: Refusal = kind(said["message"], hint=said["hint"])
    return made


_current = World()


def current() -> World:
    """The processes of this command line."""
    return _current


def join(rank: int, size: int, local: int) -> None:
    """Take the place that torchrun has given this process, among all and on its machine."""
    global _current
    _current = Torchrun(rank, size, local)
