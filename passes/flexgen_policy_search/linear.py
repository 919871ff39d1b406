"""The published search: a linear program over shares for each pair of batch sizes, and the script's way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rewright.passes.flexgen_policy_search.machine import Published
from rewright.passes.flexgen_policy_search.published import SHARES, Equations, Law, Row, Shape
from rewright.passes.flexgen_policy_search.roofline import Work


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best shares for a pair of batch sizes: generated tokens a second, seconds of prefill and of decoding."""

    gbs: int
    nb: int
    throughput: float
    prefill: float
    decode: float
    shares: dict[str, float]


@dataclass(frozen=True, slots=True)
class Program:
    """What the published search is about; `rooms` are bytes by tier. Hidden states stay off the disk."""

    shape: Shape
    constants: Published
    work: Work
    law: Law
    rooms: Mapping[str, float]

    def solve(self, gbs: int, nb: int) -> Optimum | None:
        """The optimum over shares, None where nothing fits."""
        from scipy.optimize import linprog

        equations = Equations(
            self.shape, self.constants, self.work, self.law, np.array([float(gbs)]), np.array([float(nb)])
        )
        first, second = equations.waits()
        scale = max(float(np.max(row[1])) for row in (*first, *second)) or 1.0
        rows: list[list[float]] = []
        limits: list[float] = []
        for column, group in ((0, first), (1, second)):
            for row in group:
                clock = [0.0, 0.0]
                clock[column] = -1.0
                rows.append([part / scale for part in _dense(row)] + clock)
                limits.append(-float(np.max(row[1])) / scale)
        for tier, row in equations.memory():
            room = float(self.rooms[tier])
            rows.append([part / room for part in _dense(row)] + [0.0, 0.0])
            limits.append(1 - float(np.max(row[1])) / room)
        equal = [[1.0 if at // 3 == group else 0.0 for at in range(9)] + [0.0, 0.0] for group in range(3)]
        steps = self.work.generate - 1
        bounds: list[tuple[float, float | None]] = [(0, 1)] * 8 + [(0, 0), (0, None), (0, None)]
        found: Any = linprog(
            [0.0] * 9 + [1.0, float(steps)],
            A_ub=rows,
            b_ub=limits,
            A_eq=equal,
            b_eq=[1.0] * 3,
            bounds=bounds,
            method="highs",
        )
        if found.status != 0:
            return None
        before, after = (float(found.x[at]) * scale * self.shape.layers for at in (9, 10))
        after *= steps
        tokens = gbs * nb * self.work.generate
        shares = {name: float(part) for name, part in zip(SHARES, found.x, strict=False)}
        return Optimum(gbs, nb, tokens / (before + after), before, after, shares)


def _dense(row: Row) -> list[float]:
    return [float(np.max(row[0][name])) if name in row[0] else 0.0 for name in SHARES]


def released_search(program: Program) -> tuple[Optimum | None, int]:
    """The script's way: batches 1 to 4, then powers of two; for each the number of batches, from 1 on until the
    throughput falls. Returns the best and how many programs it solved."""
    solved: dict[tuple[int, int], Optimum | None] = {}

    def ask(gbs: int, nb: int) -> Optimum | None:
        if (gbs, nb) not in solved:
            solved[gbs, nb] = program.solve(gbs, nb)
        return solved[gbs, nb]

    top: Optimum | None = None
    gbs = 1
    while ask(gbs, 1) is not None:
        most = _most(lambda nb, gbs=gbs: ask(gbs, nb) is not None)  # type: ignore[misc]  # a default binds the batch
        last = 0.0
        for nb in range(1, most + 1):
            one = ask(gbs, nb)
            if one is None or one.throughput < last:
                break
            last = one.throughput
            if top is None or one.throughput > top.throughput:
                top = one
        gbs = gbs + 1 if gbs < 4 else 2 * gbs
    return top, len(solved)


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number of batches that fits, by doubling and halving."""
    high = 1
    while fits(2 * high):
        high *= 2
    low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
