"""The parts of `dejavu-predictor-train`: curves and prices, closed-form predictors, what errors are foretold to
cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes.dejavu_predictor_train.budget import LayerUnits, Market, Units
from rewright.passes.dejavu_predictor_train.collect import Histogram
from rewright.passes.dejavu_predictor_train.curves import Curves, curves
from rewright.passes.dejavu_predictor_train.predictor import Factors, Moments, fit, settle, store
from rewright.passes.dejavu_predictor_train.thresholds import bucket_shifts
from rewright.passes.dejavu_predictor_train.values import Buckets, Rank, Targets


def moments(x: torch.Tensor) -> Moments:
    wide = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    return Moments(len(x), wide.t() @ wide, None)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_hulls_are_convex_and_keep_the_whole_cost(seed: int, tokens: int, units: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(units, tokens, generator=draws)
    costs = torch.randn(units, tokens, generator=draws).square() * (scores > 0)
    found = curves(scores, costs)
    assert bool((found.slopes.diff(dim=1) >= -1e-6 * found.slopes.abs().max()).all())
    torch.testing.assert_close(found.whole, costs.mean(1), rtol=1e-4, atol=1e-6)
    # the last threshold leaves every token that was seen out, and none lies on a score
    assert bool((found.thresholds[:, -1] > scores.amax(1)).all())
    assert not bool(torch.isin(scores, found.thresholds).any())


def test_one_price_is_the_best_choice_of_all() -> None:
    """Against every combination of steps of three units."""
    draws = torch.Generator().manual_seed(3)
    scores = torch.randn(3, 4, generator=draws)
    costs = torch.rand(3, 4, generator=draws) * torch.tensor([[1.0], [3.0], [0.2]])
    found = curves(scores, costs)
    market = Market([LayerUnits(Units(found, 10), None, {})])
    ordered = costs.gather(1, scores.argsort(1)).cumsum(1) / 4
    sums = torch.cat([torch.zeros(3, 1), ordered], dim=1)
    for share in (0.25, 0.5, 0.75):
        settled = market.at_share(share)
        # a price buys on the convex hull: no choice that reads as little costs less, but for what lies between two
        # steps
        best = min(
            float(sum(sums[unit, place] for unit, place in enumerate(chosen)))
            for chosen in itertools.product(range(5), repeat=3)
            if 1 - sum(chosen) / 12 <= settled.share + 1e-6
        )
        assert settled.share <= share + 1e-6
        assert settled.cost <= best + 1e-6


def test_prices_over_layers_beat_equal_shares() -> None:
    draws = torch.Generator().manual_seed(0)
    layers = []
    for scale in (1.0, 0.01):
        scores = torch.randn(64, 200, generator=draws)
        costs = scale * scores.clamp(min=0).square()
        layers.append(LayerUnits(Units(curves(scores, costs), 8), None, {}))
    one, even = Market(layers).at_share(0.3), Market(layers, even=True).at_share(0.3)
    assert one.share == pytest.approx(even.share, abs=0.01)
    assert one.cost < 0.7 * even.cost
    # and a cost that is asked for is kept, at the share that it takes
    asked = Market(layers).at_cost(one.cost)
    assert asked.cost <= one.cost * (1 + 1e-9)
    assert asked.share == pytest.approx(one.share, abs=0.01)


def test_nothing_is_left_out_at_the_whole_budget() -> None:
    scores = torch.randn(4, 50)
    units = Units(curves(scores, scores.clamp(min=0)), 8)
    settled = Market([LayerUnits(units, None, {})]).at_share(1.0)
    assert (settled.share, settled.cost) == (1.0, 0.0)
    assert bool(torch.isneginf(units.settled(settled.prices[0])[0]).all())


def test_columns_by_histogram() -> None:
    """Against thresholds on the numbers themselves."""
    draws = torch.Generator().manual_seed(2)
    x = torch.randn(500, 20, generator=draws) * torch.logspace(-2, 1, 20)
    matters = torch.rand(20, generator=draws)
    histogram = Histogram.empty()
    for part in x.split(100):
        histogram.add(part, matters, 6)
    from rewright.passes.dejavu_predictor_train.budget import Columns

    columns = Columns(histogram, 20, 6)
    costs = 0.5 * matters * x.square()
    settled = Market([LayerUnits(None, None, {"attn_in": columns})]).at_share(0.5)
    kept = costs / 6 > settled.prices[0]
    assert float(kept.float().mean()) == pytest.approx(0.5, abs=0.01)
    assert float((costs * ~kept).sum(1).mean()) == pytest.approx(settled.cost, rel=0.05)


@pytest.mark.parametrize("weighted", [False, True], ids=["svd", "rrr"])
def test_a_predictor_of_full_rank_is_exact(weighted: bool) -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draws) @ torch.randn(6, 6, generator=draws) + 2
    weight, bias = torch.randn(9, 6, generator=draws), torch.randn(9, generator=draws)
    found = fit(moments(x), weight, bias, torch.rand(9) if weighted else None, 6)
    torch.testing.assert_close(found.scores(x), x @ weight.t() + bias, rtol=1e-3, atol=1e-3)


def test_no_other_predictor_of_that_rank_errs_less() -> None:
    """Neither the unweighted one, nor those next to it."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(500, 8, generator=draws) @ torch.randn(8, 8, generator=draws) + torch.randn(8, generator=draws)
    weight, bias = torch.randn(12, 8, generator=draws), torch.randn(12, generator=draws)
    importance = torch.logspace(-1, 1, 12)
    whole = x @ weight.t() + bias

    def error(found: Factors) -> float:
        return float((importance * (found.scores(x) - whole).square()).mean())

    best = fit(moments(x), weight, bias, importance, 3)
    least = error(best)
    assert least < error(fit(moments(x), weight, bias, None, 3))
    for _ in range(20):
        moved = Factors(
            *(part + 0.01 * torch.randn(part.shape, generator=draws) for part in (best.a, best.a0, best.b, best.c))
        )
        assert least < error(moved)
    # components are in their order: the first of them are the best of that rank
    torch.testing.assert_close(best.cut(2).scores(x), fit(moments(x), weight, bias, importance, 2).scores(x))


