"""What a policy says beside itself: the trade of latency against throughput, what binds, what each figure is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.place import Placed, place
from rewright.passes.flexgen_policy_search.roofline import RESOURCES
from rewright.passes.flexgen_policy_search.search import Found

# Points of the list of latency against throughput at most.
POINTS = 8
STEP = 1.1
# A resource is waited for when it is busy for all of a phase but so much; and which one a rate belongs to.
SLACK = 0.02
_RESOURCES = {name: name.partition("_")[0] for name in ("gpu_flops", "cpu_flops", "cpu_attn", *Machine.OPTIONAL)}
_RESOURCES |= {"hbm": "gpu"}


def pareto(problem: Problem, found: Found) -> list[Placed]:
    """Policies of which none is beaten in both, from the least latency to the best throughput, placed exactly."""
    front = []
    top = 0.0
    for point in sorted(found.points, key=lambda point: (point.latency, -point.throughput)):
        if point.throughput > top * 1.02:
            front.append(point)
            top = point.throughput
    front = [point for point in front if point.throughput < found.best.throughput * 0.98]
    if len(front) > POINTS - 1:
        # about evenly by the logarithm of latency, both ends among them
        keep = {round(at * (len(front) - 1) / (POINTS - 2)) for at in range(POINTS - 1)}
        front = [point for at, point in enumerate(front) if at in keep]
    made = [place(pair(problem, p.setting, p.gbs, p.nb), 0, problem.machine, most=problem.most) for p in front]
    kept: list[Placed] = []
    for one in sorted([*(one for one in made if one is not None), found.best], key=lambda one: one.seconds):
        if not kept or one.throughput > kept[-1].throughput:
            kept.append(one)
    return kept


def front(found: Found) -> list[dict[str, Any]]:
    """The points of which none is beaten in both, as they were looked at."""
    kept: list[dict[str, Any]] = []
    for point in sorted(found.points, key=lambda point: (point.latency, -point.throughput)):
        if not kept or point.throughput > kept[-1]["throughput"] * 1.05:
            told = {"gpu_batch": point.gbs, "num_batches": point.nb, "latency_s": point.latency}
            kept.append({**told, "throughput": point.throughput, "cpu_bytes": int(point.host)})
    best = found.best
    mine = {"gpu_batch": best.gbs, "num_batches": best.nb, "latency_s": best.seconds, "throughput": best.throughput}
    kept = [point for point in kept if point["throughput"] < best.throughput and point["latency_s"] < best.seconds]
    step = max(1, -(-len(kept) // (POINTS - 1)))
    return [*kept[::step], {**mine, "cpu_bytes": best.peak["cpu"]}]


def binding(best: Placed) -> dict[str, Any]:
    """For each phase the busiest resource, the second, and by how much the first leads."""
    told = {}
    for name, spent in best.spent.items():
        order = sorted(RESOURCES, key=lambda resource: -spent[resource])
        first, second = spent[order[0]], spent[order[1]]
        told[name] = {"resource": order[0], "second": order[1], "margin": 0.0 if first == 0 else 1 - second / first}
    return told


def busiest(best: Placed) -> str:
    """The resource that the phase which takes longest waits for."""
    longest = max(best.spent.values(), key=lambda spent: max(spent.values()))
    return max(RESOURCES, key=lambda resource: longest[resource])


def sensitivity(problem: Problem, best: Placed) -> list[dict[str, Any]]:
    """Percent of throughput for 10 % more of each figure of the machine, with batch sizes near the policy's."""
    told = []
    machine = problem.machine
    waited = {
        name
        for spent in best.spent.values()
        for name in RESOURCES
        if spent[name] >= (1 - SLACK) * max(spent.values()) > 0
    }
    for name in (*machine.rates, "gpu_memory", "cpu_memory", "disk_size"):
        tier = name.partition("_")[0] if name.endswith(("_memory", "_size")) else None
        if tier is None and _RESOURCES.get(name, name) not in waited:
            # a resource that nothing waits for: more of it changes nothing
            told.append({"param": name, "d_throughput_pct_per_10pct": 0.0})
            continue
        if tier is None:
            more = replace(machine, **{name: getattr(machine, name) * STEP})
        else:
            size = int(machine.rooms[tier] * (STEP - 1))
            more = replace(machine, **{f"{tier}_bytes": getattr(machine, f"{tier}_bytes") + size})
        gain = _again(replace(problem, machine=more), best, grown=tier is not None) / best.throughput - 1
        told.append({"param": name, "d_throughput_pct_per_10pct": max(0.0, 100 * gain)})
    return told


def _again(problem: Problem, best: Placed, *, grown: bool) -> float:
    setting = best.terms.setting
    tries = [(best.gbs, best.nb)]
    if grown and setting.schedule != "row":
        tries.append((best.gbs, max(best.nb + 1, round(best.nb * STEP))))
    made = [place(pair(problem, setting, *one), 0, problem.machine, most=problem.most) for one in tries]
    return max([one.throughput for one in made if one is not None] or [0.0])
