"""The hierarchical roofline: seconds of each resource for a block of work, linear in what is placed where.

An operation takes the longer of its arithmetic and its bytes at the tier where it runs; a phase takes as long as its
busiest resource (FlexGen, arXiv:2303.06865, section 4.2, with the roofline of MoE-Lightning, arXiv:2411.11217,
section 3). Figures are numpy arrays over pairs of GPU batch and number of batches.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rewright.passes.flexgen_policy_search.machine import Machine
from rewright.passes.flexgen_policy_search.shape import Cache, Model, Sparsity, Unit

Array = npt.NDArray[np.float64]
RESOURCES = ("h2d", "d2h", "disk_read", "disk_write", "gpu", "cpu", "dram")
TIERS = ("gpu", "cpu", "disk")
# What of a layer's work a kernel each starts, and how many tokens of a prompt go through the GPU at once.
LAUNCHES, CHUNK = 10, 4096
# Experts that are under way to the GPU at a time.
RING = 3
Device = Literal["gpu", "cpu"]
Schedule = Literal["zigzag", "staggered", "row"]


@dataclass(frozen=True, slots=True)
class Work:
    """Sequences of `prompt` tokens, each of which gets `generate` more."""

    prompt: int
    generate: int

    @property
    def context(self) -> int:
        return self.prompt + self.generate


@dataclass(frozen=True, slots=True)
class Setting:
    """What is the same for a whole policy: bits, where decoding attends to keys off the GPU, where hidden states are.

    `weight_bits` None leaves weights as they are stored.
    """

    weight_bits: int | None
    kv_bits: int
    attention: Device
    hidden: Device
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Phase:
    """Seconds of what it needs, `times` over: `fixed`, for a piece of each unit and a layer's cache by tier.

    Tier `compute` of an expert is the host's memory with its product done by the CPU.
    """

    name: str
    times: float
    fixed: dict[str, Array]
    weights: dict[tuple[int, str], dict[str, Array]]
    caches: dict[tuple[int, str], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Rooms:
    """Bytes beside weights: `fixed` by tier, of a layer's cache by class, and what is there while something streams.

    `staging` is held on a tier while a cache is off the GPU, `buffers` while a weight is: two of the largest pieces,
    and `ring` experts, beside twice what a layer streams.
    """

    fixed: dict[str, Array]
    caches: dict[int, Array]
    staging: dict[str, Array]
    buffers: float
    ring: float


@dataclass(frozen=True, slots=True)
class Terms:
    """All that times and memory are made of, over pairs of GPU batch and number of batches."""

    model: Model
    setting: Setting
    gbs: Array
    nb: Array
    phases: tuple[Phase, ...]
    rooms: Rooms
    sizes: tuple[int, ...]
    classes: tuple[tuple[Cache, int], ...]
    tokens: Array

    def throughput(self, seconds: Array) -> Array:
        """Generated tokens a second."""
        return self.tokens / seconds


def classes_of(model: Model) -> tuple[tuple[Cache, int], ...]:
    """Caches that differ, and how many layers have each; layers that keep nothing are left out."""
    counts = Counter(cache for cache in model.caches if cache.numbers or cache.state)
    return tuple(counts.items())


def active(model: Model, tokens: Array) -> Array:
    """The share of a layer's experts that so many tokens use, each drawn alike."""
    if not model.experts:
        return np.ones_like(tokens)
    return np.asarray(1 - (1 - min(1.0, model.reused / model.experts)) ** tokens)


def union_read(sparsity: Sparsity, tokens: Array) -> Array:
    """The share of sparse units that a step of so many tokens reads, each choosing by itself; all past its rows."""
    return np.where(tokens <= sparsity.rows, 1 - (1 - sparsity.share) ** tokens, 1.0)


def terms(model: Model, machine: Machine, work: Work, setting: Setting, gbs: Array, nb: Array) -> Terms:
    """The terms of a setting for pairs of GPU batch and number of batches."""
    block, n = gbs * nb, work.generate
    classes = classes_of(model)
    maker = _Maker(model, machine, work, setting, classes, gbs, nb)
    phases: tuple[Phase, ...]
    if setting.schedule == "staggered":
        phases = (maker.phase("round", n, block / n, block * (n - 1) / n),)
    else:
        zero = np.zeros_like(block)
        phases = (maker.phase("prefill", 1, block, zero),)
        if n > 1:
            phases += (maker.phase("decode", n - 1, zero, block),)
    sizes = tuple(unit.at(setting.weight_bits) for unit in model.units)
    return Terms(model, setting, gbs, nb, phases, maker.rooms(sizes), sizes, classes, block * n)


