"""Why nothing fits, and the least that would: one tier's size, or the bound on latency."""

from __future__ import annotations

from dataclasses import replace

from rewright.passes.errors import ResourceError
from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.machine import MIB, Machine
from rewright.passes.flexgen_policy_search.place import Aim, place
from rewright.passes.flexgen_policy_search.values import Memory

_FLAGS: dict[Aim, str] = {"gpu": "--gpu-memory", "cpu": "--cpu-memory", "disk": "--disk"}


def explain(problem: Problem) -> ResourceError:
    """The refusal of a machine on which no policy fits, with the change that is smallest by its ratio."""
    told = "no policy fits " + (f"within {problem.most:g} s" if problem.most is not None else "this machine")
    sizes = [(tier, size) for tier in _FLAGS if (size := needed(problem, tier)) is not None]
    have = {"gpu": problem.machine.gpu_bytes, "cpu": problem.machine.cpu_bytes, "disk": problem.machine.disk_bytes}
    hints = []
    if sizes:
        tier, size = min(sizes, key=lambda pair_: pair_[1] / max(1, have[pair_[0]]))
        hints.append((size / max(1, have[tier]), f"the smallest change is `{_FLAGS[tier]} {_said(size)}`"))
    least = quickest(problem) if problem.most is not None else None
    if least is not None and problem.most is not None:
        hints.append((least / problem.most, f"the smallest change is `--max-latency {least:.4g}`"))
    if not hints and problem.most is not None:
        # the bound may be one that no machine keeps
        return ResourceError(
            f"{told}, nor any with more of one tier alone",
            hint=f"without `--max-latency`, {explain(replace(problem, most=None)).hint}",
        )
    if not hints:
        return ResourceError(
            f"{told}, nor any with more of one tier alone",
            hint=f"{_said(problem.model.total_bytes)} of weights need a place: give more than one of {_flags()}",
        )
    return ResourceError(f"{told}: `{problem.machine.name}` with {_sizes(have)}", hint=min(hints)[1])


def needed(problem: Problem, tier: Aim) -> int | None:
    """The least whole MiB of a tier with which one sequence at a time fits, the others as they are."""
    rooms = []
    for setting in problem.settings:
        made = place(pair(problem, setting, 1, 1), 0, problem.machine, aim=tier, most=problem.most)
        if made is not None:
            rooms.append(made.peak[tier])
    return size_for(problem.machine, tier, min(rooms)) if rooms else None


def size_for(machine: Machine, tier: Aim, room: int) -> int:
    """The least size, in whole MiB, of a tier that leaves so many bytes when its reserve is taken off."""
    low, high = 0, 1
    while high * MIB - machine.reserve(tier, high * MIB) < room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if middle * MIB - machine.reserve(tier, middle * MIB) >= room else (middle, high)
    return high * MIB


def quickest(problem: Problem) -> float | None:
    """The least seconds that one sequence takes."""
    free = replace(problem, most=None)
    found = [place(pair(free, setting, 1, 1), 0, free.machine) for setting in free.settings]
    times = [one.seconds for one in found if one is not None]
    return min(times) * 1.001 if times else None


def _said(size: int) -> str:
    return str(Memory(-(-size // MIB) * MIB))


def _sizes(have: dict[str, int]) -> str:
    return ", ".join(f"{_said(size)} of {tier}" for tier, size in have.items())


def _flags() -> str:
    return ", ".join(f"`{flag}`" for flag in _FLAGS.values())
