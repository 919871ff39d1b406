"""A policy by the published equations, in the form of any other."""

from __future__ import annotations

import numpy as np

from rewright.passes.errors import ResourceError, UsageError
from rewright.passes.flexgen_policy_search.hills import Point, Problem, pair
from rewright.passes.flexgen_policy_search.layered import Layered, search
from rewright.passes.flexgen_policy_search.linear import Program
from rewright.passes.flexgen_policy_search.place import Counts, Placed
from rewright.passes.flexgen_policy_search.published import SHARES, Equations, Law, shape_of, value
from rewright.passes.flexgen_policy_search.roofline import RESOURCES, TIERS, Device, Setting
from rewright.passes.flexgen_policy_search.search import Found

# The part of each tier that the released script plans with.
ALPHA = 0.8
_RESOURCES = {"ctog": "h2d", "gtoc": "d2h", "dtoc": "disk_read", "ctod": "disk_write", "comp": "gpu"}


def program_of(problem: Problem, law: Law) -> Program:
    """The published search of a problem. Raises UsageError for a model that the equations do not hold for."""
    machine = problem.machine
    sizes = {"gpu": machine.gpu_bytes, "cpu": machine.cpu_bytes, "disk": machine.disk_bytes}
    rooms = {tier: ALPHA * size for tier, size in sizes.items()}
    return Program(shape_of(problem.model), machine.constants(), problem.work, law, rooms)


def by_published(problem: Problem, law: Law) -> Found:
    """The best policy of whole layers. Raises ResourceError where none fits, UsageError for a model of another kind."""
    if problem.work.generate < 2:
        raise UsageError("the published equations need a `--generate-length` of 2 or more")
    program = program_of(problem, law)
    seen = search(program, problem.most)
    at = int(np.argmax(seen.throughput))
    if not seen.throughput[at]:
        late = problem.most is not None and search(program, None).throughput.any()
        within = f" within {problem.most:g} s" if late else ""
        raise ResourceError(
            f"no policy fits `{problem.machine.name}`{within} by the `{law}` equations",
            hint="give a larger `--max-latency`" if late else "give more memory, or leave out `--cost-model`",
        )
    best = _placed(problem, program, seen, at)
    cut = program.solve(best.gbs, best.nb)
    setting = best.terms.setting
    points = tuple(
        Point(setting, int(g), int(n), float(rate), float(p + d), 0.0)
        for g, n, rate, p, d in zip(seen.gbs, seen.nb, seen.throughput, seen.prefill, seen.decode, strict=True)
        if rate
    )
    return Found(best, points, max(best.throughput, cut.throughput if cut else 0.0), ())


def _placed(problem: Problem, program: Program, seen: Layered, at: int) -> Placed:
    """A pair's layers as counts of pieces, with the times of the equations."""
    model, layers = problem.model, program.shape.layers
    gbs, nb = int(seen.gbs[at]), int(seen.nb[at])
    shares = {name: np.array([float(part[at])]) for name, part in seen.shares.items()}
    hidden: Device = "gpu" if shares["hg"][0] == 1 else "cpu"
    setting = Setting(None, 16, "cpu", hidden, "zigzag")
    counts: Counts = {}
    whole = {name: round(float(shares[name][0]) * layers) for name in SHARES[:6]}
    for key, unit in enumerate(model.units):
        for name, tier in zip(SHARES[:3], TIERS, strict=True):
            if unit.kind == "dense":
                counts["w", key, tier] = whole[name] * unit.count // layers
        if unit.kind != "dense":
            counts["w", key, "gpu"] = unit.count
    for name, tier in zip(SHARES[3:6], TIERS, strict=True):
        counts["c", 0, tier] = whole[name]
    counts = {key: count for key, count in counts.items() if count}
    terms = pair(problem, setting, gbs, nb)
    equations = Equations(
        program.shape, program.constants, program.work, program.law, np.array([float(gbs)]), np.array([float(nb)])
    )
    spent: dict[str, dict[str, float]] = {}
    times = {"prefill": 1, "decode": program.work.generate - 1}
    for phase, rows in (("prefill", equations.prefill()), ("decode", equations.decode())):
        mine = dict.fromkeys(RESOURCES, 0.0)
        for name, row in rows.items():
            mine[_RESOURCES[name]] = float(value(row, shares)[0]) * layers * times[phase]
        spent[phase] = mine
    peak = dict.fromkeys(TIERS, 0)
    for tier, row in equations.memory():
        peak[tier] = max(peak[tier], int(np.ceil(value(row, shares)[0])))
    return Placed(terms, 0, counts, float(seen.prefill[at] + seen.decode[at]), spent, peak)