def multiplied(machine: Machine, flops: Any, nbytes: Any, rows: Any) -> Array:
    """Seconds of the GPU for products of `rows` rows each: their arithmetic, or the bytes of their weights."""
    rate = machine.gpu_flops * np.ones_like(np.asarray(rows, dtype=np.float64))
    if machine.gemm:
        known, share = zip(*machine.gemm, strict=True)
        rate = rate * np.interp(np.log(np.maximum(rows, 1)), np.log(known), share)
    return np.asarray(np.maximum(flops / rate, nbytes / machine.hbm))


def attended(machine: Machine, flops: Any, nbytes: Any) -> Array:
    """Seconds of the GPU for new tokens' attention: its arithmetic, or the bytes of keys and values."""
    rate, read = machine.gpu_attn_flops or machine.gpu_flops, machine.gpu_attn or machine.hbm
    return np.asarray(np.maximum(flops / rate, nbytes / read))


class _Maker:
    def __init__(
        self,
        model: Model,
        machine: Machine,
        work: Work,
        setting: Setting,
        classes: tuple[tuple[Cache, int], ...],
        gbs: Array,
        nb: Array,
    ) -> None:
        self.model, self.machine, self.work, self.setting = model, machine, work, setting
        self.classes, self.gbs, self.nb = classes, gbs, nb

    def phase(self, name: str, times: float, begun: Array, going: Array) -> Phase:
        """One pass over all layers: prompts of `begun` sequences, and a token of each of those `going` on."""
        model, machine, s = self.model, self.machine, self.work.prompt
        share = begun / (self.gbs * self.nb)
        tokens = begun * s + going
        # how often the GPU goes through a layer's weights
        steps = share * self.nb * np.maximum(1.0, self.gbs * s / CHUNK) + (going > 0) * self.nb
        step_tokens = tokens / steps
        add = _Adder(machine)
        weights: dict[tuple[int, str], dict[str, Array]] = {}
        # what a step of tokens reads of units that predictors know; prompts are read whole
        read = np.ones_like(tokens)
        if model.sparsity is not None and not np.any(begun > 0):
            read = union_read(model.sparsity, step_tokens)
            add.seconds("gpu", steps * (step_tokens <= model.sparsity.rows) * model.sparsity.nbytes / machine.hbm)
        for at, unit in enumerate(model.units):
            decodes = bool(np.any(going > 0))
            part = read if unit.sparse else np.ones_like(tokens)
            weights |= self._unit(at, unit, tokens, begun + going, steps, step_tokens, part, decodes=decodes)
        add.seconds("gpu", steps * model.layers * LAUNCHES * machine.launch_s)
        for cache, count in self.classes:
            add.seconds("gpu", count * cache.flops * cache.pairs(s) * begun / machine.gpu_flops)
        if self.setting.hidden == "cpu":
            moved = tokens * model.hidden * 2 * model.layers
            add.bytes("h2d", moved)
            add.bytes("d2h", moved)
            for way in ("h2d", "d2h"):
                add.seconds(way, steps * model.layers * machine.copy_s)
        caches: dict[tuple[int, str], dict[str, Array]] = {}
        for at, (cache, _) in enumerate(self.classes):
            for tier in TIERS:
                caches[at, tier] = self._cache(cache, tier, begun, going)
        return Phase(name, times, add.spent, weights, caches)

    def _unit(
        self,
        at: int,
        unit: Unit,
        tokens: Array,
        heads: Array,
        steps: Array,
        step_tokens: Array,
        part: Array,
        *,
        decodes: bool,
    ) -> dict[tuple[int, str], dict[str, Array]]:
        """A piece of a unit on each tier; the GPU reads `part` of it where it is, and copies are of all of it."""
        model, machine = self.model, self.machine
        size = float(unit.at(self.setting.weight_bits))
        used, passed, ones = tokens, active(model, tokens), np.ones_like(tokens)
        if unit.kind == "expert":
            used, busy = tokens * model.reused / model.experts, active(model, step_tokens)
        else:
            passed, busy = ones, ones
            # a head sees the last token of each sequence; an embedding that is no head is looked up
            used = heads if unit.kind in ("head", "embedding") else tokens
            if unit.kind == "embedding" and not model.tied:
                passed, busy, used = 0 * ones, 0 * ones, 0 * ones
        rows = used / np.maximum(steps * busy, 1e-30) if unit.kind == "expert" else used / steps
        product = multiplied(machine, 2.0 * unit.numbers * used * part, steps * busy * size * part, rows)
        found: dict[tuple[int, str], dict[str, Array]] = {}
        for tier in TIERS:
            add = _Adder(machine)
            add.seconds("gpu", product)
            if tier != "gpu":
                add.bytes("h2d", size * passed)
            if tier == "disk":
                add.bytes("disk_read", size * passed)
            found[at, tier] = add.spent
        if unit.kind == "expert":
            found[at, "compute"] = found[at, "cpu"]
            if decodes and self.setting.schedule != "staggered":
                add = _Adder(machine)
                read = size * passed
                add.seconds("cpu", np.maximum(read / machine.cpu_attn, 2.0 * unit.numbers * used / machine.cpu_flops))
                add.seconds("dram", read / machine.dram)
                for way in ("h2d", "d2h"):
                    add.bytes(way, used * model.hidden * 2)
                found[at, "compute"] = add.spent
        return found

    def _cache(self, cache: Cache, tier: str, begun: Array, going: Array) -> dict[str, Array]:
        """A layer's cache on a tier: written for the prompts of `begun`, read and grown for those `going` on."""
        machine, work, bits = self.machine, self.work, self.setting.kv_bits
        add = _Adder(machine)
        token, mean = cache.token_bytes(bits), cache.mean(work.prompt, work.generate)
        read = going * (mean * token + cache.state)
        new = going * (token + cache.state)
        flops = going * mean * cache.flops
        on_gpu = attended(machine, flops, read)
        if tier == "gpu":
            add.seconds("gpu", on_gpu)
            return add.spent
        written = begun * (cache.tokens(work.prompt) * token + cache.state)
        add.bytes("d2h", written)
        if self.setting.attention == "cpu" and cache.attends:
            add.seconds(
                "cpu", np.maximum(read / machine.cpu_attn, flops / (machine.cpu_attn_flops or machine.cpu_flops))
            )
            add.seconds("dram", read / machine.dram)
            add.bytes("h2d", going * 2 * cache.out)
            add.bytes("d2h", going * 2 * (cache.query + cache.numbers))
        else:
            add.seconds("gpu", on_gpu)
            add.bytes("h2d", read)
            add.bytes("d2h", new)
        for way in ("h2d", "d2h"):
            add.seconds(way, (going > 0) * self.nb * machine.copy_s)
        if tier == "disk":
            add.bytes("disk_read", read)
            add.bytes("disk_write", written + new)
        return add.spent

    def rooms(self, sizes: tuple[int, ...]) -> Rooms:
        """Bytes by tier."""
        model, work, bits, gbs = self.model, self.work, self.setting.kv_bits, self.gbs
        block = gbs * self.nb
        zero = np.zeros_like(gbs)
        chunk = np.minimum(gbs * work.prompt, CHUNK)
        live = 2.0 * np.maximum(chunk, gbs) * (4 * model.hidden + 2 * model.query + 2 * model.ffn)
        logits = 4.0 * gbs * model.vocabulary
        known = model.fixed_bytes + (model.sparsity.nbytes if model.sparsity is not None else 0)
        fixed = {"gpu": known + live + logits, "cpu": zero.copy(), "disk": zero.copy()}
        held = block
        if self.setting.schedule == "staggered":
            # of those under way a share of 1 / generate is at its prompt; caches are as full as they are on average
            held = block * (2 * work.prompt + work.generate) / (2 * work.context)
            fixed[self.setting.hidden] = fixed[self.setting.hidden] + 2.0 * model.hidden * block * (
                1 + work.prompt / work.generate
            )
        else:
            fixed[self.setting.hidden] = fixed[self.setting.hidden] + 2.0 * model.hidden * block * work.prompt
        caches = {at: held * cache.peak(work.context, bits) for at, (cache, _) in enumerate(self.classes)}
        peak = max((float(cache.peak(work.context, bits)) for cache, _ in self.classes), default=0.0)
        staging = {"gpu": 2 * gbs * peak, "cpu": 2 * gbs * peak, "disk": zero}
        large = [size for unit, size in zip(model.units, sizes, strict=True) if unit.kind in ("dense", "head")]
        ring = [size for unit, size in zip(model.units, sizes, strict=True) if unit.kind == "expert"]
        return Rooms(fixed, caches, staging, 2.0 * max(large, default=0), float(RING * max(ring, default=0)))


class _Adder:
    """Adds bytes and seconds to resources; what crosses the host's memory counts there too."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.spent: dict[str, Array] = {}

    def seconds(self, resource: str, value: Any) -> None:
        known = self.spent.get(resource)
        self.spent[resource] = np.asarray(value, dtype=np.float64) if known is None else known + value

    def bytes(self, resource: str, count: Any) -> None:
        machine = self._machine
        self.seconds(resource, count / getattr(machine, resource))
        # a disk's bytes are written to the host's memory and read from it
        self.seconds("dram", count * (2 if resource.startswith("disk") else 1) / machine.dram)
