"""Fits of recurrences to filters: what is met exactly, how near the others come, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes.errors import InputError
from rewright.passes.hyena_distill import fit as fit_module
from rewright.passes.hyena_distill.bound import bound
from rewright.passes.hyena_distill.fit import Method, error, fit
from rewright.passes.hyena_distill.gradient import FOUR, gradient
from rewright.passes.hyena_distill.modal import Modal, by_states
from rewright.passes.hyena_distill.orthogonal import convolved
from rewright.passes.hyena_distill.weighting import spectral_factor
from tests.passes import filter_suite as suite

METHODS: tuple[Method, ...] = ("closed-form", "gradient", "balanced", "modal")


def norms(filters: torch.Tensor) -> torch.Tensor:
    return filters[:, 1:].norm(dim=1)


def mean(errors: torch.Tensor) -> float:
    return float(errors.log().mean().exp())


def sound(modal: Modal, filters: torch.Tensor, order: int) -> None:
    """What every result keeps to."""
    assert modal.poles.shape == modal.residues.shape
    assert modal.poles.shape[0] == len(filters)
    assert bool((modal.poles.norm(dim=2) < 1).all())
    assert modal.poles.isfinite().all()
    assert modal.residues.isfinite().all()
    used = (modal.residues != 0).any(dim=2)
    assert modal.poles[~used].eq(0).all()
    assert torch.equal(modal.states, (used * torch.where(modal.poles[..., 1] != 0, 2, 1)).sum(dim=1))
    assert int(modal.states.max()) <= order
    assert torch.equal(modal.h0, filters[:, 0])


@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(0, 3), st.integers(-30, 30))
@settings(max_examples=6, deadline=None)
def test_a_recurrence_is_found_again(seed: int, pairs: int, reals: int, decade: int) -> None:
    order = max(1, 2 * pairs + reals)
    filters = suite.modal(seed, 120, pairs, reals, count=2) * 10.0**decade
    found = fit(filters, order)
    sound(found, filters, order)
    assert bool((error(filters, found) <= 1e-9 * norms(filters)).all())


def test_states_that_a_recurrence_does_not_have_change_nothing() -> None:
    order = 26
    filters = torch.cat([suite.modal(1, 300, 1, 1), suite.modal(2, 300, 0, 1), suite.modal(3, 300, 12, 0)])
    found = fit(filters, order)
    sound(found, filters, order)
    assert bool((error(filters, found) <= 1e-9 * norms(filters)).all())


@pytest.mark.parametrize("length", range(1, 10))
@pytest.mark.parametrize("horizon", ["window", "infinite"])
def test_filters_no_longer_than_the_order_are_met(length: int, horizon: fit_module.Horizon) -> None:
    filters = suite.noise(length, length, rate=0.0, count=4)
    filters[1] = 0
    found = fit(filters, 8, horizon=horizon)
    sound(found, filters, 8)
    assert found.states.tolist() == [length - 1, 0, length - 1, length - 1]
    if horizon == "window":
        assert torch.allclose(found.impulse(length), filters, atol=1e-12)


def test_constants_delays_and_nothing() -> None:
    filters = torch.zeros(4, 64, dtype=torch.float64)
    filters[0] = -3.0
    filters[1, 5] = 1.0
    filters[2, 0] = 1.0
    filters[3, 1] = 2.0
    found = fit(filters, 8)
    sound(found, filters, 8)
    assert found.states[2] == 0
    assert bool((error(filters, found) <= 1e-3 * torch.tensor([24.0, 1.0, 1.0, 2.0])).all())
    empty = fit(filters[:0], 8)
    assert empty.poles.shape == (0, 0, 2)
    assert empty.impulse(5).shape == (0, 5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_to_the_order_and_the_head(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "STEPS", 40)
    filters = torch.cat([suite.hyena(1, 160, count=2), suite.s4d(1, 160, states=16), torch.zeros(1, 160)])
    for head in (0, 7):
        found = fit(filters, 6, method=method, refine=5, fir_head=head)
        sound(found, filters, 6)
        assert torch.equal(found.fir, filters[:, 1 : 1 + head])
        assert torch.equal(found.impulse(1 + head), filters[:, : 1 + head])
        gap = (filters - found.impulse(160))[:, 1 + head :].norm(dim=1)
        assert torch.allclose(error(filters, found), gap)
        assert bool((bound(filters, [6], fir_head=head)[:, 0] <= gap).all())


def test_smooth_filters_are_met_to_many_digits() -> None:
    filters = suite.hyena(1, 8192, frequency=1.0)
    for order, most in ((8, 1e-6), (16, 1e-10)):
        assert mean(error(filters, fit(filters, order)) / norms(filters)) <= most


def test_rough_filters_come_near_the_bound() -> None:
    filters = torch.cat([suite.s4d(6, 512, count=2), suite.hyena(3, 512), suite.noise(1, 512)])
    found = fit(filters, 12, refine=20)
    assert mean(error(filters, found) / bound(filters, [12])[:, 0]) <= 1.7
    assert bool((error(filters, found) < 0.95 * error(filters, fit(filters, 12, method="balanced"))).all())


def test_no_gradient_fit_is_better() -> None:
    filters = torch.cat([suite.noise(1, 128), suite.hyena(2, 128), suite.s4d(3, 128)])
    unit = filters[:, 1:] / norms(filters)[:, None]
    descended = gradient(unit, 6, limit=512.0, seed=0, steps=200, begins=FOUR)
    assert bool((error(filters, fit(filters, 6)) / norms(filters) <= 1.01 * descended.errors).all())
    # and the other is a fit: what it says of itself is so, and it is better than nothing by far
    again = unit - descended.states.sum(descended.coefficients, 127)
    assert torch.allclose(again.norm(dim=1), descended.errors)
    assert bool((descended.errors < 0.9).all())


def test_more_steps_are_no_worse_and_equal_calls_give_equal_bytes() -> None:
    filters = suite.hyena(5, 200, count=3)
    steps = [error(filters, fit(filters, 6, refine=refine)) for refine in (0, 5, 30)]
    assert bool((steps[1] < steps[0]).all())
    assert bool((steps[2] <= steps[1] * (1 + 1e-3)).all())
    one, two = fit(filters, 6, refine=5, seed=3), fit(filters, 6, refine=5, seed=3)
    assert torch.equal(one.poles, two.poles)
    assert torch.equal(one.residues, two.residues)


def test_filters_are_fitted_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = torch.cat([suite.hyena(5, 150, count=2), torch.zeros(1, 150), suite.modal(1, 150, 2, 1)])
    together = fit(filters, 6, refine=5)
    monkeypatch.setattr(fit_module, "_SAMPLES", 150)
    apart = fit(filters, 6, refine=5)
    assert torch.allclose(error(filters, together), error(filters, apart), rtol=1e-6, atol=1e-12)
    assert torch.equal(together.states, apart.states)


def test_an_infinite_horizon_counts_what_comes_after() -> None:
    filters = suite.s4d(3, 100, states=16, count=2)
    longer = torch.nn.functional.pad(filters, (0, 20_000))
    window, infinite = fit(filters, 6, refine=10), fit(filters, 6, refine=10, horizon="infinite")
    sound(infinite, filters, 6)
    assert bool((error(longer, infinite) <= error(longer, window)).all())
    assert bool((error(filters, infinite) >= error(filters, window) * (1 - 1e-3)).all())


def test_weights_lower_the_weighted_error() -> None:
    filters = suite.hyena(4, 200, count=3)
    weights = torch.tensor([1.0, 0.9, 0.5], dtype=torch.float64)

    def weighted(modal: Modal) -> torch.Tensor:
        return convolved((filters - modal.impulse(200))[:, 1:], weights).norm(dim=1)

    plain, found = fit(filters, 6, refine=20), fit(filters, 6, refine=20, weighting=weights)
    sound(found, filters, 6)
    assert mean(weighted(found) / weighted(plain)) < 0.99
    rows = fit(filters, 6, refine=20, weighting=torch.stack([weights, weights * 2, weights * 3]))
    assert torch.allclose(weighted(rows), weighted(found), rtol=1e-2)


def test_a_spectral_factor_has_the_spectrum() -> None:
    response = torch.tensor([[1.0, 0.9, 0.5], [1.0, -0.2, 0.1]], dtype=torch.float64)
    power = torch.fft.rfft(response, 256).abs().square()
    found = spectral_factor(power, 16)
    scale = power.mean(dim=1, keepdim=True).sqrt()
    assert torch.allclose(found[:, :3] * scale, response, atol=1e-3)
    assert torch.allclose(found[:, 3:], torch.zeros(2, 13, dtype=torch.float64), atol=1e-3)


def test_states_of_a_result_are_its_columns() -> None:
    filters = torch.cat([suite.modal(1, 100, 2, 1), suite.modal(2, 100, 1, 0), torch.zeros(1, 100)])
    found = fit(filters, 5)
    groups = {tuple(chosen.tolist()): states for chosen, states in by_states(found)}
    assert set(groups) == {(0,), (1,)}
    assert groups[(0,)].pairs.tolist() == [2]
    poles = torch.view_as_complex(found.poles)[0]
    assert torch.allclose(groups[(0,)].poles()[0, ::2].abs().sort().values, poles.abs().sort().values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_filter_is_refused(value: float) -> None:
    filters = torch.ones(3, 40, dtype=torch.float64)
    filters[2, 7] = value
    with pytest.raises(InputError, match="filter 2 is not finite"):
        fit(filters, 4)


def test_arguments_that_mean_nothing_are_refused() -> None:
    filters = torch.ones(2, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match="filters must be"):
        fit(filters[0], 4)
    with pytest.raises(ValueError, match="order must be positive"):
        fit(filters, 0)
    with pytest.raises(ValueError, match="weighting must be"):
        fit(filters, 4, weighting=torch.ones(3, 5))
