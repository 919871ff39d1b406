"""The search: coarse over all pairs of batch sizes, fine around the best of them, exact for those that are left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rewright.passes.errors import ResourceError
from rewright.passes.flexgen_policy_search.hills import (
    Point,
    Problem,
    apart,
    climb,
    closer,
    limits,
    look,
    pair,
    promising,
    top_of,
)
from rewright.passes.flexgen_policy_search.place import Placed, best, place
from rewright.passes.flexgen_policy_search.roofline import Setting
from rewright.passes.flexgen_policy_search.scan import grid, pairs, product
from rewright.passes.flexgen_policy_search.walk import Walks

# Hills of a setting that are climbed, pairs that each of these puts forward, and of how many of all a program is asked.
HILLS, EXACT, ASKED = 3, 2, 10
# A setting is looked at closer when it reaches so much of the best on the coarse grid.
WORTH = 0.85
# Hills are climbed that begin so near the best.
CLOSE = 0.93
# Settings from whose best pair a walk goes on, and pairs that are solved exactly after it at most.
WALKS, SOLVED = 2, 12
# The best of these, of which the next larger pairs are solved too.
EDGES = 3
# Up to so many pairs all are solved exactly.
FEW = 36
Objective = Literal["throughput", "min-ram"]


@dataclass(frozen=True, slots=True)
class Found:
    """The best policy, all points that were looked at, and what pieces that may be cut would reach."""

    best: Placed
    points: tuple[Point, ...]
    bound: float
    others: tuple[Placed, ...]


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
            points += closer(problem, setting, own, batch, block)
    most = max((point.throughput for point in points), default=0.0)
    tried: dict[tuple[Setting, int, int], Placed | None] = {}
    tops: list[Point] = []
    for setting in problem.settings:
        own = [point for point in points if point.setting == setting and point.throughput >= CLOSE * most]
        for hill in apart(own, HILLS):
            seen = climb(problem, hill, batch, block)
            points += seen
            tops += top_of(seen, EXACT)
    _walk(problem, tried, Walks(problem, batch, block), top_of(tops, ASKED))
    for point in promising(points, tried):
        _try(problem, tried, point.setting, point.gbs, point.nb)
    for point in [] if any(tried.values()) else _smallest(problem):
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
        for point in top_of(own, 1):
            _try(problem, tried, setting, point.gbs, point.nb)
    top = best(tried.values()) or top
    return Found(top, tuple(points), _bound(problem, top), _others(tried, top))


def _walk(
    problem: Problem, tried: dict[tuple[Setting, int, int], Placed | None], walks: Walks, tops: list[Point]
) -> None:
    """Walk on from the best pair of each of the best settings, and solve the pairs that may be better than any."""
    starts: dict[Setting, tuple[Setting, int, int]] = {}
    for key in sorted(((top.setting, top.gbs, top.nb) for top in tops), key=walks.reach, reverse=True):
        starts.setdefault(key[0], key)
    for start in list(starts.values())[:WALKS]:
        walks.walk(start)
    for key in sorted(walks.known, key=lambda key: -walks.known[key])[:SOLVED]:
        top = max((one.throughput for one in tried.values() if one is not None), default=0.0)
        if walks.known[key] <= top * (1 + 1e-6):
            break
        _try(problem, tried, *key)


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
    for point in top_of(look(tight, gbs, nb, grid(4)), EXACT) + _smallest(problem):
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
