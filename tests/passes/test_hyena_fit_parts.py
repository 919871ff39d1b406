"""The parts of a fit, each against its own mathematics written out."""

from __future__ import annotations

import math

import pytest
import torch

from rewright.kernels.modal_fit_step import modal_fit_step
from rewright.passes.hyena_distill import normal
from rewright.passes.hyena_distill.balanced import balanced
from rewright.passes.hyena_distill.exchange import exchange
from rewright.passes.hyena_distill.interpolate import interpolate
from rewright.passes.hyena_distill.modal import Modal
from rewright.passes.hyena_distill.orthogonal import Factor, convolved, factor
from rewright.passes.hyena_distill.polish import Polished, polish
from rewright.passes.hyena_distill.residues import residues, solve
from rewright.passes.hyena_distill.rules import Rules
from rewright.passes.hyena_distill.states import States, from_poles
from rewright.passes.hyena_distill.truncate import solved, truncate
from tests.passes import filter_suite as suite


def some_states() -> States:
    """Two filters of five states: two pairs and a real pole, and one pair and three real poles, one negative."""
    first = [0.9 * cmath(0.4), 0.5 * cmath(2.0)]
    second = [0.95 * cmath(1.0)]
    poles = torch.tensor(
        [
            [first[0], first[0].conjugate(), 0.7, first[1], first[1].conjugate()],
            [0.97, second[0].conjugate(), -0.6, second[0], 0.2],
        ],
        dtype=torch.complex128,
    )
    return from_poles(poles, math.inf)


def cmath(angle: float) -> complex:
    return complex(math.cos(angle), math.sin(angle))


def written_out(states: States, length: int) -> torch.Tensor:
    """The columns and their slopes [C, length, 2 d] by powers of each pole."""
    time = torch.arange(length, dtype=torch.float64)
    rows = []
    for poles, kinds in zip(states.poles(), states.kinds(), strict=True):
        columns = []
        for pole, kind in zip(poles.tolist(), kinds.tolist(), strict=True):
            powers = torch.tensor([pole**step for step in range(length)], dtype=torch.complex128)
            # the second column of a pair is that of the conjugate's pole: -Im p^t = Im p̄^t
            columns.append(powers.imag if kind == 2 else powers.real)
        values = torch.stack(columns, dim=1)
        rows.append(torch.cat([values, values * (time / length)[:, None]], dim=1))
    return torch.stack(rows)


def test_states_are_the_poles_in_pairs() -> None:
    states = some_states()
    assert states.pairs.tolist() == [2, 1]
    assert states.kinds().tolist() == [[1, 2, 1, 2, 0], [1, 2, 0, 0, 0]]
    assert states.partners().tolist() == [[1, 0, 3, 2, 4], [1, 0, 2, 3, 4]]
    assert sorted(states.poles()[1].real.tolist()) == pytest.approx(
        sorted([0.97, -0.6, 0.2, *[0.95 * math.cos(1.0)] * 2])
    )
    coefficients = suite.noise(1, 5, rate=0.0, count=2)
    whole = (written_out(states, 40)[:, :, :5] @ coefficients[:, :, None])[:, :, 0]
    assert torch.allclose(states.sum(coefficients, 40), whole, atol=1e-13)


def test_poles_outside_come_in_and_slow_ones_end() -> None:
    states = from_poles(torch.tensor([[1.25, 1.0, -0.5]], dtype=torch.complex128), 100.0)
    assert states.decay[0].tolist() == pytest.approx([math.log(1.25), 0.01, math.log(2)])
    assert states.poles()[0].abs().max() < 1


@pytest.mark.parametrize("length", [7, 63, 64, 130, 131, 500, 1023])
@pytest.mark.parametrize("slopes", [False, True])
def test_the_factor_is_that_of_the_whole_basis(length: int, slopes: bool) -> None:
    states, samples = some_states(), suite.noise(2, length, rate=1.0, count=2)
    basis = written_out(states, length)
    if not slopes:
        basis = basis[:, :, :5]
    found = factor(states, samples, slopes=slopes)
    assert torch.allclose(found.triangle.transpose(1, 2) @ found.triangle, basis.transpose(1, 2) @ basis, atol=1e-11)
    products = basis.transpose(1, 2) @ samples[:, :, None]
    assert torch.allclose(found.triangle.transpose(1, 2) @ found.inside[:, :, None], products, atol=1e-11)
    whole = torch.hypot(found.inside.norm(dim=1), found.outside)
    assert torch.allclose(whole, samples.norm(dim=1))


