"""The exact search under the published equations: whole layers of weights, caches by layer, all batch sizes.

With the places of keys, values and hidden states given, no time rises when a layer of weights moves from the disk to
the host or on to the GPU, and the rooms are affine in the layers that are there: so as many as fit go to each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rewright.passes.flexgen_policy_search.linear import Program
from rewright.passes.flexgen_policy_search.published import SHARES, Equations, Row, seconds, value
from rewright.passes.flexgen_policy_search.roofline import Array
from rewright.passes.flexgen_policy_search.scan import grid, pairs, product

# Pairs that are looked at again on the fine grid of caches.
FINE = 64
AXES = ("gbs", "nb", "throughput", "prefill", "decode")
_WEIGHTS = SHARES[:3]


@dataclass(frozen=True, slots=True)
class Layered:
    """For each pair: generated tokens a second, 0 where nothing fits, its seconds, and its shares."""

    gbs: Array
    nb: Array
    throughput: Array
    prefill: Array
    decode: Array
    shares: dict[str, Array]


def search(program: Program, most: float | None = None) -> Layered:
    """The best placement of every pair that was looked at; the best of all is its largest throughput."""
    layers, work = program.shape.layers, program.work
    each = 4.0 * work.context * program.shape.hidden * layers
    block = int(max(1, min(1 << 16, sum(program.rooms.values()) / each)))
    token = 8.0 * program.shape.hidden * work.prompt
    batch = int(max(1, min(block, program.rooms["gpu"] / token, 4096)))
    gbs, nb = product(pairs(batch, 32, 1.08), pairs(block, 48, 1.03))
    inside = gbs * nb <= block
    coarse = scan(program, gbs[inside], nb[inside], grid(4), most)
    top = np.argsort(-coarse.throughput, kind="stable")[:FINE]
    top = top[coarse.throughput[top] > 0]
    if not len(top):
        return coarse
    near = sorted(set(zip(coarse.gbs[top], coarse.nb[top], strict=True)))
    fine = scan(program, *_axes(near), _near(grid(layers), coarse, top), most)
    first = int(np.argmax(fine.throughput))
    g, n = float(fine.gbs[first]), int(fine.nb[first])
    # the steps between numbers of batches that were left out
    span = [(g, float(m)) for m in range(max(1, int(n * 0.97) - 1), int(n * 1.03) + 2)]
    last = scan(program, *_axes(span), _near(grid(layers), fine, np.array([first])), most)
    all_ = (last, fine, coarse)
    axes = {name: np.concatenate([getattr(one, name) for one in all_]) for name in AXES}
    shares = {name: np.concatenate([one.shares[name] for one in all_]) for name in SHARES}
    return Layered(**axes, shares=shares)


def _axes(chosen: list[tuple[float, float]]) -> tuple[Array, Array]:
    gbs, nb = (np.array(axis, dtype=np.float64) for axis in zip(*chosen, strict=True))
    return gbs, nb


def _near(places: Array, seen: Layered, top: npt.NDArray[np.intp]) -> Array:
    """The places of caches no farther than a step of the coarse grid from one that was chosen."""
    chosen = np.unique(np.stack([seen.shares[name][top] for name in SHARES[3:6]], axis=1), axis=0)
    apart = np.abs(places[:, None, :] - chosen[None, :, :]).max(axis=2).min(axis=1)
    return np.asarray(places[apart < (0.25 if len(chosen) < 4 else 0.15)])


def scan(program: Program, gbs: Array, nb: Array, places: Array, most: float | None) -> Layered:
    """The best of `places` (K, 3), shares of the caches on GPU, host and disk, for each pair."""
    equations = Equations(program.shape, program.constants, program.work, program.law, gbs, nb)
    memory = equations.memory()
    best = np.zeros_like(gbs)
    times = [np.zeros_like(gbs), np.zeros_like(gbs)]
    kept = {name: np.zeros_like(gbs) for name in SHARES}
    tokens = gbs * nb * program.work.generate
    for hidden in (1.0, 0.0):
        for place in places:
            shares = {name: np.full_like(gbs, part) for name, part in zip(SHARES[3:6], place, strict=True)}
            shares |= {"hg": np.full_like(gbs, hidden), "hc": np.full_like(gbs, 1 - hidden), "hd": np.zeros_like(gbs)}
            fits = fill(program, memory, shares)
            before, after = seconds(equations, shares)
            total = before + after
            rate = np.where(fits & (total <= (np.inf if most is None else most)), tokens / total, 0.0)
            better = rate > best
            best = np.where(better, rate, best)
            times = [np.where(better, new, old) for new, old in zip((before, after), times, strict=True)]
            kept = {name: np.where(better, shares[name], kept[name]) for name in SHARES}
    return Layered(gbs, nb, best, times[0], times[1], kept)


def fill(program: Program, memory: list[tuple[str, Row]], shares: dict[str, Array]) -> npt.NDArray[np.bool_]:
    """Put whole layers of weights on the GPU, then the host, then the disk; returns whether all is in its room."""
    layers = program.shape.layers
    zero = {name: np.zeros_like(shares["cg"]) for name in _WEIGHTS}
    there = {"gpu": np.ones_like(shares["cg"]), "cpu": np.ones_like(shares["cg"])}
    for name, share, tier in (("wg", "gpu", "gpu"), ("wc", "cpu", "cpu")):
        shares |= zero if name == "wg" else {}
        for where, row in memory:
            if where != tier:
                continue
            # what is left goes to the disk, whose layers may have buffers in this tier
            slope = row[0].get(name, 0.0) - row[0].get("wd", 0.0)
            shares["wd"] = 1 - shares["wg"] - (0 if name == "wg" else shares["wc"])
            room = program.rooms[tier] - value(row, shares)
            # up to a billionth of a layer is a rounding of the sums
            count = np.floor(layers * room / np.maximum(slope, 1.0) + 1e-9)
            there[share] = np.minimum(there[share], count / layers)
        limit = 1 - (shares["wg"] if name == "wc" else 0.0)
        shares[name] = np.clip(there[share], 0, limit)
    shares["wd"] = np.maximum(0.0, 1 - shares["wg"] - shares["wc"])
    held = [value(row, shares) <= program.rooms[tier] * (1 + 1e-9) for tier, row in memory]
    return np.asarray(np.all(held, axis=0))
