"""Time one op, beside a peer and beside what the device can do at best."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any, Literal

import torch

from rewright.kernels.dispatch import use
from tests.kernels.conform import verdicts

Bound = Literal["copy", "matmul"]
# Folders of ops that hold more than one function.
FUNCTIONS = {
    "pack": ("pack", "unpack"),
    "bitmask": ("pack_bitmask", "unpack_bitmask"),
    "select": ("keep_largest", "keep_of"),
    "w4a16_gemm": ("w4a16_gemm", "w4a16_gemm_dx"),
    "vandermonde": ("vandermonde", "vandermonde_adjoint"),
}


class RedError(Exception):
    """The op's conformance is red on this device: its time would mean nothing."""


@dataclass(frozen=True)
class Job:
    """One shape of one op.

    `moved` is the bytes that must be read and written at least once, `flops` the operations of the mathematics;
    `bound` says which of the two the device's ceiling is taken from, and `dtype` which matmul that is.
    """

    label: str
    call: Callable[[], object]
    moved: int
    flops: int
    bound: Bound
    dtype: torch.dtype
    peer_name: str
    peer: Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds a call: median and quartiles."""

    median: float
    lower: float
    upper: float
    calls: int


def machine(device: str) -> dict[str, Any]:
    """The device and the libraries that the times belong to."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "compressed-tensors")}
    return {"device": name, "python": platform.python_version(), **versions}


def clock(call: Callable[[], object], device: str, seconds: float) -> Times:
    """Call until `seconds` are spent, nine times at least, after three calls that are not counted."""
    for _ in range(3):
        call()
    _finish(device)
    spent: list[float] = []
    while len(spent) < 9 or sum(spent) < seconds:
        if device == "cuda":
            begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch annotates no __new__
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # as above
            begin.record()
            call()
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            spent.append(time.perf_counter() - start)
    lower, median, upper = quantiles(spent, n=4, method="inclusive")
    return Times(median, lower, upper, len(spent))


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Ceilings:
    """What a plain copy (bytes a second, read and written) and a plain matmul (FLOP/s) reach on this device."""

    def __init__(self, device: str, seconds: float) -> None:
        self.device = device
        self.seconds = seconds
        self.known: dict[str, float] = {}

    def copy(self) -> float:
        """Bytes a second of a copy far larger than any cache."""
        if "copy" not in self.known:
            size = (1 << 30) if self.device == "cuda" else (1 << 28)
            source = torch.zeros(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            best = clock(lambda: target.copy_(source), self.device, self.seconds)
            self.known["copy"] = 2 * size / best.median
        return self.known["copy"]

    def matmul(self, dtype: torch.dtype) -> float:
        """FLOP/s of a square matmul in a dtype; float32 without TF32."""
        name = f"matmul {str(dtype).removeprefix('torch.')}"
        if name not in self.known:
            side = 8192 if self.device == "cuda" else 1024
            a = torch.ones(side, side, dtype=dtype, device=self.device)
            best = clock(lambda: a @ a, self.device, self.seconds)
            self.known[name] = 2 * side**3 / best.median
        return self.known[name]


def gate(op: str, choice: str, device: str) -> int:
    """How many conformance cases the op passes on this device; raises `RedError` naming the first that fails."""
    found = verdicts(choice, device, list(FUNCTIONS.get(op, (op,))))
    for name, verdict in found.items():
        if not verdict.ok:
            raise RedError(f"`{op}` is not timed: {name} is not conformant: {verdict.detail}")
    return len(found)


def measure(jobs: list[Job], choice: str, device: str, seconds: float) -> dict[str, Any]:
    """Time the jobs and their peers; returns the rows and the ceilings they were held against."""
    ceilings = Ceilings(device, seconds)
    rows = []
    for job in jobs:
        with use(choice):
            mine = clock(job.call, device, seconds)
        theirs = clock(job.peer, device, seconds)
        copied = job.bound == "copy"
        rate = (job.moved if copied else job.flops) / mine.median
        ceiling = ceilings.copy() if copied else ceilings.matmul(job.dtype)
        rows.append(
            {
                "shape": job.label,
                "seconds": {"median": mine.median, "quartiles": [mine.lower, mine.upper], "calls": mine.calls},
                ("gigabytes_per_second" if copied else "teraflops"): rate / (1e9 if copied else 1e12),
                "fraction_of_ceiling": rate / ceiling,
                "ceiling": job.bound,
                "peer": {
                    "name": job.peer_name,
                    "median": theirs.median,
                    "quartiles": [theirs.lower, theirs.upper],
                },
                "times_faster_than_peer": theirs.median / mine.median,
            }
        )
    return {"rows": rows, "ceilings": ceilings.known}
