"""`bench --calibrate`: this machine measured and described, with what its description gets wrong about other work."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rewright.passes.flexgen_policy_search import detect
from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.measure import COPY, FILE, Disk, Meter
from rewright.passes.flexgen_policy_search.roofline import attended, multiplied

MIB = 1 << 20
# Rows of the products that the curve is drawn from, and (out, width) of the matrices, in a device's unit of width.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MATRICES = ((1, 1), (4, 1), (1, 4))
# (batch, heads, heads of keys, tokens) that attention is measured on, without groups and with large ones.
ALONE, GROUPED, WIDTH = ((1, 16, 16, 512), (2, 16, 16, 2048)), ((1, 32, 4, 512), (2, 32, 4, 2048)), 128
BLOCKS = tuple((size * MIB, threads) for size in (1, 4, 16) for threads in (1, 4, 8))
# What nothing is fitted to: products (rows, out, width), attention, and MiB read from the disk.
HELD_PRODUCTS = ((1, 1.5, 1.5), (1, 2.75, 1), (6, 1, 2.5), (96, 2, 1))
HELD_ATTENTION = ((1, 16, 16, 1280), (3, 8, 8, 768), (1, 32, 4, 1536), (2, 32, 4, 896))
HELD_READS = (24, 48, 96, 160)
# MiB that the disk's rate is taken from, a small copy, how often all is measured and within how many seconds.
READ, SMALL, ROUNDS, SECONDS = 128, 64 << 10, 3, 52
# A method of a meter and what it takes.
Case = tuple[Any, ...]
_CPU_PRODUCT: Case = ("product", 256, 1024, 1024)
_CPU_READ: Case = ("product", 1, 4096, 1024)


@dataclass(frozen=True, slots=True)
class Held:
    """A time that nothing was fitted to: seconds as measured and as foretold."""

    name: str
    measured: float
    foretold: float

    @property
    def error(self) -> float:
        """The difference as a share of what was measured."""
        return self.foretold / self.measured - 1


@dataclass(frozen=True, slots=True)
class Calibration:
    """A measured machine, the times that were held out, seconds that it took and what it was measured with."""

    machine: Machine
    held: tuple[Held, ...]
    seconds: float
    how: str


def calibrate(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    *,
    share: float = 1.0,
    told: Callable[[str], None] = lambda step: None,
) -> Calibration:
    """Measure this machine, with the disk that `folder` is on. Raises ResourceError and StorageError.

    `dtype` is that of products and attention on the device; beside a GPU the CPU is measured in float32. `share`
    scales the time that it takes; `told` hears what is measured next.
    """
    began = time.perf_counter()
    meter, host = Meter(device, dtype, share), Meter(torch.device("cpu"), torch.float32, share)
    alone = device.type != "cuda"
    unit = 1024 if alone else 4096
    rows = ROWS if alone else (*ROWS, 1024, 4096)
    shapes = [(out * unit, width * unit) for out, width in MATRICES]
    fitted: list[Case] = [("start",)]
    fitted += [("product", count, *shape) for count in rows for shape in shapes]
    fitted += [("attention", *one, WIDTH) for one in (*ALONE, *GROUPED)]
    fitted += [("copy", way, count) for way in ("h2d", "d2h") for count in (COPY, SMALL)]
    beside: list[Case] = [_CPU_PRODUCT, _CPU_READ, ("copy", "h2d", COPY)]
    beside += [("attention", *one, WIDTH) for one in (*ALONE, *GROUPED)]
    held: list[Case] = [("product", count, int(out * unit), int(width * unit)) for count, out, width in HELD_PRODUCTS]
    held += [("attention", *one, WIDTH) for one in HELD_ATTENTION]
    with Disk(folder) as disk:
        told("the disk")
        figures: dict[str, Any] = {"disk_write": disk.write()}
        block = min(BLOCKS, key=lambda one: disk.typical(32 * MIB, *one))
        # what comes and goes on the machine is to come and go for all of it alike
        times, ours, reads = _Least(meter), _Least(host), dict[int, list[float]]()
        for number in range(1, ROUNDS + 1):
            spent = time.perf_counter() - began
            if number > 1 and spent * number / (number - 1) > SECONDS:
                break
            told(f"products, attention, copies and reads, {number} of {ROUNDS}")
            times.take([*fitted, *held])
            if not alone:
                ours.take(beside)
            for count in (READ, *HELD_READS):
                reads.setdefault(count, []).append(disk.typical(count * MIB, *block))
        seconds = {count: statistics.median(several) for count, several in reads.items()}
        figures |= {"launch_s": times["start",], "disk_read": READ * MIB / seconds[READ]}
        figures |= _products(times, rows, shapes) | _attention(times, "gpu") | _copies(times)
        if alone:
            figures |= {f"cpu_{name}": figures[f"gpu_{name}"] for name in ("flops", "attn", "attn_flops")}
            # a copy within the host's memory reads and writes it
            figures["dram"] = max(2 * figures["h2d"], figures["hbm"])
        else:
            figures |= {"cpu_flops": 2 * math.prod(_CPU_PRODUCT[1:]) / ours[_CPU_PRODUCT]} | _attention(ours, "cpu")
            figures["dram"] = max(2 * COPY / ours["copy", "h2d", COPY], 4 * math.prod(_CPU_READ[1:]) / ours[_CPU_READ])
        found = replace(detect.detect(folder), source="measured", published=None, **figures)
        told("copies and reads while all else runs")
        left = _together(meter, disk, unit, min(4, block[1]))
    missed = [_foretold(found, meter, case, times[case]) for case in held]
    missed += [
        Held(f"{count} MiB from the disk", seconds[count], count * MIB / found.disk_read) for count in HELD_READS
    ]
    how = f"{str(dtype).removeprefix('torch.')} on {device.type}, {threads} threads"
    how += f", disk {'past' if disk.direct else 'through'} the cache in {block[1]} x {block[0] // MIB} MiB"
    made = replace(
        found,
        holdout=statistics.fmean(abs(one.error) for one in missed),
        busy=tuple(sorted(left.items())),
        sources=tuple((field, said if field not in figures else "measured") for field, said in found.sources),
        **{name: getattr(found, name) * part for name, part in left.items()},
    )
    return Calibration(made, tuple(missed), time.perf_counter() - began, how)


class _Least:
    """The least seconds of each case over all rounds."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._times: dict[Case, float] = {}

    def take(self, cases: Iterable[Case]) -> None:
        for case in cases:
            spent = getattr(self.meter, case[0])(*case[1:])
            self._times[case] = min(spent, self._times.get(case, math.inf))

    def __getitem__(self, case: Case) -> float:
        return self._times[case]


