"""The published equations: their terms, the optima of the released search, the rows of the paper, whole layers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rewright.passes.errors import UsageError
from rewright.passes.flexgen_policy_search.layered import scan, search
from rewright.passes.flexgen_policy_search.linear import Program, released_search
from rewright.passes.flexgen_policy_search.machine import GIB
from rewright.passes.flexgen_policy_search.model import read
from rewright.passes.flexgen_policy_search.presets import preset
from rewright.passes.flexgen_policy_search.published import SHARES, Equations, Law, Shape, seconds, shape_of, value
from rewright.passes.flexgen_policy_search.roofline import Work
from tests.passes.flexing import OPT, opt

# Model, prompt, GPU/host/disk in GiB, GPU batch, batches, tokens/s, as the original script found them with 80 % of
# each tier; the last digit is as far as they were written down.
GOLDEN = [
    ("6.7b", 512, (16, 200, 1500), 1, 1, 60.848061),
    ("13b", 256, (16, 200, 1500), 64, 10, 28.969816),
    ("13b", 1024, (16, 200, 1500), 32, 5, 8.042403),
    ("30b", 512, (16, 200, 1500), 32, 5, 7.094728),
    ("30b", 1024, (16, 200, 1500), 8, 11, 3.677185),
    ("66b", 512, (16, 200, 1500), 3, 14, 2.243037),
    ("175b", 256, (16, 200, 1500), 1, 821, 0.328488),
    ("175b", 512, (16, 200, 1500), 1, 432, 0.169371),
    ("30b", 512, (24, 125, 1000), 4, 23, 6.433546),
    ("30b", 1024, (24, 125, 1000), 3, 16, 3.344475),
    ("66b", 512, (24, 125, 1000), 1, 658, 0.394982),
    ("175b", 512, (24, 125, 1000), 1, 244, 0.142051),
    ("13b", 1024, (24, 96, 400), 16, 5, 7.955005),
    ("30b", 512, (24, 96, 400), 8, 7, 5.738287),
    ("66b", 512, (24, 96, 400), 1, 240, 0.356688),
    ("6.7b", 512, (8, 64, 500), 32, 5, 25.295108),
    ("13b", 256, (8, 64, 500), 16, 9, 22.815294),
    ("13b", 1024, (8, 64, 500), 3, 14, 6.345396),
    ("30b", 512, (8, 64, 500), 1, 567, 0.684490),
    ("6.7b", 512, (16, 48, 200), 1, 1, 60.848061),
    ("30b", 512, (24, 180, 900), 8, 20, 7.108798),
    ("66b", 512, (24, 180, 900), 1, 34, 2.062754),
    ("175b", 256, (24, 180, 900), 1, 434, 0.286280),
]
# Model, prompt, GPU batch, batches, percent of weights on GPU and host, of keys and of hidden states, tokens/s of
# arXiv:2303.06865 (tables 2, 4 and the benchmark script).
ROWS = [
    ("6.7b", 256, 4, 1, (100, 0, 100, 0, 100, 0), 53.29),
    ("6.7b", 512, 2, 1, (100, 0, 100, 0, 100, 0), 25.26),
    ("6.7b", 1024, 1, 1, (100, 0, 100, 0, 100, 0), 13.72),
    ("30b", 256, 160, 2, (10, 90, 0, 100, 0, 100), 16.01),
    ("30b", 512, 48, 3, (20, 80, 0, 100, 0, 100), 7.32),
    ("30b", 1024, 20, 4, (4, 96, 0, 100, 0, 100), 3.50),
    ("30b", 512, 48, 3, (0, 100, 0, 100, 0, 100), 7.26),
    ("30b", 512, 8, 1, (0, 100, 100, 0, 100, 0), 1.57),
    ("175b", 256, 64, 8, (0, 50, 0, 0, 0, 100), 1.36),
    ("175b", 512, 32, 8, (0, 50, 0, 0, 0, 100), 0.69),
    ("175b", 1024, 12, 12, (0, 50, 0, 0, 0, 100), 0.35),
    ("175b", 512, 32, 1, (0, 50, 0, 0, 0, 100), 0.27),
]


def program(model: str, prompt: int, sizes: tuple[int, ...], law: Law = "released", part: float = 0.8) -> Program:
    rooms = {tier: part * size * GIB for tier, size in zip(("gpu", "cpu", "disk"), sizes, strict=True)}
    constants = preset("t4-gcp-released").constants()
    return Program(Shape(*OPT[model]), constants, Work(prompt, 32), law, rooms)


def shares(percent: tuple[int, ...]) -> dict[str, np.ndarray]:
    pairs = [(percent[at] / 100, percent[at + 1] / 100) for at in (0, 2, 4)]
    flat = [part for one, two in pairs for part in (one, two, 1 - one - two)]
    return {name: np.array([part]) for name, part in zip(SHARES, flat, strict=True)}


def equations(model: str, prompt: int, gbs: int, nb: int, machine: str, law: Law = "released") -> Equations:
    one = (np.array([float(gbs)]), np.array([float(nb)]))
    return Equations(Shape(*OPT[model]), preset(machine).constants(), Work(prompt, 32), law, *one)


def test_terms_of_a_layer() -> None:
    """Seconds a layer as the released script has them, policy and constants fixed."""
    made, places = equations("30b", 512, 48, 3, "t4-gcp-released"), shares((20, 80, 0, 100, 0, 100))
    before = {name: float(value(row, places)[0]) for name, row in made.prefill().items()}
    after = {name: float(value(row, places)[0]) for name, row in made.decode().items()}
    assert before["ctog"] == pytest.approx(0.147644, rel=5e-6)
    assert before["gtoc"] == pytest.approx(2.23783, rel=5e-6)
    assert before["comp"] == pytest.approx(4.38897, rel=5e-6)
    assert (after["ctog"], after["gtoc"]) == pytest.approx((0.0714253, 0.000398881), rel=5e-6)
    assert after["comp"] == pytest.approx(0.220976, rel=5e-6)
    assert [float(part[0]) for part in seconds(made, places)] == pytest.approx([210.6704, 435.0937], rel=1e-6)
    made, places = equations("175b", 512, 32, 8, "t4-gcp-released"), shares((0, 50, 0, 0, 0, 100))
    after = {name: float(value(row, places)[0]) for name, row in made.decode().items()}
    assert (after["dtoc"], after["ctod"]) == pytest.approx((16.8368, 0.00581576), rel=5e-6)
    assert [float(part[0]) for part in seconds(made, places)] == pytest.approx([2178.6043, 50886.9374], rel=1e-7)


@pytest.mark.parametrize(("model", "prompt", "sizes", "gbs", "nb", "rate"), GOLDEN)
def test_golden_optima(model: str, prompt: int, sizes: tuple[int, ...], gbs: int, nb: int, rate: float) -> None:
    found = program(model, prompt, sizes).solve(gbs, nb)
    assert found is not None
    assert found.throughput == pytest.approx(rate, rel=1e-6, abs=5.1e-7)


@pytest.mark.parametrize("at", [17, 19])
def test_the_released_way_through_the_pairs(at: int) -> None:
    """The whole enumeration of two of them ends at the golden pair, or at one that ties with it."""
    model, prompt, sizes, _, _, rate = GOLDEN[at]
    top, solved = released_search(program(model, prompt, sizes))
    assert top is not None
    assert top.throughput == pytest.approx(rate, rel=1e-6)
    assert solved > 50


def test_rows_of_the_paper() -> None:
    errors = []
    for model, prompt, gbs, nb, percent, rate in ROWS:
        times = seconds(equations(model, prompt, gbs, nb, "t4-gcp-paper"), shares(percent))
        errors.append(abs(gbs * nb * 32 / float(sum(times)[0]) / rate - 1))
    assert np.mean(errors) <= 0.06
    assert sum(error <= 0.10 for error in errors) == 11


@pytest.mark.parametrize("law", ["paper", "released"])
def test_whole_layers_in_closed_form_are_the_best(law: Law) -> None:
    """Against every split of the weights' layers, caches and hidden states given; shares that may be cut bound it."""
    plan = Program(Shape(5, 4096, 16384, 32), preset("t4-gcp-paper").constants(), Work(256, 32), law,
                   {"gpu": 3e9, "cpu": 2.4e9, "disk": 4e9})  # fmt: skip
    gbs, nb = np.array([2.0, 4.0, 4.0, 8.0]), np.array([1.0, 1.0, 3.0, 2.0])
    made = Equations(plan.shape, plan.constants, plan.work, law, gbs, nb)
    memory, fitted = made.memory(), 0
    for cache in ((1, 0, 0), (0.4, 0.6, 0), (0, 0.4, 0.6)):
        found = scan(plan, gbs, nb, np.array([cache]), None)
        best = np.zeros(4)
        for hg in (1.0, 0.0):
            for wg, wc in itertools.product(range(6), range(6)):
                if wg + wc <= 5:
                    parts = (wg / 5, wc / 5, (5 - wg - wc) / 5, *cache, hg, 1 - hg, 0)
                    places = {name: np.full(4, float(part)) for name, part in zip(SHARES, parts, strict=True)}
                    fits = np.all([value(row, places) <= plan.rooms[tier] for tier, row in memory], axis=0)
                    best = np.maximum(best, np.where(fits, gbs * nb * 32 / sum(seconds(made, places)), 0))
        assert found.throughput == pytest.approx(best, rel=1e-9)
        fitted += int(np.sum(best > 0))
    assert fitted > 4


def test_the_exact_search_of_opt_30b() -> None:
    """Of whole layers, beside the best of all pairs with shares that may be cut: 7.1414 tokens/s at 28 x 6."""
    found = search(program("30b", 512, (16, 200, 1500)))
    at = int(np.argmax(found.throughput))
    assert (found.gbs[at], found.nb[at]) == (28, 6)
    assert 0.995 * 7.1414 <= found.throughput[at] <= 7.1414
    layers = {name: round(float(part[at]) * 48, 6) for name, part in found.shares.items()}
    assert (layers["wg"], layers["wc"], layers["wd"], layers["cc"], layers["cd"]) == (6, 41, 1, 46, 2)


def test_models_that_the_equations_do_not_hold_for() -> None:
    model = read(opt("6.7b"))
    assert shape_of(model) == Shape(*OPT["6.7b"])
    layout = opt("6.7b")
    layout.config["layer_types"] = ["full_attention", "sliding_attention"] * 16  # type: ignore[index]  # a dict
    layout.config["sliding_window"] = 64  # type: ignore[index]  # a dict
    with pytest.raises(UsageError, match="know dense layers of full attention"):
        shape_of(read(layout))
