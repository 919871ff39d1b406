"""What the ops that choose zeros, grids and codes promise besides numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.kernels.admm_step import admm_step
from rewright.kernels.clip_search import clip_search
from rewright.kernels.cross_update import cross_update
from rewright.kernels.descend import descend
from rewright.kernels.select import keep_largest, keep_of
from tests.kernels.solver_cases import CLIPS


def _problem(seed: int, r: int, width: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Rounded and pruned weights, the weights, and a Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width, width, generator=generator, dtype=dtype)
    inputs += torch.randn(2 * width, 1, generator=generator, dtype=dtype)
    weight = torch.randn(r, width, generator=generator, dtype=dtype)
    scale = weight.abs().amax(dim=1) / 7.5
    keep = torch.rand(r, width, generator=generator) > 0.4
    value = (weight / scale[:, None]).round().clamp(-8, 7) * scale[:, None] * keep
    hessian = inputs.t() @ inputs / (2 * width) + 0.01 * torch.eye(width, dtype=dtype)
    return {"weight": weight, "value": value, "scale": scale, "keep": keep, "hessian": hessian}


def _objective(value: torch.Tensor, problem: dict[str, Any]) -> torch.Tensor:
    gap = value.double() - problem["weight"].double()
    rises: torch.Tensor = ((gap @ problem["hessian"].double()) * gap).sum(dim=1)
    return rises


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 9), st.integers(1, 70), st.booleans(), st.booleans())
def test_descent_never_raises_the_objective_of_a_row(
    seed: int, r: int, width: int, masked: bool, on_grid: bool
) -> None:
    problem = _problem(seed, r, width)
    keep = problem["keep"] if masked else None
    gradient = (problem["value"] - problem["weight"]) @ problem["hessian"]
    scale = problem["scale"] if on_grid else None
    done = descend(problem["value"], gradient, problem["hessian"], scale, None, keep, low=-8, high=7)
    before, after = _objective(problem["value"], problem), _objective(done.dequantised, problem)
    assert (after <= before * (1 + 1e-12)).all()
    if masked:
        assert not done.dequantised[~problem["keep"]].any()
    if on_grid:
        assert torch.equal(done.codes * problem["scale"][:, None], done.dequantised)


def test_blocks_joined_by_the_callers_update_are_one_descent() -> None:
    problem = _problem(3, 40, 80)
    gradient = (problem["value"] - problem["weight"]) @ problem["hessian"]
    whole = descend(
        problem["value"], gradient, problem["hessian"], problem["scale"], None, problem["keep"], low=-8, high=7
    )
    before = problem["value"].clone()
    for start, stop in ((0, 32), (32, 80)):
        part = slice(start, stop)
        done = descend(
            problem["value"][:, part],
            gradient[:, part],
            problem["hessian"][part, part],
            problem["scale"],
            None,
            problem["keep"][:, part],
            low=-8,
            high=7,
        )
        gradient = gradient + (done.dequantised - problem["value"][:, part]) @ problem["hessian"][part]
        assert torch.equal(done.codes, whole.codes[:, part])
    assert torch.equal(problem["value"], before)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 200), st.integers(1, 6), st.data())
def test_the_count_of_the_largest_is_exact_and_ties_go_by_place(
    seed: int, count: int, levels: int, data: st.DataObject
) -> None:
    prune = data.draw(st.integers(0, count))
    score = torch.randint(0, levels, (count,), generator=torch.Generator().manual_seed(seed)).float() - 1
    keep = keep_largest(score, prune)
    order = sorted(range(count), key=lambda place: (float(score[place]), place))
    assert (~keep).nonzero().flatten().tolist() == sorted(order[:prune])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 5), st.integers(1, 4), st.integers(1, 40), st.data())
def test_the_count_in_every_pattern_is_exact(seed: int, r: int, patterns: int, of: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, of))
    score = torch.randint(0, 5, (r, patterns * of), generator=torch.Generator().manual_seed(seed)).float()
    found = keep_of(score, keep, of)
    assert (found.view(r, patterns, of).sum(dim=2) == keep).all()
    for row, kept in zip(score.view(-1, of), found.view(-1, of), strict=True):
        order = sorted(range(of), key=lambda place: (float(row[place]), place))
        assert (~kept).nonzero().flatten().tolist() == sorted(order[: of - keep])
    by_column = keep_of(score.t().contiguous().t(), keep, of)
    assert torch.equal(by_column, found)
    assert by_column.t().is_contiguous()


def _plain_choice(
    weight: torch.Tensor, keep: torch.Tensor | None, bits: int, symmetric: bool, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The search as one writes it first, a share after the other on (g, r) columns; float32."""
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    facts = torch.finfo(stored)
    least = facts.smallest_normal * (facts.eps if stored == torch.float16 else 1)
    kept = weight if keep is None else weight * keep
    low, high = kept.amin(dim=0).clamp(max=0), kept.amax(dim=0).clamp(min=0)
    best: tuple[torch.Tensor, ...] | None = None
    for share in CLIPS:
        a, b = low * share, high * share
        reach = torch.maximum(-a, b) * 2 if symmetric else b - a
        rounded = (reach / (last - first)).clamp(max=facts.max).to(stored).float().clamp(min=least)
        scale = torch.where(reach / (last - first) > 0, rounded, 1.0)
        zero = torch.zeros_like(a) if symmetric else (torch.round(-a / scale) + first).clamp(first, last)
        gap = ((weight / scale).round() + zero).clamp(first, last).sub(zero).mul(scale).sub(weight)
        if keep is not None:
            gap = gap * keep
        error = (gap * gap).sum(dim=0)
        if best is None:
            best = error, scale, zero
        else:
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))
    assert best is not None
    return best[1], best[2]


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_without_importance_the_search_is_the_plain_one_to_the_bit(
    bits: int, symmetric: bool, stored: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(bits)
    for size, rows in ((32, 288), (128, 4100), (17, 33)):
        weight = torch.randn(size, rows, generator=generator) / 16
        weight[:, ::9] = 0
        for keep in (None, torch.rand(size, rows, generator=generator) > 0.5):
            found = clip_search(
                weight.t(),
                None if keep is None else keep.t(),
                bits=bits,
                symmetric=symmetric,
                shares=CLIPS,
                stored=stored,
            )
            scale, zero = _plain_choice(weight, keep, bits, symmetric, stored)
            assert torch.equal(found.scale, scale)
            assert torch.equal(found.zero, zero)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 20), st.integers(1, 30), st.integers(1, 50), st.sampled_from((2, 3, 4, 8)), st.booleans())