def test_a_predictor_of_another_input() -> None:
    """What the MLP is fed is a linear function of what the predictor reads: nothing is lost by reading that."""
    draws = torch.Generator().manual_seed(5)
    x = torch.randn(300, 5, generator=draws) + 1
    turn = torch.randn(5, 5, generator=draws)
    y = x @ turn.t() + 0.3
    weight, bias = torch.randn(7, 5, generator=draws), torch.randn(7, generator=draws)
    wide = torch.cat([x.double(), torch.ones(300, 1, dtype=torch.float64)], dim=1)
    held = Moments(300, wide.t() @ wide, y.double().t() @ wide)
    found = fit(held, weight, bias, torch.ones(7), 5)
    torch.testing.assert_close(found.scores(x), y @ weight.t() + bias, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("dtype", "limit"), [("bf16", 0.01), ("int8", 0.02)])
def test_what_is_stored_computes_as_what_was_found(dtype: str, limit: float) -> None:
    draws = torch.Generator().manual_seed(0)
    found = Factors(*(torch.randn(shape, generator=draws) for shape in ((4, 16), (4,), (32, 4), (32,))))
    x = torch.randn(100, 16, generator=draws)
    spread = found.scores(x).std(0)
    made = settle(found, spread, dtype).factors.scores(x)
    expected = found.scores(x) / spread
    assert float((made - expected).square().mean().sqrt()) < limit
    assert store(torch.zeros(3, 4), dtype).value.eq(0).all()


def test_rows_together_lose_no_more_than_one() -> None:
    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(256, 40, generator=draws)
    costs = scores.clamp(min=0).square() + 0.01
    shifts = bucket_shifts(scores - 1, costs, (1, 2, 8), 0)
    assert shifts[0] == 0
    assert 0 > shifts[1] > shifts[2]


def test_values() -> None:
    assert str(Targets.parse("heads, mlp")) == "mlp,heads"
    assert Buckets.parse("8,2,2").rows == (1, 2, 8)
    assert Rank.parse("auto").count is None
    for kind, word in ((Targets, "mpl"), (Buckets, "0"), (Buckets, "32"), (Rank, "0"), (Rank, "many")):
        with pytest.raises(ValueError, match=word):
            kind.parse(word)


def test_steps_at_a_price() -> None:
    found = Curves(torch.tensor([[0.0, 1.0, 4.0]]), torch.tensor([[-1.0, 0.0, 2.0]]), torch.full((3,), 1 / 3))
    taken = found.taken(torch.tensor([1.0]))
    threshold, read, cost = found.at(taken)
    assert (int(taken), float(threshold)) == (2, 0.0)
    assert float(read) == pytest.approx(1 / 3)
    assert float(cost) == pytest.approx(1 / 3)
