"""The lower bound on what a recurrence can reach, and the eigenpairs behind it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes.hyena_distill import hankel
from rewright.passes.hyena_distill.bound import bound, half, minimum_order, weights
from rewright.passes.hyena_distill.fit import error, fit
from rewright.passes.hyena_distill.hankel import Hankel, leading
from tests.passes import filter_suite as suite


def written_out(filters: torch.Tensor, order: int) -> torch.Tensor:
    """The bound by its definition: a singular value decomposition of D S D entry by entry."""
    samples = filters[:, 1:]
    size = half(samples.shape[1])
    place = torch.arange(size)
    scale = weights(size)
    matrix = samples[:, place[:, None] + place] * scale[:, None] * scale
    return torch.linalg.svdvals(matrix)[:, order:].square().sum(dim=1).sqrt()


def test_weights_convolve_to_ones() -> None:
    square = weights(50).square()
    whole = [sum(float(square[i] * square[k - i]) for i in range(k + 1)) for k in range(50)]
    assert whole == pytest.approx([1.0] * 50, abs=1e-12)


@pytest.mark.parametrize("length", [2, 3, 40, 41, 150, 601])
@pytest.mark.parametrize("order", [1, 2, 6])
def test_the_bound_is_its_definition(length: int, order: int) -> None:
    filters = suite.noise(length, length, rate=3.0, count=3)
    found = bound(filters, [order])[:, 0]
    assert torch.allclose(found, written_out(filters, order), rtol=1e-6, atol=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 9), st.sampled_from(["noise", "hyena", "modal"]), st.integers(10, 60))
@settings(max_examples=10, deadline=None)
def test_no_fit_goes_below_the_bound(seed: int, order: int, kind: str, length: int) -> None:
    make = {
        "noise": lambda: suite.noise(seed, length, rate=2.0, count=2),
        "hyena": lambda: suite.hyena(seed, length, frequency=3.0, count=2),
        "modal": lambda: suite.modal(seed, length, order // 2, order % 2, count=2),
    }
    filters = make[kind]()
    found = fit(filters, order, refine=4)
    assert bool((bound(filters, [order])[:, 0] <= error(filters, found)).all())


@pytest.mark.parametrize("scale", [1e-150, 1.0, 1e150])
def test_what_a_recurrence_is_has_no_bound(scale: float) -> None:
    filters = suite.modal(3, 420, 4, 1, count=4) * scale
    assert bound(filters, [9, 10, 210]).eq(0).all()
    assert bound(filters, [8]).gt(0).all()


def test_smooth_filters_are_bounded_below_the_root_of_the_precision() -> None:
    filters = suite.hyena(100, 2048, frequency=1.0, count=2)
    found = bound(filters, [12])[:, 0] / filters[:, 1:].norm(dim=1)
    assert bool((found < 1e-9).all())
    assert bool((found > 0).all())


def test_nothing_is_promised_of_nothing() -> None:
    assert bound(torch.zeros(2, 50, dtype=torch.float64), [2, 4]).eq(0).all()
    assert bound(torch.ones(2, 1, dtype=torch.float64), [2]).eq(0).all()
    assert bound(torch.ones(0, 30, dtype=torch.float64), [2, 4]).shape == (0, 2)
    # what is in a head of exact taps needs no state
    filters = torch.zeros(1, 60, dtype=torch.float64)
    filters[0, 5] = 1
    assert bound(filters, [2])[0, 0] > 0.1
    assert bound(filters, [2], fir_head=5)[0, 0] == 0


@pytest.mark.parametrize("kind", ["noise", "smooth", "delay"])
def test_lanczos_finds_what_a_dense_decomposition_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = suite.noise(4, 501, count=3)
    if kind == "smooth":
        samples = suite.hyena(4, 501, frequency=1.0, count=3)
    if kind == "delay":
        # eigenvalues of 1 and -1, forty of each
        samples = torch.zeros(3, 501, dtype=torch.float64)
        samples[:, 79] = 1
    matrix = Hankel(samples, 251)
    monkeypatch.setattr(hankel, "DENSE", 0)
    found = leading(matrix, 12)
    values = torch.linalg.eigvalsh(matrix.dense())
    known = values.abs().sort(dim=1, descending=True).values[:, :12]
    assert torch.allclose(found.values.abs(), known, atol=1e-9 * float(known.max()))
    eye = torch.eye(12, dtype=torch.float64).expand(3, -1, -1)
    assert torch.allclose(found.vectors.transpose(1, 2) @ found.vectors, eye, atol=1e-10)
    gap = matrix.dense() @ found.vectors - found.vectors * found.values[:, None]
    assert float(gap.norm(dim=1).max()) < 1e-8 * float(known.max())


def test_products_and_squares_are_those_of_the_dense_matrix() -> None:
    samples = suite.noise(6, 33, rate=1.0, count=2)
    for size, scale in ((17, None), (17, weights(17)), (33, None)):
        matrix = Hankel(samples, size, scale)
        vectors = suite.noise(7, size, rate=0.0, count=2)
        whole = (matrix.dense() @ vectors[:, :, None])[:, :, 0]
        assert torch.allclose(matrix.product(vectors), whole, atol=1e-13)
        assert torch.allclose(matrix.square(), matrix.dense().square().sum(dim=(1, 2)))


def test_the_smallest_order_that_is_allowed() -> None:
    bounds = torch.tensor([[0.5, 0.2, 0.0], [0.9, 0.8, 0.7]], dtype=torch.float64)
    allowed = torch.tensor([0.3, 0.1], dtype=torch.float64)
    assert minimum_order(bounds, [2, 4, 8], allowed).tolist() == [4, -1]
