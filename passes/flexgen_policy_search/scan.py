"""All pairs of batch sizes at once: the best placement of each, with weights shared out in closed form.

With the caches' places given, bytes of weights are best on the GPU, then in the host's memory, then on the disk; so a
setting's placements are a grid of cache shares, and all else is arithmetic on arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.roofline import TIERS, Array, Terms

# Shares of the experts in the host's memory that the CPU computes.
COMPUTED = (0.0, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Scan:
    """For each pair: throughput and latency of its best placement (0 and infinity where none fits), cache shares."""

    throughput: Array
    latency: Array
    host: Array
    shares: Array


def grid(parts: int) -> Array:
    """Shares of the caches on GPU, host and disk, in steps of 1 / parts."""
    points = [(g, c, parts - g - c) for g in range(parts, -1, -1) for c in range(parts - g, -1, -1)]
    return np.array(points, dtype=np.float64) / parts


def scan(terms: Terms, machine: Machine, shares: Array, most: float | None) -> Scan:
    """The best of `shares` (K, 3) for each pair (P,), of those with a latency of at most `most` seconds."""
    split = COMPUTED if any(unit.kind == "expert" for unit in terms.model.units) else COMPUTED[:1]
    parts = [_placed(terms, machine, shares, computed) for computed in split]
    seconds, held = (np.concatenate([part[at] for part in parts]) for at in (0, 1))
    if most is not None:
        seconds = np.where(seconds > most, np.inf, seconds)
    # the first of equal ones, which has most on the GPU
    chosen, column = np.argmin(seconds, axis=0), np.arange(len(terms.gbs))
    latency = seconds[chosen, column]
    return Scan(terms.throughput(latency), latency, held[chosen, column], shares[chosen % len(shares)])


def _placed(terms: Terms, machine: Machine, shares: Array, computed: float) -> tuple[Array, Array]:
    """Seconds of each share and pair (K, P), infinite where it does not fit, and bytes of the host's memory."""
    model, rooms, layers = terms.model, terms.rooms, max(1, terms.model.layers)
    room = {tier: float(size) for tier, size in machine.rooms.items()}
    cached = sum(rooms.caches[at] * count for at, (_, count) in enumerate(terms.classes))
    off = ((shares[:, :1] < 1) & bool(terms.classes)).astype(np.float64)
    left = {
        tier: room[tier] - rooms.fixed[tier] - cached * shares[:, at : at + 1] - off * rooms.staging[tier]
        for at, tier in enumerate(TIERS)
    }
    totals = dict.fromkeys(("dense", "expert", "embedding"), 0.0)
    for unit, size in zip(model.units, terms.sizes, strict=True):
        totals["dense" if unit.kind == "head" else unit.kind] += unit.count * size
    every = sum(totals.values())
    whole = left["gpu"] >= every
    # what is off the GPU needs buffers there: two of the largest, a ring of experts, twice a layer's share
    open_room = left["gpu"] - rooms.buffers - rooms.ring
    # an embedding cannot be on the disk: where the host is short of room, it comes first
    first = (every - open_room > left["cpu"]) & (open_room >= totals["embedding"])
    open_room = open_room - first * totals["embedding"]
    dense = np.clip((open_room - 2 * totals["dense"] / layers) / max(1e-3, 1 - 2 / layers), 0, totals["dense"])
    if layers <= 2:
        dense = np.where(open_room >= totals["dense"], totals["dense"], 0.0)
    after = open_room - dense - 2 * (totals["dense"] - dense) / layers
    experts = np.clip(after, 0, totals["expert"])
    embedding = np.where(after - experts >= totals["embedding"], totals["embedding"], 0.0)
    dense, experts = np.where(whole, totals["dense"], dense), np.where(whole, totals["expert"], experts)
    embedding = np.where(whole | first, totals["embedding"], embedding)
    fits = (whole & (left["gpu"] >= 0)) | (~whole & (after >= 0))
    off_dense, off_experts = totals["dense"] - dense, totals["expert"] - experts
    off_embedding = totals["embedding"] - embedding
    need = off_dense + off_experts + off_embedding
    spilled = np.where(need <= left["cpu"], 0.0, 1.0)
    open_host = left["cpu"] - off_embedding - spilled * (rooms.buffers + rooms.ring)
    # twice a layer's share of what is on the disk is on its way through the host
    spill = spilled * np.maximum(0.0, off_dense + off_experts - open_host)
    disk_experts = np.minimum(spill, off_experts)
    excess = spill - disk_experts
    disk_dense = np.minimum(off_dense, excess / max(1e-3, 1 - 2 / layers))
    fits &= (disk_dense * (1 - 2 / layers) >= excess * (1 - 1e-12)) & (open_host >= 0) & (left["cpu"] >= 0)
    fits &= left["disk"] >= disk_dense + disk_experts
    if totals["embedding"]:
        fits &= left["cpu"] >= off_embedding
    seconds = np.zeros_like(left["gpu"])
    for phase in terms.phases:
        spent = dict(phase.fixed)
        for at, unit in enumerate(model.units):
            mass, kind = unit.count * terms.sizes[at], "dense" if unit.kind == "head" else unit.kind
            if mass == 0:
                continue
            part = {"dense": (dense, disk_dense), "expert": (experts, disk_experts)}.get(kind, (embedding, 0.0))
            there, away = (np.asarray(value) / totals[kind] * unit.count for value in part)
            hosted = unit.count - there - away
            tiers = {"gpu": there, "disk": away, "cpu": hosted}
            if kind == "expert" and computed:
                tiers = {**tiers, "cpu": hosted * (1 - computed), "compute": hosted * computed}
            for tier, part_ in tiers.items():
                for resource, each in phase.weights[at, tier].items():
                    spent[resource] = spent.get(resource, 0.0) + part_ * each
        for at, (_, count) in enumerate(terms.classes):
            for column, tier in enumerate(TIERS):
                part_ = count * shares[:, column : column + 1]
                for resource, each in phase.caches[at, tier].items():
                    spent[resource] = spent.get(resource, 0.0) + part_ * each
        seconds = seconds + phase.times * _most(spent, seconds.shape)
    host = room["cpu"] - left["cpu"] + need - disk_dense - disk_experts
    return np.where(fits, seconds, np.inf), np.asarray(host)


def _most(spent: dict[str, Array], shape: tuple[int, ...]) -> Array:
    """The largest of all resources' seconds."""
    top = np.zeros(shape)
    for each in spent.values():
        np.maximum(top, each, out=top)
    return top


def near(places: Array, chosen: Array, reach: float) -> Array:
    """`chosen` (N, 3), and those of `places` (K, 3) no farther from one of them than `reach` in any share."""
    apart = np.abs(places[:, None, :] - chosen[None, :, :]).max(axis=2).min(axis=1)
    return np.unique(np.concatenate([places[apart <= reach + 1e-9], chosen]), axis=0)[::-1]


def pairs(most: int, fine: int = 8, step: float = 1.3) -> list[int]:
    """Whole numbers up to `most`: all up to `fine`, then in steps of a ratio."""
    found = list(range(1, min(most, fine) + 1))
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(found[-1] * step))))
    return found


def product(batches: Sequence[int], counts: Sequence[int]) -> tuple[Array, Array]:
    """All pairs of GPU batches and numbers of batches."""
    gbs, nb = np.meshgrid(np.array(batches, dtype=np.float64), np.array(counts, dtype=np.float64), indexing="ij")
    flat: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] = (gbs.ravel(), nb.ravel())
    return flat
