"""Budgets: what is dealt out adds up, goes where it costs least, and leaves alone what was said by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes.compress.deal import Unit, deal_bits, deal_zeros
from rewright.passes.errors import UsageError
from rewright.passes.loading import load
from rewright.passes.values import CODE_BITS
from tests.passes.compressing import compress, logits, plain, report
from tests.passes.conftest import STORIES

POINTS = (0.3, 0.4, 0.5, 0.6, 0.7)
BITS = tuple(map(float, CODE_BITS))


def curve(size: float, growth: float, points: tuple[float, ...] = POINTS) -> tuple[float, ...]:
    """Costs that grow (or with bits fall) by a factor from point to point."""
    return tuple(size * math.exp(growth * point) for point in points)


SIZES = st.integers(1, 10**6)
COSTS = st.floats(1e-9, 1e3)
UNITS = st.lists(
    st.builds(lambda n, size, growth: Unit(n, POINTS, curve(size, growth)), SIZES, COSTS, st.floats(0, 20)),
    min_size=1,
    max_size=8,
)
BIT_UNITS = st.lists(
    st.builds(lambda n, size, growth: Unit(n, BITS, curve(size, -growth, BITS)), SIZES, COSTS, st.floats(0, 3)),
    min_size=1,
    max_size=4,
)


def _mean(units: list[Unit], given: list[Any]) -> float:
    return sum(unit.weights * each for unit, each in zip(units, given, strict=True)) / sum(u.weights for u in units)


@given(UNITS, st.floats(0.3, 0.7))
@settings(deadline=None, max_examples=60)
def test_zeros_add_up_and_never_cost_more_than_flat(units: list[Unit], average: float) -> None:
    given = deal_zeros(units, average)
    assert _mean(units, given) == pytest.approx(average, abs=1e-6)
    assert all(POINTS[0] - 1e-9 <= each <= POINTS[-1] + 1e-9 for each in given)
    ours, flat = (sum(u.cost(p) for u, p in zip(units, got, strict=True)) for got in (given, [average] * len(units)))
    # the flat share may lie between two steps
    assert ours <= flat * 1.01 + 1e-12


def test_zeros_go_where_they_cost_least() -> None:
    units = [Unit(1000, POINTS, curve(cost, 5.0)) for cost in (1.0, 1.0, 100.0)]
    units += [Unit(4000, POINTS, curve(0.01, 5.0))]
    given = deal_zeros(units, 0.5)
    assert given[2] == pytest.approx(0.3)
    assert given[3] > 0.55 > given[0] == pytest.approx(given[1], abs=0.011)
    assert _mean(units, given) == pytest.approx(0.5, abs=1e-9)
    ours = sum(unit.cost(point) for unit, point in zip(units, given, strict=True))
    assert ours < 0.6 * sum(unit.cost(0.5) for unit in units)


@given(BIT_UNITS, st.floats(2, 8))
@settings(deadline=None, max_examples=60)
def test_bits_are_the_best_that_the_average_allows(units: list[Unit], average: float) -> None:
    """Against every way to deal them out."""
    given = deal_bits(units, average)
    assert set(given) <= set(CODE_BITS)
    assert _mean(units, given) <= average + 1e-5

    def cost(bits: tuple[int, ...] | list[int]) -> float:
        return sum(unit.cost(each) for unit, each in zip(units, bits, strict=True))

    ways = [way for way in product(CODE_BITS, repeat=len(units)) if _mean(units, list(way)) <= average - 1e-5]
    # the solver stops within a millionth of the largest cost of all
    slack = 1e-5 * max(max(unit.costs) for unit in units)
    assert not ways or cost(given) <= min(map(cost, ways)) + slack


def test_an_average_that_cannot_be_had() -> None:
    unit = Unit(10, BITS, curve(1.0, -1.0, BITS))
    with pytest.raises(ValueError, match=r"no way to deal out an average of 1.5"):
        deal_bits([unit], 1.5)
    with pytest.raises(ValueError, match=r"no way to deal out an average of 0.9"):
        deal_zeros([Unit(10, POINTS, curve(1.0, 1.0))], 0.9)


def test_costs_between_points_and_past_them() -> None:
    unit = Unit(1, (0.2, 0.4, 0.6), (1.0, 10.0, 1000.0))
    for point, cost in ((0.2, 1), (0.3, 10**0.5), (0.4, 10), (0.5, 100), (0.6, 1000), (0.7, 10**4), (0.1, 10**-0.5)):
        assert unit.cost(point) == pytest.approx(cost)


def _rows(dst: Path, key: str) -> dict[str, Any]:
    return {row["name"].removesuffix(".weight"): row[key] for row in report(dst)["matrices"]}


def test_measured_zeros_beat_flat_ones_on_a_real_model(text: Path, tmp_path: Path) -> None:
    errors = {}
    for budget in ("flat", "measured"):
        document, _ = compress(
            STORIES, tmp_path / budget, text, bits=16, sparsity=0.5, budget=budget, samples=64, sequence_length=128
        )
        metrics = document["stages"][0]["metrics"]
        errors[budget] = metrics["layer_error_held_out"]
        assert metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert errors["measured"] < 0.95 * errors["flat"]
    found = _rows(tmp_path / "measured", "sparsity")
    assert min(found.values()) > 0.29
    assert max(found.values()) < 0.71
    assert len({round(each, 2) for each in found.values()}) > 5
    table = report(tmp_path / "measured")["budget"]
    assert [row["name"] for row in table] == list(found)
    assert all(row["matrices"] == 1 and row["kl"] > 0 for row in table)
    for row in table:
        assert found[row["name"]] == pytest.approx(row["sparsity"], abs=1e-3)


def test_an_average_of_bits_on_a_real_model(text: Path, tmp_path: Path) -> None:
    """At most the average, the matrices that servers fuse alike, and the result runs."""
    dst = tmp_path / "out"
    _, warnings = compress(STORIES, dst, text, bits=3.5, budget="measured", group_size=32)
    rows = report(dst)["matrices"]
    size = sum(row["rows"] * row["columns"] for row in rows)
    average = sum(row["bits"] * row["rows"] * row["columns"] for row in rows) / size
    assert 3.3 < average <= 3.5
    bits = _rows(dst, "bits")
    assert len(set(bits.values())) > 1
    assert not any("fuse" in warning for warning in warnings)
    for layer in range(5):
        for parts in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({bits[f"model.layers.{layer}.{part}"] for part in parts}) == 1
    assert {row["name"].count("_proj") for row in report(dst)["budget"]} == {1, 2, 3}
    assert plain(dst).isfinite().all()


def test_what_was_said_by_hand_is_not_dealt_with(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    said = {"bits_for": ["layers.0.mlp=8"], "sparsity_for": ["layers.1.*[qk]_proj=0.9", "o_proj=0"]}
    compress(tiny("llama"), dst, text, bits=3.5, sparsity=0.5, budget="measured", samples=4, **said)
    bits, zeros, table = _rows(dst, "bits"), _rows(dst, "sparsity"), report(dst)["budget"]
    assert {bits[f"model.layers.0.mlp.{part}_proj"] for part in ("gate", "up", "down")} == {8}
    for part in "qk":
        assert zeros[f"model.layers.1.self_attn.{part}_proj"] >= 0.899
    dealt_bits = {row["name"]: row["bits"] for row in table if "bits" in row}
    dealt_zeros = {row["name"]: row for row in table if "sparsity" in row}
    assert not any("layers.0.mlp" in name or name.startswith("layer 0 gate") for name in dealt_bits)
    assert len(dealt_zeros) == 14 - 4
    total = sum(row["weights"] for row in dealt_zeros.values())
    assert sum(row["weights"] * row["sparsity"] for row in dealt_zeros.values()) / total == pytest.approx(0.5)
    sizes = {row["name"]: row["weights"] for row in table if "bits" in row}
    assert sum(sizes[name] * each for name, each in dealt_bits.items()) / sum(sizes.values()) <= 3.5


def test_bits_by_measure_where_no_zeros_are_dealt(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """A whole number is an average too; with a pattern, whose zeros nobody can deal out, bits are."""
    for name, said in {"whole": {}, "pattern": {"pattern": "2:4"}}.items():
        compress(tiny("llama"), tmp_path / name, text, bits=4, budget="measured", samples=4, **said)
        rows = report(tmp_path / name)["matrices"]
        size = sum(row["rows"] * row["columns"] for row in rows)
        assert 3.5 < sum(row["bits"] * row["rows"] * row["columns"] for row in rows) / size <= 4
        assert all("bits" in row for row in report(tmp_path / name)["budget"])
    compress(tiny("llama"), tmp_path / "both", text, bits=4, budget="measured", samples=4, sparsity=0.5)
    assert set(_rows(tmp_path / "both", "bits").values()) == {4}
    assert all("sparsity" in row for row in report(tmp_path / "both")["budget"])


def test_experts_are_dealt_with_as_one(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    """In bits all of them, as plain transformers reads them; in zeros those of a layer that do the same."""
    compress(tiny("mixtral"), tmp_path / "bits", text, bits=3.5, budget="measured", format="dense", samples=4)
    bits = {row["bits"] for row in report(tmp_path / "bits")["matrices"] if "experts" in row["name"]}
    assert len(bits) == 1
    compress(
        tiny("mixtral"), tmp_path / "zeros", text, bits=16, sparsity=0.5, budget="measured", format="dense", samples=4
    )
    table = {row["name"]: row for row in report(tmp_path / "zeros")["budget"]}
    experts = [row for name, row in table.items() if "experts" in name]
    assert experts
    assert {row["matrices"] for row in experts} == {4}


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"bits_for": "proj=4"}, "nothing to deal out: `--bits-for` speaks of every matrix"),
        ({"sparsity": 0.5, "sparsity_for": "proj=0.5"}, "nothing to deal out: `--sparsity-for` speaks of every matrix"),
        ({"bits": 2.0001}, None),
        ({"sparsity": 0.99}, None),
        ({"sparsity": 0.001}, None),
    ],
    ids=str,
)
def test_averages_at_the_edge(
    said: dict[str, Any], message: str | None, tiny: Callable[[str], Path], text: Path, tmp_path: Path
) -> None:
    words = {"budget": "measured", "samples": 4, **said}
    if message is not None:
        with pytest.raises(UsageError, match=message):
            compress(tiny("llama"), tmp_path / "out", text, **words)
        return
    document, _ = compress(tiny("llama"), tmp_path / "out", text, **words)
    if "bits" in said:
        assert set(_rows(tmp_path / "out", "bits").values()) == {2}
    else:
        # codes of 4 bits add zeros of their own
        assert document["stages"][0]["metrics"]["sparsity"] > said["sparsity"] - 1e-3


def test_a_measured_run_is_the_same_every_time(tiny: Callable[[str], Path], text: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compress(tiny("llama"), tmp_path / name, text, bits=3.5, budget="measured", samples=4)
    one, two = (logits(load(tmp_path / name)[0]) for name in ("one", "two"))
    assert torch.equal(one, two)
