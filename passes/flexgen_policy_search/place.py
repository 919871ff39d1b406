"""One setting and pair of batch sizes: how many pieces of each class on each tier, exactly, as a small integer program.

Equal pieces are counted, not told apart, so that the program has a few dozen variables for any model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.roofline import RESOURCES, TIERS, Array, Phase, Terms

# Nodes of the solver's tree at most: a limit of time would make results depend on the machine's load.
NODES = 4000
# How far from the best a solution may be, relative.
GAP = 1e-5
Aim = Literal["seconds", "gpu", "cpu", "disk"]
Counts = dict[tuple[str, int, str], int]


@dataclass(frozen=True, slots=True)
class Placed:
    """A placement: pieces by (`w` weights or `c` caches, class, tier), seconds by phase and resource, bytes by tier."""

    terms: Terms
    at: int
    counts: Counts
    seconds: float
    spent: dict[str, dict[str, float]]
    peak: dict[str, int]

    @property
    def gbs(self) -> int:
        return int(self.terms.gbs[self.at])

    @property
    def nb(self) -> int:
        return int(self.terms.nb[self.at])

    @property
    def throughput(self) -> float:
        """Generated tokens a second."""
        return float(self.terms.tokens[self.at]) / self.seconds

    def bytes_on(self, tier: str, which: str = "w") -> float:
        """Bytes of weights, or with `c` of caches, on a tier."""
        sizes = self.terms.sizes if which == "w" else [float(v[self.at]) for v in self.terms.rooms.caches.values()]
        tiers = (tier, "compute") if tier == "cpu" else (tier,)
        return sum(count * sizes[key[1]] for key, count in self.counts.items() if key[0] == which and key[2] in tiers)


@dataclass
class _Program:
    """Rows of a linear program over named columns."""

    names: list[tuple[str, int, str]] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)
    rows: list[tuple[dict[int, float], float, float]] = field(default_factory=list)
    index: dict[tuple[str, int, str], int] = field(default_factory=dict)

    def column(self, name: tuple[str, int, str], most: float = np.inf, *, whole: bool = False) -> int:
        self.index[name] = len(self.names)
        self.names.append(name)
        self.most.append(most)
        self.whole.append(int(whole))
        return self.index[name]

    def row(self, parts: dict[int, float], least: float, most: float) -> None:
        scale = max((abs(value) for value in parts.values()), default=1.0) or 1.0
        self.rows.append(({at: value / scale for at, value in parts.items()}, least / scale, most / scale))

    def _kinds(self) -> Iterable[tuple[tuple[str, int, str], int]]:
        return zip(self.names, self.whole, strict=True)

    def solve(self, cost: dict[int, float], *, relaxed: bool) -> Array | None:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        line, column, value = [], [], []
        for at, (parts, _, _) in enumerate(self.rows):
            for key, part in parts.items():
                line.append(at)
                column.append(key)
                value.append(part)
        matrix = csr_array((value, (line, column)), shape=(len(self.rows), len(self.names)))
        limits = LinearConstraint(matrix, [row[1] for row in self.rows], [row[2] for row in self.rows])
        scale = max(abs(part) for part in cost.values())
        aim = np.zeros(len(self.names))
        for key, part in cost.items():
            aim[key] = part / scale
        found: Any = milp(
            aim,
            constraints=limits,
            bounds=Bounds(0, np.array(self.most)),
            integrality=np.array([int(whole and not (relaxed and name[0] != "flag")) for name, whole in self._kinds()]),
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
        return None if found.x is None else np.asarray(found.x, dtype=np.float64)


def place(
    terms: Terms, at: int, machine: Machine, *, aim: Aim = "seconds", most: float | None = None, relaxed: bool = False
) -> Placed | None:
    """The best placement of pair `at`, None where none fits.

    With `aim` a tier, the one that needs the fewest bytes of it, however many there are, in at most `most` seconds.
    `relaxed` lets pieces be cut, which bounds what any placement reaches; nothing else may be read of the result.
    """
    program = _Program()
    for (letter, key), (count, tiers) in _choices(terms).items():
        columns = [program.column((letter, key, tier), count, whole=True) for tier in tiers]
        program.row(dict.fromkeys(columns, 1.0), count, count)
    flags = {name: program.column(("flag", 0, name), 1, whole=True) for name in ("streams", "cached", "spills")}
    units = [_clock(phase, terms, at) for phase in terms.phases]
    clocks = [program.column(("time", number, ""), np.inf) for number in range(len(terms.phases))]
    _flags(program, terms, flags)
    for number, phase in enumerate(terms.phases):
        unit = units[number]
        for resource in RESOURCES:
            parts = {clocks[number]: -1.0}
            for letter, table in (("w", phase.weights), ("c", phase.caches)):
                for (key, tier), spent in table.items():
                    column = program.index.get((letter, key, tier))
                    part = _at(spent, resource, at) / unit
                    # less than the solver looks at
                    if column is not None and part > 1e-9:
                        parts[column] = part
            program.row(parts, -np.inf, -_at(phase.fixed, resource, at) / unit)
    scale = sum(phase.times * unit for phase, unit in zip(terms.phases, units, strict=True))
    total = {clock: phase.times * unit / scale for clock, phase, unit in zip(clocks, terms.phases, units, strict=True)}
    if most is not None:
        program.row(total, 0, most / scale)
    held: dict[str, dict[int, float]] = {}
    for tier in TIERS:
        held[tier], fixed = _memory(program, terms, at, tier, flags)
        room = float(machine.rooms[tier])
        if aim == tier:
            extra = program.column(("extra", 0, tier))
            program.row({**held[tier], extra: -1e9}, -np.inf, -fixed)
        else:
            program.row(held[tier], -np.inf, room - fixed)
    if aim == "seconds":
        cost = dict(total)
        # of equal times the one that reads the disk least, then the one that takes the least of the host
        least = 1e-7 * sum(total.values())
        for tier, weight in (("disk", least), ("cpu", 0.1 * least)):
            for column, size in held[tier].items():
                cost[column] = cost.get(column, 0.0) + weight * size / max(1.0, terms.model.total_bytes)
    else:
        cost = {program.index["extra", 0, aim]: 1.0}
    found = program.solve(cost, relaxed=relaxed)
    if found is None:
        return None
    if relaxed:
        seconds = scale * sum(part * float(found[clock]) for clock, part in total.items())
        return Placed(terms, at, {}, seconds, {}, {})
    counts = {name: round(found[column]) for name, column in program.index.items() if name[0] in ("w", "c")}
    made = evaluate(terms, at, {name: count for name, count in counts.items() if count})
    fits = all(made.peak[tier] <= machine.rooms[tier] for tier in TIERS if tier != aim)
    return made if fits and (most is None or made.seconds <= most * (1 + 1e-9)) else None


def _choices(terms: Terms) -> dict[tuple[str, int], tuple[int, tuple[str, ...]]]:
    """Of each class how many pieces there are, and where they may be."""
    found: dict[tuple[str, int], tuple[int, tuple[str, ...]]] = {}
    for key, unit in enumerate(terms.model.units):
        tiers: tuple[str, ...] = TIERS
        if unit.kind == "embedding":
            tiers = ("gpu", "cpu")
        elif unit.kind == "expert" and terms.setting.schedule != "staggered":
            tiers = (*TIERS, "compute")
        found["w", key] = (unit.count, tiers)
    for key, (_, count) in enumerate(terms.classes):
        found["c", key] = (count, TIERS)
    return found


def _clock(phase: Phase, terms: Terms, at: int) -> float:
    """Seconds that a phase takes about, by which its times are scaled."""
    found = [float(value[at]) for value in phase.fixed.values()]
    found += [
        _at(each, "gpu", at) * terms.model.units[key].count
        for (key, tier), each in phase.weights.items()
        if tier == "gpu"
    ]
    return max([*found, 1e-12])


def _flags(program: _Program, terms: Terms, flags: dict[str, int]) -> None:
    """Hold a flag at 1 where a weight is off the GPU, a cache is off it, or a weight is on the disk."""
    groups = {
        "streams": [key for key in program.index if key[0] == "w" and key[2] != "gpu"],
        "cached": [key for key in program.index if key[0] == "c" and key[2] != "gpu"],
        "spills": [key for key in program.index if key[0] == "w" and key[2] == "disk"],
    }
    for name, keys in groups.items():
        for key in keys:
            count = program.most[program.index[key]]
            program.row({program.index[key]: 1.0, flags[name]: -count}, -np.inf, 0)


def _memory(
    program: _Program, terms: Terms, at: int, tier: str, flags: dict[str, int]
) -> tuple[dict[int, float], float]:
    """Bytes of a tier by column, and those that are there in any case."""
    rooms, layers = terms.rooms, max(1, terms.model.layers)
    parts: dict[int, float] = {}
    for key, column in program.index.items():
        letter, number, place_ = key
        home = "cpu" if place_ == "compute" else place_
        if letter == "w":
            size = float(terms.sizes[number])
            share = 2 * size / layers if terms.model.units[number].kind in ("dense", "head") else 0.0
            passing = (tier == "gpu" and home != "gpu") or (tier == "cpu" and home == "disk")
            parts[column] = size if home == tier else share if passing else 0.0
        elif letter == "c" and home == tier:
            parts[column] = float(rooms.caches[number][at])
    if tier != "disk":
        parts[flags["cached"]] = float(rooms.staging[tier][at])
        parts[flags["streams" if tier == "gpu" else "spills"]] = rooms.buffers + rooms.ring
    return {column: part for column, part in parts.items() if part}, float(rooms.fixed[tier][at])


def _at(spent: dict[str, Array], resource: str, at: int) -> float:
    return float(spent[resource][at]) if resource in spent else 0.0


def evaluate(terms: Terms, at: int, counts: Counts) -> Placed:
    """Times and peak bytes of a placement, by plain sums."""
    spent: dict[str, dict[str, float]] = {}
    seconds = 0.0
    for phase in terms.phases:
        mine = {resource: _at(phase.fixed, resource, at) for resource in RESOURCES}
        for (letter, key, tier), count in sorted(counts.items()):
            table = phase.weights if letter == "w" else phase.caches
            for resource, each in table[key, tier].items():
                mine[resource] += count * float(each[at])
        seconds += phase.times * max(mine.values())
        spent[phase.name] = {resource: value * phase.times for resource, value in mine.items()}
    return Placed(terms, at, counts, seconds, spent, _peak(terms, at, counts))


def _peak(terms: Terms, at: int, counts: Counts) -> dict[str, int]:
    rooms, layers = terms.rooms, max(1, terms.model.layers)
    held = {tier: float(rooms.fixed[tier][at]) for tier in TIERS}
    passing = {"gpu": 0.0, "cpu": 0.0}
    seen = {"streams": False, "cached": False, "spills": False}
    for (letter, key, place_), count in sorted(counts.items()):
        home = "cpu" if place_ == "compute" else place_
        size = float(terms.sizes[key]) if letter == "w" else float(rooms.caches[key][at])
        held[home] += count * size
        if letter == "c":
            seen["cached"] |= home != "gpu"
            continue
        seen["streams"] |= home != "gpu"
        seen["spills"] |= home == "disk"
        if terms.model.units[key].kind in ("dense", "head"):
            passing["gpu"] += 2 * count * size / layers if home != "gpu" else 0.0
            passing["cpu"] += 2 * count * size / layers if home == "disk" else 0.0
    for tier, flag in (("gpu", "streams"), ("cpu", "spills")):
        held[tier] += passing[tier] + (rooms.buffers + rooms.ring if seen[flag] else 0.0)
        held[tier] += float(rooms.staging[tier][at]) if seen["cached"] else 0.0
    return {tier: int(np.ceil(value)) for tier, value in held.items()}


def best(found: Iterable[Placed | None]) -> Placed | None:
    """The one of the highest throughput; of equal ones that with the least on the disk, then in the host's memory."""
    known = [one for one in found if one is not None]
    if not known:
        return None
    top = max(one.throughput for one in known)
    close = [one for one in known if one.throughput >= top * (1 - 1e-9)]
    return min(close, key=lambda one: (one.peak["disk"], one.peak["cpu"], -one.gbs))