def _products(times: _Least, rows: Sequence[int], shapes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """How fast weights are read, how fast products are at best, and the share of that by rows."""
    item = times.meter.dtype.itemsize
    numbers = {shape: math.prod(shape) for shape in shapes}
    read = statistics.median(item * numbers[shape] / times["product", 1, *shape] for shape in shapes)
    curve: list[tuple[int, float]] = []
    for count in rows[1:]:
        spent = {shape: times["product", count, *shape] for shape in shapes}
        rate = statistics.median(2 * count * numbers[shape] / spent[shape] for shape in shapes)
        # where the weights' bytes take as long, the arithmetic could be faster
        over = statistics.median(spent[shape] * read / (item * numbers[shape]) for shape in shapes)
        if over > 1.2 or count == rows[-1]:
            curve.append((count, max(rate, curve[-1][1] if curve else 0.0)))
    top = curve[-1][1]
    return {"hbm": read, "gpu_flops": top, "gemm": tuple((count, rate / top) for count, rate in curve)}


def _attention(times: _Least, where: str) -> dict[str, float]:
    """Bytes of keys and values a second, and arithmetic where many heads share them."""
    size = 2 * WIDTH * times.meter.dtype.itemsize
    read = statistics.median(b * k * n * size / times["attention", b, h, k, n, WIDTH] for b, h, k, n in ALONE)
    flops = statistics.median(4 * b * h * n * WIDTH / times["attention", b, h, k, n, WIDTH] for b, h, k, n in GROUPED)
    return {f"{where}_attn": read, f"{where}_attn_flops": flops}


def _copies(times: _Least) -> dict[str, float]:
    """Bytes a second each way between host and device, and what a copy costs to start."""
    found: dict[str, float] = {}
    starts = [1e-7]
    for way in ("h2d", "d2h"):
        large, little = times["copy", way, COPY], times["copy", way, SMALL]
        # on a machine that is busy a small copy may have taken about as long
        found[way] = (COPY - SMALL) / max(large - little, large / 2)
        starts.append(little - SMALL / found[way])
    return {**found, "copy_s": max(starts)}


def _foretold(machine: Machine, meter: Meter, case: Case, seconds: float) -> Held:
    """What the roofline says of a case that no figure was fitted to."""
    item = meter.dtype.itemsize
    if case[0] == "product":
        _, rows, out, width = case
        spent = multiplied(machine, 2.0 * rows * out * width, float(item * out * width), rows)
        name = f"product of {rows} rows, [{out}, {width}]"
    else:
        _, batch, heads, kept, tokens, _ = case
        numbers = batch * tokens * WIDTH
        spent = attended(machine, 4.0 * heads * numbers, 2.0 * kept * numbers * item)
        name = f"attention of {batch} to {tokens} tokens, {heads} heads, {kept} kept"
    return Held(name, seconds, machine.launch_s + float(spent))


def _together(meter: Meter, disk: Disk, unit: int, threads: int) -> dict[str, float]:
    """What share of what they do alone copies and reads still do while products and both copies run."""
    block = 16 * MIB
    places = itertools.cycle(range(0, FILE - block * threads + 1, block))
    given = torch.ones((1, unit), dtype=meter.dtype, device=meter.device)
    matrix = torch.ones((4 * unit, unit), dtype=meter.dtype, device=meter.device)
    jobs: dict[str, Callable[[], object]] = {
        "h2d": meter.copier("h2d", COPY),
        "d2h": meter.copier("d2h", COPY),
        "disk_read": lambda: disk.read(block * threads, block, threads, next(places)),
    }
    alone = {name: meter.together({name: job}, 0.5)[name] for name, job in jobs.items()}
    rates = meter.together({**jobs, "product": lambda: torch.nn.functional.linear(given, matrix)}, 2.0)
    return {name: min(1.0, max(0.01, rates[name] / once)) for name, once in alone.items()}