def test_the_factor_of_a_longer_horizon_and_of_a_weighted_norm() -> None:
    states, samples = some_states(), suite.noise(2, 75, rate=1.0, count=2)
    found = factor(states, samples, Rules(horizon=300), slopes=True)
    longer = torch.cat([states.sum(row.expand(2, -1), 300)[:, :, None] for row in torch.eye(5).double()], dim=2)
    # slopes are in units of the window
    longer = torch.cat([longer, longer * (torch.arange(300, dtype=torch.float64) / 75)[:, None]], dim=2)
    assert torch.allclose(found.triangle.transpose(1, 2) @ found.triangle, longer.transpose(1, 2) @ longer, atol=1e-10)
    weights = torch.tensor([[1.0, -0.5, 0.25], [2.0, 1.0, 0.0]], dtype=torch.float64)
    found = factor(states, samples, Rules(weighting=weights), slopes=False)
    basis = convolved(written_out(states, 75)[:, :, :5].transpose(1, 2), weights[:, None]).transpose(1, 2)
    assert torch.allclose(found.triangle.transpose(1, 2) @ found.triangle, basis.transpose(1, 2) @ basis, atol=1e-11)
    known = torch.nn.functional.conv1d(samples[:1, None], weights[:1].flip(1)[:, None], padding=2)[0, :, :75]
    assert torch.allclose(convolved(samples, weights)[:1], known, atol=1e-12)


def test_normal_equations_are_those_of_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normal, "WORTH", 0)
    samples = suite.noise(2, 200, rate=1.0, count=3)
    samples = samples / samples.norm(dim=1, keepdim=True)
    two = some_states()
    # the third has two poles that no Gram matrix tells apart, the second errs too little
    near = from_poles(torch.tensor([[0.9, 0.9000001, 0.5, 0.3, 0.1]], dtype=torch.complex128), math.inf)
    states = States(*(torch.cat([getattr(two, part), getattr(near, part)]) for part in ("decay", "angle", "pairs")))
    calls = []

    def counted(states: States, samples: torch.Tensor, rules: Rules, *, slopes: bool) -> Factor:
        calls.append(len(samples))
        return factor(states, samples, rules, slopes=slopes)

    monkeypatch.setattr(normal, "factor", counted)
    found = normal.quick(states, samples, Rules(), torch.tensor([0.5, 1e-6, 0.5], dtype=torch.float64))
    assert calls == [2]
    exact = factor(states, samples, Rules(), slopes=True)
    for one in (found, exact):
        assert one.triangle.shape == (3, 10, 10)
    squares = [one.triangle.transpose(1, 2) @ one.triangle for one in (found, exact)]
    assert torch.allclose(*squares, atol=1e-11)
    for order in (5, 10):
        solutions = [solve(one, order) for one in (found, exact)]
        assert torch.allclose(solutions[0][0][:2], solutions[1][0][:2], rtol=1e-6)
        assert torch.allclose(solutions[0][1], solutions[1][1], rtol=1e-9)


def test_residues_are_least_squares_and_mind_rounding() -> None:
    states, samples = some_states(), suite.noise(2, 90, rate=1.0, count=2)
    coefficients, errors = residues(states, samples)
    basis = written_out(states, 90)[:, :, :5]
    known = torch.linalg.lstsq(basis, samples[:, :, None]).solution
    assert torch.allclose(coefficients, known[:, :, 0], atol=1e-10)
    assert torch.allclose(errors, (samples - (basis @ known)[:, :, 0]).norm(dim=1))
    near = from_poles(torch.tensor([[0.9, 0.9000001, 0.5]], dtype=torch.complex128), math.inf)
    exact, rough = (residues(near, samples[:1], Rules(noise=noise))[0].abs().max() for noise in (1e-15, 1e-3))
    assert exact > 100 * rough


def test_a_polished_fit_is_stationary_and_no_worse() -> None:
    samples = suite.noise(3, 120, rate=3.0, count=2)
    samples = samples / samples.norm(dim=1, keepdim=True)
    states = some_states()
    begun = residues(states, samples)[1]
    found = polish(states, samples, 200, Rules(limit=480.0))
    assert bool((found.errors < begun).all())
    assert torch.allclose((samples - states_sum(found, 120)).norm(dim=1), found.errors)
    inner = found.states.decay > 1.01 / 480.0
    logs = torch.stack([-found.states.decay, found.states.angle], dim=-1)
    kinds = found.states.kinds()
    planes = torch.stack(
        [torch.where(kinds == 2, 0.0, found.coefficients), torch.where(kinds == 2, found.coefficients, 0.0)], dim=-1
    )
    slopes = modal_fit_step(samples, logs, planes)[1]
    # both columns of a pair move together; a real pole has no angle to turn
    together = slopes + torch.where((kinds > 0)[..., None], slopes.gather(1, twice(found.states.partners())), 0.0)
    scale = torch.stack([found.states.decay, torch.where(kinds > 0, found.states.decay, 0.0)], dim=-1)
    assert float((together * scale)[inner].abs().max()) < 1e-4


