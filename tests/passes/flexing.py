"""Checkpoints, machines and models for the placement search, and every policy of a small instance one by one."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewright.passes.context import Silent
from rewright.passes.flexgen_policy_search import calibrate, measure
from rewright.passes.flexgen_policy_search.hills import Problem, limits, pair
from rewright.passes.flexgen_policy_search.machine import GIB, Machine
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.roofline import RESOURCES, TIERS, Setting, Terms, Work
from rewright.passes.flexgen_policy_search.shape import Cache, Model, Piece, Unit
from rewright.passes.pipeline import execute
from rewright.passes.recipe import make as make_stage
from rewright.passes.run_options import RunOptions
from rewright.passes.spec import Layout
from rewright.passes.survey import Run

QUICK: dict[str, Any] = {"machine": "laptop", "prompt-length": 24, "generate-length": 8}
FILE = "attachments/flexgen/policy.json"
# Layers, width, width of the feed-forward part, heads (arXiv:2205.01068, table 1).
OPT = {
    "6.7b": (32, 4096, 16384, 32),
    "13b": (40, 5120, 20480, 40),
    "30b": (48, 7168, 28672, 56),
    "66b": (64, 9216, 36864, 72),
    "175b": (96, 12288, 49152, 96),
}


def flexgen(src: Path, dst: Path, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Run the pass; its part of the document, and the warnings."""
    said = {**QUICK, **{key.replace("_", "-"): value for key, value in options.items()}}
    said = {key: value for key, value in said.items() if value is not None}
    reporter = Silent()
    stage = make_stage(1, "flexgen-policy-search", said)
    document = execute(Run(src, dst, (stage,), RunOptions(threads=1)), reporter)
    return dict(document["stages"][0]), reporter.warnings


def hasten(patched: pytest.MonkeyPatch) -> None:
    """Let a calibration take little, and once: how fast this machine is does not matter to a test."""
    for module, small in (
        (measure, {"TURN": 8 << 20, "FILE": 32 << 20}),
        (calibrate, {"FILE": 32 << 20, "COPY": 8 << 20, "READ": 8, "HELD_READS": (2, 4, 6, 10), "ROUNDS": 1}),
        (calibrate, {"BLOCKS": ((1 << 20, 1),), "ROWS": (1, 8, 64)}),
    ):
        for name, value in small.items():
            patched.setattr(module, name, value)


def policy(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / FILE).read_text())
    assert isinstance(found, dict)
    return found


