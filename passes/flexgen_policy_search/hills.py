"""Hills of batch sizes: what each pair reaches by the scan, and the way from a pair to the best one near it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.place import Placed
from rewright.passes.flexgen_policy_search.roofline import Array, Setting, Terms, Work, terms
from rewright.passes.flexgen_policy_search.scan import grid, near, scan
from rewright.passes.flexgen_policy_search.shape import Model

# Sequences of a block at most, and of a GPU batch.
BLOCK, BATCH = 1 << 16, 4096
# Pairs of a setting that are looked at again with their neighbours.
FINE = 6
# Steps up a hill at most.
MOVES = 6
# Pairs that are solved where they look better than what was found.
MORE = 12


@dataclass(frozen=True, slots=True)
class Point:
    """What a pair of batch sizes reaches in a setting when pieces may be cut."""

    setting: Setting
    gbs: int
    nb: int
    throughput: float
    latency: float
    host: float
    share: tuple[float, ...] = (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is searched: a model on a machine, its work, the settings that are allowed, and a bound on latency."""

    model: Model
    machine: Machine
    work: Work
    settings: tuple[Setting, ...]
    most: float | None = None


def limits(problem: Problem) -> tuple[int, int]:
    """The largest GPU batch and the largest block that may fit."""
    work, rooms = problem.work, problem.machine.rooms
    setting = problem.settings[0]
    least = min(
        sum(cache.peak(work.context, one.kv_bits) for cache in problem.model.caches) for one in problem.settings
    )
    each = least / (2 if setting.schedule == "staggered" else 1) + 2 * problem.model.hidden
    block = int(min(BLOCK, max(1, sum(rooms.values()) / each)))
    token = 2 * (4 * problem.model.hidden + 2 * problem.model.query + 2 * problem.model.ffn)
    batch = int(min(BATCH, block, max(1, rooms["gpu"] / (4 * problem.model.vocabulary + token))))
    return batch, block


def look(problem: Problem, gbs: Array, nb: Array, shares: Array) -> list[Point]:
    """What every pair reaches in every setting, those left out that nothing fits."""
    found = []
    for setting in problem.settings:
        made = terms(problem.model, problem.machine, problem.work, setting, gbs, nb)
        seen = scan(made, problem.machine, shares, problem.most)
        for at in np.flatnonzero(seen.throughput > 0):
            if setting.schedule != "row" or nb[at] == 1:
                rate, time, host = (float(of[at]) for of in (seen.throughput, seen.latency, seen.host))
                share = tuple(seen.shares[at].tolist())
                found.append(Point(setting, int(gbs[at]), int(nb[at]), rate, time, host, share))
    return found


def pair(problem: Problem, setting: Setting, gbs: int, nb: int) -> Terms:
    """The terms of one pair."""
    return terms(problem.model, problem.machine, problem.work, setting, *product_of([(gbs, nb)]))


def product_of(near: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """Pairs as two arrays."""
    return np.array([float(g) for g, _ in near]), np.array([float(n) for _, n in near])


def closer(problem: Problem, setting: Setting, points: list[Point], batch: int, block: int) -> list[Point]:
    """A setting again: pairs near its best ones, with finer shares of the caches near theirs."""
    one = replace(problem, settings=(setting,))
    layers = max(1, problem.model.layers)
    top = top_of(points, FINE)
    around = sorted({pair_ for point in top for pair_ in _around(point, batch, block)})
    places = near(grid(min(12, max(4, layers))), np.array([point.share for point in top]), 0.25)
    return look(one, *product_of(around), places)


def _around(point: Point, batch: int, block: int) -> list[tuple[int, int]]:
    """Pairs near a pair: as far as the coarse grid's neighbours, at most some twenty along either axis."""

    def near(value: int, most: int) -> list[int]:
        low, high = max(1, int(value / 1.3)), min(most, int(value * 1.3) + 1)
        return list(range(low, high + 1, max(1, (high - low) // 20)))

    return [(g, n) for g in near(point.gbs, batch) for n in near(point.nb, block) if g * n <= block]


def climb(problem: Problem, start: Point, batch: int, block: int) -> list[Point]:
    """From a point to the top of its hill, by whole numbers around it and caches by the layer; what was seen there."""
    one = replace(problem, settings=(start.setting,))
    layers = min(96, max(1, problem.model.layers))
    here, found = start, [start]
    for _ in range(MOVES):
        places = near(grid(layers), np.array([here.share]), max(1 / 12, 1 / layers))
        axes = (_span(here.gbs, batch), _span(here.nb, block))
        around = {(g, n) for g in axes[0] for n in axes[1]}
        # along the ridge on which blocks are as large as memory lets them
        around |= {(g, here.gbs * here.nb // g + more) for g in _span(here.gbs, batch, 2) for more in (0, 1)}
        around = {(g, n) for g, n in around if n >= 1 and g * n <= block}
        found += look(one, *product_of(sorted(around)), places)
        top = top_of(found, 1)[0]
        if (top.gbs, top.nb) == (here.gbs, here.nb):
            break
        here = top
    return found


def _span(value: int, most: int, part: int = 12) -> list[int]:
    """Whole numbers around one, at most eleven: those next to it, and some as far as a part of it."""
    far = max(1, value // part)
    steps = {-far, -far // 2, -3, -2, -1, 0, 1, 2, 3, far // 2, far}
    return sorted({value + step for step in steps if 1 <= value + step <= most and abs(step) <= max(2, far)})


def top_of(points: Sequence[Point], count: int) -> list[Point]:
    """The best points, each pair and setting once."""
    kept: dict[tuple[Setting, int, int], Point] = {}
    for point in sorted(points, key=lambda point: (-point.throughput, point.gbs, point.nb)):
        kept.setdefault((point.setting, point.gbs, point.nb), point)
        if len(kept) == count:
            break
    return list(kept.values())


def apart(points: Sequence[Point], count: int) -> list[Point]:
    """The best points, each well apart from the others of its setting: hills, not one hill's top."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.throughput, point.gbs, point.nb)):
        close = (
            one.setting == point.setting
            and max(one.gbs, point.gbs) < 1.12 * min(one.gbs, point.gbs) + 1
            and max(one.nb, point.nb) < 1.12 * min(one.nb, point.nb) + 1
            for one in kept
        )
        if not any(close):
            kept.append(point)
        if len(kept) == count:
            break
    return kept


def promising(points: Sequence[Point], tried: Mapping[tuple[Setting, int, int], Placed | None]) -> list[Point]:
    """Points that were not solved, and would beat what was if pieces could be cut."""
    top = max((one.throughput for one in tried.values() if one is not None), default=0.0)
    better = [point for point in points if point.throughput > top * (1 + 1e-6)]
    return [point for point in top_of(better, MORE) if (point.setting, point.gbs, point.nb) not in tried]