def states_sum(found: Polished, length: int) -> torch.Tensor:
    return found.states.sum(found.coefficients, length)


def twice(index: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(-1, -1, 2)


def test_the_fixed_point_matches_value_and_slope_at_its_poles() -> None:
    samples = suite.s4d(5, 4000, states=12)[:, 1:]
    samples = samples / samples.norm()
    states = from_poles(torch.tensor([[0.9, 0.8, 0.7, 0.6]], dtype=torch.complex128), 1e5)
    begun = interpolate(states, samples, 0, Rules(1e5))
    found = interpolate(states, samples, 120, Rules(1e5))
    assert float(found.errors) < float(begun.errors)
    gap = samples - states_sum(found, samples.shape[1])
    time = torch.arange(samples.shape[1])
    for pole in found.states.poles()[0]:
        powers = pole**time
        norm = float(powers.abs().norm())
        assert float((gap[0] * powers).sum().abs()) < 1e-4 * norm
        assert float((gap[0] * powers * time).sum().abs()) < 1e-3 * float((time * powers.abs()).norm())


def test_exchanged_poles_leave_no_minimum_for_a_worse_one() -> None:
    samples = suite.noise(5, 150, rate=3.0, count=4)
    samples = samples / samples.norm(dim=1, keepdim=True)
    rules = Rules(limit=600.0)
    poor = from_poles(torch.tensor([0.9, 0.8, 0.7, 0.6], dtype=torch.complex128).expand(4, -1), rules.limit)
    begun = polish(poor, samples, 30, rules)
    found = exchange(begun, samples, 3, 15, rules)
    assert bool((found.errors <= begun.errors).all())
    assert float((found.errors / begun.errors).min()) < 0.99
    assert found.states.order == 4
    assert torch.allclose((samples - states_sum(found, 150)).norm(dim=1), found.errors)


def test_balanced_truncation_is_that_of_the_grammians() -> None:
    """A decayed system of four states, reduced by the square root method from its two Gramians."""
    whole = suite.modal(12, 1500, 1, 2)
    samples = whole[:, 1:]
    size = 700
    place = torch.arange(size)
    S = samples[0][place[:, None] + place]
    U, sigma, V = torch.linalg.svd(S)
    root = sigma[:2].sqrt()
    observe, reach = U[:, :2] * root, V[:2] * root[:, None]
    A = torch.linalg.lstsq(observe[:-1], observe[1:]).solution
    steps = [observe[0] @ torch.linalg.matrix_power(A, step) @ reach[:, 0] for step in range(60)]
    found = balanced(samples, 2, limit=1e6, seed=0)
    assert torch.allclose(states_sum(found, 60)[0], torch.stack(steps), atol=1e-8)


def test_truncation_keeps_what_adds_most_and_solves_for_the_rest() -> None:
    poles = torch.tensor([[[0.9, 0.0], [0.5, 0.5], [0.99, 0.0], [0.3, 0.0]]], dtype=torch.float64)
    weights = torch.tensor([[[1.0, 0.0], [0.1, 0.1], [0.5, 0.0], [0.01, 0.0]]], dtype=torch.float64)
    nothing = torch.zeros(1, 0, dtype=torch.float64)
    modal = Modal(poles, weights, torch.ones(1, dtype=torch.float64), nothing, torch.tensor([5]))
    kept = truncate(modal, 3)
    assert kept.poles[0, :, 0].tolist() == [0.99, 0.9, 0.3]
    assert kept.residues[0, :, 0].tolist() == [0.5, 1.0, 0.01]
    assert kept.states.tolist() == [3]
    assert truncate(modal, 4).poles[0, :, 0].tolist() == [0.99, 0.9, 0.5]
    filters = modal.impulse(200)
    better = solved(kept, filters, Rules())
    assert sorted(better.poles[0, :, 0].tolist()) == pytest.approx([0.3, 0.9, 0.99])
    assert (filters - better.impulse(200)).norm() < (filters - kept.impulse(200)).norm()