def test_the_search_is_never_worse_than_the_full_range(
    seed: int, r: int, size: int, bits: int, symmetric: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(r, size, generator=generator)
    keep = torch.rand(r, size, generator=generator) > 0.3
    importance = torch.rand(size, generator=generator)

    def error(shares: tuple[float, ...]) -> torch.Tensor:
        grid = clip_search(
            weight, keep, importance, bits=bits, symmetric=symmetric, shares=shares, stored=torch.bfloat16
        )
        scale, zero = grid.scale.double()[:, None], grid.zero.double()[:, None]
        codes = ((weight.double() / scale).round() + zero).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return (((codes - zero) * scale - weight).square() * keep * importance).sum(dim=1)

    assert (error(CLIPS) <= error((1.0,)) * (1 + 1e-5)).all()


def test_the_mixed_moment_is_the_product_in_float64() -> None:
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(500, 37, generator=generator).to(dtype)
        right = torch.randn(500, 53, generator=generator).to(dtype)
        total = torch.zeros(37, 53)
        for part in (slice(0, 211), slice(211, 500)):
            cross_update(total, left[part], right[part], 0.5)
        truth = 0.5 * left.double().t() @ right.double()
        bound = 500 * torch.finfo(torch.float32).eps * (left.double().abs().t() @ right.double().abs())
        assert ((total - truth).abs() <= bound).all()


def test_a_step_parts_the_sum_between_weights_and_dual() -> None:
    generator = torch.Generator().manual_seed(2)
    target, weight, dual = torch.randn(3, 9, 14, generator=generator).unbind(0)
    keep = torch.rand(9, 14, generator=generator) > 0.5
    before = weight.clone()
    after = dual.clone()
    rhs = admm_step(target, weight, after, keep)
    assert torch.equal(after, torch.where(keep, 0.0, weight + dual))
    assert torch.equal(rhs, torch.where(keep, target + (weight + dual), target - (weight + dual)))
    assert torch.equal(weight, before)


_FLOATS = torch.zeros(4, 6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: descend(_FLOATS.int(), _FLOATS, torch.eye(6), low=-8, high=7),
        lambda: descend(_FLOATS, _FLOATS, torch.eye(5), low=-8, high=7),
        lambda: descend(_FLOATS, _FLOATS[:, :5], torch.eye(6), low=-8, high=7),
        lambda: descend(_FLOATS, _FLOATS, torch.eye(6), torch.ones(3), low=-8, high=7),
        lambda: descend(_FLOATS, _FLOATS, torch.eye(6), keep=_FLOATS, low=-8, high=7),
        lambda: descend(_FLOATS, _FLOATS, torch.eye(6), low=0, high=255),
        lambda: clip_search(_FLOATS[0], bits=4, symmetric=True, shares=(1.0,), stored=torch.float16),
        lambda: clip_search(_FLOATS, _FLOATS, bits=4, symmetric=True, shares=(1.0,), stored=torch.float16),
        lambda: clip_search(_FLOATS, None, torch.ones(4), bits=4, symmetric=True, shares=(1.0,), stored=torch.float16),
        lambda: clip_search(_FLOATS, bits=9, symmetric=True, shares=(1.0,), stored=torch.float16),
        lambda: clip_search(_FLOATS, bits=4, symmetric=True, shares=(), stored=torch.float16),
        lambda: clip_search(_FLOATS, bits=4, symmetric=True, shares=(1.0,), stored=torch.float64),
        lambda: keep_largest(_FLOATS.int(), 1),
        lambda: keep_largest(_FLOATS, 25),
        lambda: keep_of(_FLOATS[0], 1, 2),
        lambda: keep_of(_FLOATS, 1, 4),
        lambda: keep_of(_FLOATS, 3, 2),
        lambda: cross_update(torch.zeros(6, 5), _FLOATS, _FLOATS, 1.0),
        lambda: cross_update(torch.zeros(6, 6), _FLOATS, _FLOATS[:3], 1.0),
        lambda: cross_update(torch.zeros(6, 6).half(), _FLOATS, _FLOATS, 1.0),
        lambda: admm_step(_FLOATS, _FLOATS, _FLOATS[:3], _FLOATS > 0),
        lambda: admm_step(_FLOATS, _FLOATS.double(), _FLOATS, _FLOATS > 0),
        lambda: admm_step(_FLOATS, _FLOATS, _FLOATS, _FLOATS),
    ],
)
def test_other_inputs_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"must|cannot be"):
        call()
