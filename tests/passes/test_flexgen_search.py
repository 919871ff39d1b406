"""The search under the roofline: exact on what can be tried out, monotone, within its rooms, and its terms by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as run_settings
from hypothesis import strategies as st

from rewright.passes.flexgen_policy_search import spread
from rewright.passes.flexgen_policy_search.answers import pareto, sensitivity
from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.machine import GIB, Machine
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.place import place
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.roofline import TIERS, Setting, Work, active, terms
from rewright.passes.flexgen_policy_search.search import leanest, search
from rewright.passes.flexgen_policy_search.shape import Cache
from tests.bench.flexgen_models import qwen_next
from tests.passes.flexing import brute, machine, opt, settings, small, upgrades


@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5, 10])
def test_nothing_is_better(seed: int) -> None:
    """Every placement of every piece in every setting and pair of batch sizes, tried one by one; one has none."""
    problem = small(seed)
    found = search(problem)
    assert (found.best.throughput if found else 0.0) == pytest.approx(brute(problem), rel=1e-9)
    assert (found is None) == (seed == 10)


def test_a_dense_model_within_its_rooms() -> None:
    problem = Problem(read(opt("30b")), preset("t4-gcp-paper"), Work(512, 32), settings("zigzag"))
    found = search(problem)
    assert found is not None
    best = found.best
    assert all(best.peak[tier] <= problem.machine.rooms[tier] for tier in TIERS)
    assert best.throughput <= found.bound * (1 + 1e-9)
    assert best.throughput >= 0.99 * found.bound
    assert sum(count for (letter, _, _), count in best.counts.items() if letter == "w") == 48 * 6 + 1
    front = pareto(problem, found)
    assert front[-1] is best
    assert all(a.seconds < b.seconds and a.throughput < b.throughput for a, b in itertools.pairwise(front))
    worth = {item["param"]: item["d_throughput_pct_per_10pct"] for item in sensitivity(problem, best)}
    assert worth["gpu_flops"] > 1
    assert worth["disk_read"] == worth["disk_size"] == 0
    # the same question has the same answer
    again = search(problem)
    assert again is not None
    assert (again.best.counts, again.best.seconds) == (best.counts, best.seconds)


def test_a_bound_on_latency_and_the_least_memory() -> None:
    problem = Problem(read(opt("6.7b")), preset("t4-gcp-paper"), Work(256, 32), settings("zigzag")[:2])
    free = search(problem)
    assert free is not None
    bound = replace(problem, most=free.best.seconds / 1.2)
    held = search(bound)
    assert held is not None
    assert held.best.seconds <= bound.most * (1 + 1e-9)  # type: ignore[operator]  # it was given
    assert held.best.throughput < free.best.throughput
    lean = leanest(bound)
    assert lean.best.peak["cpu"] <= held.best.peak["cpu"]
    assert lean.best.seconds <= bound.most * (1 + 1e-9)  # type: ignore[operator]  # it was given


WORK = Work(64, 16)
WHAT = st.sampled_from((*Machine.RATES, "gpu_bytes", "cpu_bytes", "disk_bytes"))


@run_settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.tuples(*(st.floats(0.05, 1.5) for _ in TIERS)),
    st.tuples(*(st.floats(-0.7, 0.7) for _ in Machine.RATES)),
    WHAT,
    st.floats(1.02, 2),
)
def test_more_of_anything_never_hurts(
    sizes: tuple[float, ...], rates: tuple[float, ...], what: str, more: float
) -> None:
    """A pair of batch sizes on a machine, and on one with more memory or a faster part."""
    model = MODEL
    made = machine(*(part * model.total_bytes for part in sizes))
    scaled: dict[str, Any] = {name: getattr(made, name) * 10**by for name, by in zip(Machine.RATES, rates, strict=True)}
    made = replace(made, **scaled)
    value = getattr(made, what) * more
    better = replace(made, **{what: int(value) if what.endswith("bytes") else value})
    for setting in settings("zigzag", "staggered")[1::2]:
        one, other = (place(pair(Problem(model, m, WORK, ()), setting, 2, 3), 0, m) for m in (made, better))
        assert one is None or (other is not None and other.throughput >= one.throughput * (1 - 1e-4))


MODEL = read(opt("6.7b"))


@pytest.mark.parametrize(("seed", "step"), [(43, 8), (91, 4)])
def test_more_of_a_machine_is_no_less(seed: int, step: int) -> None:
    """Upgrades after which a search that only climbs by the scan ends on a lower hill."""
    one, other = (
        search(Problem(MODEL, made, Work(512, 32), settings()))
        for _, made in itertools.islice(upgrades(seed), step - 1, step + 1)
    )
    assert one is not None
    assert other is not None
    assert other.best.throughput >= one.best.throughput * (1 - 1e-9)


def test_caches_of_several_kinds() -> None:
    """Attention and states on different tiers, and most experts computed: the scan has none of it, the walk does."""
    box = preset("t4-gcp-paper")
    problem = Problem(read(qwen_next()), box, Work(512, 32), tuple(one for one in settings() if one.attention == "cpu"))
    found = search(problem)
    assert found is not None
    setting = next(one for one in problem.settings if one.hidden == "cpu")
    good = place(pair(problem, setting, 32, 22), 0, box)
    assert good is not None
    assert found.best.throughput >= 0.998 * good.throughput


def test_terms_by_hand() -> None:
    """OPT-6.7B, 2 batches of 3, keys on the host and attended to there, weights streamed from it."""
    box = machine(GIB, GIB, GIB, h2d=1e9, d2h=2e9, dram=1e10, hbm=1e11, gpu_flops=1e13, cpu_flops=1e12, cpu_attn=5e9,
                  launch_s=0.0, copy_s=0.0)  # fmt: skip
    setting = Setting(None, 16, "cpu", "gpu", "zigzag")
    made = terms(MODEL, box, Work(100, 11), setting, np.array([3.0]), np.array([2.0]))
    before, after = made.phases
    assert (before.times, after.times) == (1, 10)
    at = next(key for key, unit in enumerate(MODEL.units) if unit.count == 128)
    unit = MODEL.units[at]
    assert (unit.nbytes, unit.numbers) == (4096 * 4096 * 2 + 4096 * 2, 4096 * 4096)
    assert before.weights[at, "cpu"]["h2d"][0] == pytest.approx(unit.nbytes / 1e9)
    assert before.weights[at, "cpu"]["gpu"][0] == pytest.approx(2 * 4096**2 * 600 / 1e13)
    # decoding is held up by the GPU's memory, once for each batch
    assert after.weights[at, "gpu"]["gpu"][0] == pytest.approx(2 * unit.nbytes / 1e11)
    assert after.weights[at, "gpu"].get("h2d") is None
    token = 2 * 4096 * 2
    # contexts of 101 to 110
    read_ = 6 * 105.5 * token
    assert after.caches[0, "cpu"]["cpu"][0] == pytest.approx(read_ / 5e9)
    assert after.caches[0, "cpu"]["h2d"][0] == pytest.approx(6 * 4096 * 2 / 1e9)
    assert after.caches[0, "cpu"]["d2h"][0] == pytest.approx(6 * 3 * 4096 * 2 / 2e9)
    assert after.caches[0, "cpu"]["dram"][0] == pytest.approx((read_ + 6 * 4 * 4096 * 2) / 1e10)
    assert after.caches[0, "gpu"]["gpu"][0] == pytest.approx(read_ / 1e11)
    assert before.caches[0, "disk"]["disk_write"][0] == pytest.approx(6 * 100 * token / box.disk_write)
    assert made.rooms.caches[0][0] == 6 * 111 * token
    shipped = terms(MODEL, box, Work(100, 11), replace(setting, attention="gpu", kv_bits=4), *(np.ones(1),) * 2)
    assert shipped.phases[1].caches[0, "cpu"]["h2d"][0] == pytest.approx(105.5 * 2 * 4096 * 4.5 / 8 / 1e9)


@pytest.mark.parametrize("window", [None, 1, 5, 8, 20])
def test_what_a_window_keeps(window: int | None) -> None:
    cache = Cache("x", 4, window)
    seen = [min(10 + step, window or 99) for step in range(1, 7)]
    assert cache.mean(10, 7) == pytest.approx(np.mean(seen))
    assert cache.pairs(10) == sum(min(at + 1, window or 99) for at in range(10))
    assert cache.peak(17, 16) == min(17, window or 99) * 8


def test_experts_that_are_used() -> None:
    model = replace(MODEL, experts=8, reused=2)
    assert active(model, np.array([1.0, 2.0, 1000.0])) == pytest.approx([0.25, 1 - 0.75**2, 1.0])


@pytest.mark.parametrize("away", [0, 1, 17, 31, 32, 100])
def test_layers_stream_about_as_much(away: int) -> None:
    """No layer streams more than another by more than the largest piece."""
    sizes = [unit.nbytes for unit in MODEL.units]
    counts = {}
    for key, unit in enumerate(MODEL.units):
        cpu = min(unit.count, away)
        counts |= {("w", key, "cpu"): cpu, ("w", key, "gpu"): unit.count - cpu}
    load = np.zeros(MODEL.layers)
    placed = spread.pieces(MODEL, sizes, counts)
    of = {piece: key for key, unit in enumerate(MODEL.units) for piece in unit.pieces}
    for piece, tier in placed:
        if tier == "cpu" and piece.layer >= 0:
            load[piece.layer] += sizes[of[piece]]
    found = {key: sum(of[piece] == key and tier == "cpu" for piece, tier in placed) for key in range(len(sizes))}
    assert found == {key: counts["w", key, "cpu"] for key in range(len(sizes))}
    assert load.max() - load.min() <= max(
        size for size, unit in zip(sizes, MODEL.units, strict=True) if unit.kind == "dense"
    )
