"""The search: coarse over all pairs of batch sizes, fine around the best of them, exact for those that are left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rewright.passes.errors import ResourceError
from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.place import Placed, best, place
from rewright.passes.flexgen_policy_search.roofline import Array, Setting, Terms, Work, terms
from rewright.passes.flexgen_policy_search.scan import grid, near, pairs, product, scan
from rewright.passes.flexgen_policy_search.shape import Model

# Sequences of a block at most, and of a GPU batch.
BLOCK, BATCH = 1 << 16, 4096
# Pairs of a setting that are looked at again with their neighbours, hills of it that are climbed, pairs that each of
# these puts forward, and how many of all are solved exactly.
FINE, HILLS, EXACT, SOLVED = 6, 3, 2, 10
# Pairs more that are solved where they look better than what was found.
MORE = 12
# A setting is looked at closer when it reaches so much of the best on the coarse grid.
WORTH = 0.85
# Hills are climbed that begin so near the best.
CLOSE = 0.93
# The best of these, of which the next larger pairs are solved too.
EDGES = 3
# Steps up a hill at most.
MOVES = 6
# Up to so many pairs all are solved exactly.
FEW = 36
Objective = Literal["throughput", "min-ram"]


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
class Found:
    """The best policy, all points that were looked at, and what pieces that may be cut would reach."""

    best: Placed
    points: tuple[Point, ...]
    bound: float
    others: tuple[Placed, ...]


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


def search(problem: Problem) -> Found | None:
    """The best policy by throughput, None where none fits."""
    batch, block = limits(problem)
    if batch * block <= FEW:
        return _all(problem, batch, block)
    gbs, nb = product(pairs(batch), pairs(block))
    inside = gbs * nb <= block
    points = look(problem, gbs[inside], nb[inside], grid(4))
    most = max((point.throughput for point in points), default=0.0)
    for setting in problem.settings:
        own = [point for point in points if point.setting == setting]
        if own and max(point.throughput for point in own) >= WORTH * most:
            points += _closer(problem, setting, own, batch, block)
    most = max((point.throughput for point in points), default=0.0)
    tried: dict[tuple[Setting, int, int], Placed | None] = {}
    tops: list[Point] = []
    for setting in problem.settings:
        own = [point for point in points if point.setting == setting and point.throughput >= CLOSE * most]
        for hill in _apart(own, HILLS):
            seen = _climb(problem, hill, batch, block)
            points += seen
            tops += _top(seen, EXACT)
    for point in _top(tops, SOLVED):
        _try(problem, tried, point.setting, point.gbs, point.nb)
    for point in _promising(points, tried):
        _try(problem, tried, point.setting, point.gbs, point.nb)
    for point in [] if tried else _smallest(problem):
        _try(problem, tried, point.setting, point.gbs, point.nb)
    for _ in range(2):
        # at the edge of what fits, cut pieces may not where whole ones do
        for one in sorted(filter(None, tried.values()), key=lambda one: -one.throughput)[:EDGES]:
            for gbs_, nb_ in ((one.gbs, one.nb + 1), (one.gbs + 1, one.nb)):
                if gbs_ <= batch and gbs_ * nb_ <= block:
                    _try(problem, tried, one.terms.setting, gbs_, nb_)
    top = best(tried.values())
    if top is None:
        return None
    for setting in problem.settings:
        # what the other settings reach is worth saying
        own = [point for point in points if point.setting == setting]
        for point in _top(own, 1):
            _try(problem, tried, setting, point.gbs, point.nb)
    top = best(tried.values()) or top
    return Found(top, tuple(points), _bound(problem, top), _others(tried, top))


def _closer(problem: Problem, setting: Setting, points: list[Point], batch: int, block: int) -> list[Point]:
    """A setting again: pairs near its best ones, with finer shares of the caches near theirs."""
    one = replace(problem, settings=(setting,))
    layers = max(1, problem.model.layers)
    top = _top(points, FINE)
    around = sorted({pair_ for point in top for pair_ in _around(point, batch, block)})
    places = near(grid(min(12, max(4, layers))), np.array([point.share for point in top]), 0.25)
    return look(one, *product_of(around), places)


def _climb(problem: Problem, start: Point, batch: int, block: int) -> list[Point]:
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
        top = _top(found, 1)[0]
        if (top.gbs, top.nb) == (here.gbs, here.nb):
            break
        here = top
    return found


def _span(value: int, most: int, part: int = 12) -> list[int]:
    """Whole numbers around one, at most eleven: those next to it, and some as far as a part of it."""
    far = max(1, value // part)
    steps = {-far, -far // 2, -3, -2, -1, 0, 1, 2, 3, far // 2, far}
    return sorted({value + step for step in steps if 1 <= value + step <= most and abs(step) <= max(2, far)})


def _all(problem: Problem, batch: int, block: int) -> Found | None:
    """Every pair solved exactly."""
    tried: dict[tuple[Setting, int, int], Placed | None] = {}
    for setting in problem.settings:
        for gbs in range(1, batch + 1):
            for nb in range(1, max(1, block // gbs) + 1):
                _try(problem, tried, setting, gbs, nb)
    top = best(tried.values())
    if top is None:
        return None
    points = tuple(
        Point(one.terms.setting, one.gbs, one.nb, one.throughput, one.seconds, one.peak["cpu"])
        for one in tried.values()
        if one is not None
    )
    return Found(top, points, _bound(problem, top), _others(tried, top))


def _try(
    problem: Problem, tried: dict[tuple[Setting, int, int], Placed | None], setting: Setting, gbs: int, nb: int
) -> None:
    if (setting, gbs, nb) not in tried and (nb == 1 or setting.schedule != "row"):
        made = pair(problem, setting, gbs, nb)
        tried[setting, gbs, nb] = place(made, 0, problem.machine, most=problem.most)


def pair(problem: Problem, setting: Setting, gbs: int, nb: int) -> Terms:
    """The terms of one pair."""
    one = (np.array([float(gbs)]), np.array([float(nb)]))
    return terms(problem.model, problem.machine, problem.work, setting, *one)


def product_of(near: Sequence[tuple[int, int]]) -> tuple[Array, Array]:
    """Pairs as two arrays."""
    return np.array([float(g) for g, _ in near]), np.array([float(n) for _, n in near])


def _top(points: Sequence[Point], count: int) -> list[Point]:
    """The best points, each pair and setting once."""
    kept: dict[tuple[Setting, int, int], Point] = {}
    for point in sorted(points, key=lambda point: (-point.throughput, point.gbs, point.nb)):
        kept.setdefault((point.setting, point.gbs, point.nb), point)
        if len(kept) == count:
            break
    return list(kept.values())


def _promising(points: Sequence[Point], tried: Mapping[tuple[Setting, int, int], Placed | None]) -> list[Point]:
    """Points that were not solved, and would beat what was if pieces could be cut."""
    top = max((one.throughput for one in tried.values() if one is not None), default=0.0)
    better = [point for point in points if point.throughput > top * (1 + 1e-6)]
    return [point for point in _top(better, MORE) if (point.setting, point.gbs, point.nb) not in tried]


def _apart(points: Sequence[Point], count: int) -> list[Point]:
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


def _around(point: Point, batch: int, block: int) -> list[tuple[int, int]]:
    """Pairs near a pair: as far as the coarse grid's neighbours, at most some twenty along either axis."""

    def near(value: int, most: int) -> list[int]:
        low, high = max(1, int(value / 1.3)), min(most, int(value * 1.3) + 1)
        return list(range(low, high + 1, max(1, (high - low) // 20)))

    return [(g, n) for g in near(point.gbs, batch) for n in near(point.nb, block) if g * n <= block]


def _smallest(problem: Problem) -> list[Point]:
    return [Point(setting, 1, 1, 0.0, 0.0, 0.0) for setting in problem.settings]


def _bound(problem: Problem, top: Placed) -> float:
    """What the winner's pair of batch sizes would reach at most if pieces could be cut."""
    cut = place(top.terms, top.at, problem.machine, most=problem.most, relaxed=True)
    return top.throughput if cut is None else max(cut.throughput, top.throughput)


def _others(tried: dict[tuple[Setting, int, int], Placed | None], top: Placed) -> tuple[Placed, ...]:
    """The best of each other setting that was solved."""
    by: dict[Setting, list[Placed]] = {}
    for (setting, _, _), one in tried.items():
        if one is not None and setting != top.terms.setting:
            by.setdefault(setting, []).append(one)
    found = [made for ones in by.values() if (made := best(ones)) is not None]
    return tuple(sorted(found, key=lambda one: -one.throughput))


def leanest(problem: Problem) -> Found:
    """The policy that takes the least of the host's memory. Raises ResourceError where none fits."""
    if search(problem) is None:
        raise shortage(problem)
    low, high = 0, problem.machine.rooms["cpu"]
    gbs, nb = product(pairs(64), pairs(64))
    while high - low > max(1 << 20, high // 200):
        middle = (low + high) // 2
        tight = replace(problem, machine=replace(problem.machine, cpu_bytes=middle, cpu_reserve=0))
        low, high = (low, middle) if look(tight, gbs, nb, grid(4)) else (middle, high)
    tight = replace(problem, machine=replace(problem.machine, cpu_bytes=high, cpu_reserve=0))
    least: list[Placed] = []
    for point in _top(look(tight, gbs, nb, grid(4)), EXACT) + _smallest(problem):
        made = pair(problem, point.setting, point.gbs, point.nb)
        one = place(made, 0, problem.machine, aim="cpu", most=problem.most)
        if one is not None:
            least.append(one)
    found = search(replace(problem, machine=replace(problem.machine, cpu_bytes=high, cpu_reserve=0)))
    if not least and found is None:
        raise shortage(problem)
    size = min(one.peak["cpu"] for one in least) if least else high
    exact = search(replace(problem, machine=replace(problem.machine, cpu_bytes=size, cpu_reserve=0)))
    top = exact or found
    if top is None:
        top_placed = min(least, key=lambda one: one.peak["cpu"])
        return Found(top_placed, (), top_placed.throughput, ())
    return top


def shortage(problem: Problem) -> ResourceError:
    """What is short, and the smallest change of one thing that makes some policy fit."""
    from rewright.passes.flexgen_policy_search.short import explain

    return explain(problem)