def opt(name: str) -> Layout:
    """The headers of an OPT checkpoint at 16 bits."""
    layers, hidden, ffn, heads = OPT[name]
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.decoder.embed_tokens.weight": ("F16", (50272, hidden)),
        "model.decoder.embed_positions.weight": ("F16", (2050, hidden)),
        "model.decoder.final_layer_norm.weight": ("F16", (hidden,)),
    }
    for at in range(layers):
        stem = f"model.decoder.layers.{at}."
        shapes = {f"self_attn.{part}_proj": (hidden, hidden) for part in ("q", "k", "v", "out")}
        shapes |= {"fc1": (ffn, hidden), "fc2": (hidden, ffn)}
        for module, shape in shapes.items():
            tensors[f"{stem}{module}.weight"] = ("F16", shape)
            tensors[f"{stem}{module}.bias"] = ("F16", shape[:1])
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{stem}{norm}.weight"] = ("F16", (hidden,))
    config = {"model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    config |= {"ffn_dim": ffn, "vocab_size": 50272, "max_position_embeddings": 2048}
    return Layout(tensors, config)


def settings(*schedules: str) -> tuple[Setting, ...]:
    """Every setting at the bits that are stored."""
    product = itertools.product(schedules or ("zigzag",), ("cpu", "gpu"), ("gpu", "cpu"))
    return tuple(Setting(None, 16, attention, hidden, kind) for kind, attention, hidden in product)  # type: ignore[arg-type]  # words of literals


def machine(gpu: float, cpu: float, disk: float, base: str = "laptop", **rates: float) -> Machine:
    """A machine of so many bytes, all of which may be used."""
    made = replace(preset(base), gpu_reserve=0, cpu_reserve=0, published=None)
    return replace(made, gpu_bytes=int(gpu), cpu_bytes=int(cpu), disk_bytes=int(disk), **rates)  # type: ignore[arg-type]  # rates are floats


def upgrades(seed: int) -> Iterator[tuple[str | None, Machine]]:
    """A random machine, then the same with more of a random tier or rate, again and again, and of what."""
    draw = random.Random(seed)
    made = machine(draw.uniform(4, 40) * GIB, draw.uniform(10, 300) * GIB, draw.uniform(20, 1500) * GIB)
    scaled: dict[str, Any] = {rate: getattr(made, rate) * 10 ** draw.uniform(-0.7, 0.7) for rate in Machine.RATES}
    made, what = replace(made, **scaled), None
    while True:
        yield what, made
        what = draw.choice((*Machine.RATES, "gpu_bytes", "cpu_bytes", "disk_bytes"))
        value = getattr(made, what) * draw.choice((1.02, 1.1, 1.3, 2))
        made = replace(made, **{what: int(value) if what.endswith("bytes") else value})


def small(seed: int) -> Problem:
    """A model of a few pieces on a machine that holds few sequences of it: all its policies can be tried."""
    draw = random.Random(seed)
    layers = draw.choice((2, 3))
    sizes = draw.sample((3, 4, 5, 7, 11), 2)
    units = [
        Unit(
            "dense", "dense", size * 1000, size * 500, True, tuple(Piece(at, (f"{at}.{size}",)) for at in range(layers))
        )
        for size in sizes
    ]
    experts = draw.choice((0, 0, 2))
    if experts:
        pieces = tuple(Piece(0, (f"0.experts.{at}",)) for at in range(experts))
        units.append(Unit("expert", "expert", 2000, 1000, True, pieces))
    units.append(Unit("embedding", "embedding", 2500, 1250, True, (Piece(-1, ("embedding",)),)))
    caches = [Cache("full", 200, None, 0, 16, 16, 400) for _ in range(layers)]
    if draw.random() < 0.4:
        caches[0] = Cache("sliding", 200, 6, 0, 16, 16, 400)
    model = Model(
        arch="toy", dtype="BF16", digest="", hidden=8, vocabulary=40, ffn=16, query=16, positions=None,
        tied=draw.random() < 0.5, experts=experts, reused=1, caches=tuple(caches), units=tuple(units), fixed=(),
        fixed_bytes=100, idle=(), idle_bytes=0, total_bytes=sum(unit.nbytes * unit.count for unit in units), heads=1,
        gated=True,
    )  # fmt: skip
    whole = float(model.total_bytes)
    sequence = sum(cache.peak(16, 16) for cache in caches)
    rates = {name: 10 ** draw.uniform(5, 7) for name in ("h2d", "d2h", "disk_read", "disk_write", "cpu_attn")}
    made = machine(
        draw.uniform(0.3, 1.2) * whole + 35000, draw.uniform(0.1, 1.0) * whole + draw.uniform(1, 3) * sequence,
        draw.uniform(0.1, 1.0) * whole + sequence, hbm=10 ** draw.uniform(6, 8), dram=10 ** draw.uniform(6, 8),
        gpu_flops=10 ** draw.uniform(8, 10), cpu_flops=10 ** draw.uniform(7, 9), launch_s=1e-6, copy_s=1e-6, **rates,
    )  # fmt: skip
    return Problem(model, made, Work(12, 4), settings())


def pairs_of(problem: Problem) -> Iterator[tuple[Setting, int, int]]:
    """Every setting and pair of batch sizes that may fit."""
    batch, block = limits(problem)
    for setting in problem.settings:
        for gbs in range(1, batch + 1):
            for nb in range(1, max(1, block // gbs) + 1):
                yield setting, gbs, nb


def brute(problem: Problem) -> float:
    """The best throughput over every placement of every piece, by trying all of them."""
    best = 0.0
    for setting, gbs, nb in pairs_of(problem):
        best = max(best, _every(pair(problem, setting, gbs, nb), problem.machine))
    return best


def splits(count: int, tiers: int) -> list[tuple[int, ...]]:
    """All ways to share equal pieces out."""
    if tiers == 1:
        return [(count,)]
    return [(first, *rest) for first in range(count + 1) for rest in splits(count - first, tiers - 1)]


def _every(terms: Terms, machine: Machine) -> float:
    """All placements of a pair at once, by arrays over the product of each class's splits."""
    model, rooms = terms.model, terms.rooms
    layers = model.layers
    axes: list[tuple[str, int, tuple[str, ...], np.ndarray[Any, Any]]] = []
    for key, unit in enumerate(model.units):
        tiers: tuple[str, ...] = {"embedding": ("gpu", "cpu"), "expert": (*TIERS, "compute")}.get(unit.kind, TIERS)
        axes.append(("w", key, tiers, np.array(splits(unit.count, len(tiers)), dtype=float)))
    for key, (_, count) in enumerate(terms.classes):
        axes.append(("c", key, TIERS, np.array(splits(count, 3), dtype=float)))
    shape, zero = [len(axis[3]) for axis in axes], np.zeros(1)

    def spread(at: int, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return values.reshape([-1 if axis == at else 1 for axis in range(len(shape))])

    held = {tier: np.full(shape, float(rooms.fixed[tier][0])) for tier in TIERS}
    flags = {name: np.zeros(shape, dtype=bool) for name in ("streams", "cached", "spills")}
    times = [
        {name: np.full(shape, float(phase.fixed.get(name, zero)[0])) for name in RESOURCES} for phase in terms.phases
    ]
    for at, (letter, key, tiers, counts) in enumerate(axes):
        for column, tier in enumerate(tiers):
            count = spread(at, counts[:, column])
            home = "cpu" if tier == "compute" else tier
            size = terms.sizes[key] if letter == "w" else float(rooms.caches[key][0])
            held[home] = held[home] + count * size
            if letter == "w" and home != "gpu":
                flags["streams"] = flags["streams"] | (count > 0)
                flags["spills"] = flags["spills"] | ((count > 0) & (home == "disk"))
                if model.units[key].kind in ("dense", "head"):
                    held["gpu"] = held["gpu"] + 2 * count * size / layers
                    held["cpu"] = held["cpu"] + (2 * count * size / layers if home == "disk" else 0.0)
            if letter == "c" and home != "gpu":
                flags["cached"] = flags["cached"] | (count > 0)
            for phase, spent in zip(terms.phases, times, strict=True):
                each = (phase.weights if letter == "w" else phase.caches)[key, tier]
                for name, value in each.items():
                    spent[name] = spent[name] + count * float(value[0])
    buffers = rooms.buffers + rooms.ring
    held["gpu"] = held["gpu"] + flags["streams"] * buffers + flags["cached"] * float(rooms.staging["gpu"][0])
    held["cpu"] = held["cpu"] + flags["spills"] * buffers + flags["cached"] * float(rooms.staging["cpu"][0])
    fits = np.all([held[tier] <= machine.rooms[tier] for tier in TIERS], axis=0)
    seconds = sum(
        phase.times * np.max([spent[name] for name in RESOURCES], axis=0)
        for phase, spent in zip(terms.phases, times, strict=True)
    )
    return float(np.max(np.where(fits, float(terms.tokens[0]) / seconds, 0.0)))
