"""The sweep against its own mathematics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.kernels.select import keep_largest
from rewright.passes.compress import grid, hessian, mask, solve
from rewright.passes.errors import BoundError
from rewright.passes.values import Bits, GroupSize, Pattern
from tests.passes.problems import damped, decoded, matrices, options, problem

CASES = [
    {"bits": Bits(4), "group_size": GroupSize(16)},
    {"bits": Bits(3), "group_size": GroupSize(None)},
    {"bits": Bits(2), "group_size": GroupSize(8), "symmetric": False},
    {"bits": Bits(4), "group_size": GroupSize(16), "sparsity": 0.5},
    {"bits": Bits(4), "group_size": GroupSize(48), "sparsity": 0.3, "mask_block": 32},
    {"bits": Bits(4), "group_size": GroupSize(12), "sparsity": 0.5, "mask_block": 32},
    {"bits": Bits(16), "sparsity": 0.6},
    {"bits": Bits(4), "group_size": GroupSize(16), "pattern": Pattern(2, 4), "symmetric": False},
    {"bits": Bits(8), "group_size": GroupSize(6), "pattern": Pattern(4, 8), "clip": "minmax"},
    {"bits": Bits(3), "group_size": GroupSize(16), "pattern": Pattern(8, 16), "saliency": "quant-aware", "clip": "mse"},
    {"bits": Bits(4), "group_size": GroupSize(48), "sparsity": 0.5, "mask_block": 20, "saliency": "quant-aware"},
]


@pytest.mark.parametrize("said", CASES, ids=str)
def test_loss_is_the_quadratic_form_of_the_error(said: dict[str, object]) -> None:
    """Feedback conserves it: the sum of e^2 over the columns is tr (W - Q) H (W - Q)^T for the damped H."""
    asked = options(**said)
    weight, own = problem(40, 48)
    upper = hessian.factorise(own, 0.01, "w").upper
    solved = solve.sweep(weight, upper, matrices(asked, 24, 16), asked, torch.bfloat16, importance=own.diagonal())
    gap = (weight - solved.weight).double()
    whole = (gap @ damped(own, 0.01).double() * gap).sum(dim=1)
    assert solved.loss is not None
    assert torch.allclose(2 * solved.loss.double(), whole, rtol=2e-3)
    if solved.codes is not None:
        assert torch.equal(decoded(solved, 48), solved.weight)


@pytest.mark.parametrize("said", [case for case in CASES if "sparsity" in case or "pattern" in case], ids=str)
def test_every_matrix_has_its_own_exact_count(said: dict[str, object]) -> None:
    weight, own = problem(40, 48)
    asked = options(**{**said, "bits": Bits(16)})
    upper = hessian.factorise(own, 0.01, "w").upper
    solved = solve.sweep(weight, upper, matrices(asked, 24, 16), asked, torch.bfloat16)
    assert solved.keep is not None
    assert torch.equal(solved.keep, solved.weight != 0)
    for first, rows in ((0, 24), (24, 16)):
        assert int((solved.weight[first : first + rows] == 0).sum()) == round(rows * 48 * asked.zeros)


def test_stacked_matrices_are_solved_as_if_alone() -> None:
    weight, own = problem(40, 48)
    upper = hessian.factorise(own, 0.01, "w").upper
    asked = options(bits=Bits(4), group_size=GroupSize(16), sparsity=0.5)
    both = matrices(asked, 24, 16)
    together = solve.sweep(weight, upper, both, asked, torch.bfloat16)
    alone = solve.sweep(weight[24:], upper, both[1:], asked, torch.bfloat16)
    agreed = (together.rows(24, 40).codes == alone.codes).float().mean()  # type: ignore[union-attr]
    assert float(agreed) > 0.99


def plain_sweep(
    weight: torch.Tensor, upper: torch.Tensor, group: int, bits: int, block: int, zeros: float
) -> torch.Tensor:
    """The textbook loop in float64: every column updates every later one."""
    left, upper = weight.double().clone(), upper.double()
    rows, columns = left.shape
    result = torch.zeros_like(left)
    low, high = grid.code_range(bits)
    keep = torch.ones_like(left, dtype=torch.bool)
    scale = torch.ones(rows, dtype=torch.float64)
    for j in range(columns):
        if zeros and j % block == 0:
            end = min(columns, j + block)
            score = (left[:, j:end] / upper.diagonal()[j:end]) ** 2
            order = score.flatten().argsort(stable=True)
            gone = order[: round(rows * end * zeros) - round(rows * j * zeros)]
            keep[:, j:end] = torch.ones(score.numel(), dtype=torch.bool).scatter(0, gone, False).view(score.shape)
        if j % group == 0:
            part = slice(j, j + group)
            kept = (left[:, part] * keep[:, part]).abs().amax(dim=1)
            scale = (kept * 2 / ((1 << bits) - 1)).bfloat16().double()
            scale[kept == 0] = 1
        wanted = left[:, j] * keep[:, j]
        result[:, j] = torch.round(wanted / scale).clamp(low, high) * scale
        error = (left[:, j] - result[:, j]) / upper[j, j]
        left[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return result


@pytest.mark.parametrize(("group", "zeros"), [(16, 0.0), (16, 0.5), (32, 0.25), (8, 0.5)])
def test_sweep_equals_the_textbook_loop(group: int, zeros: float) -> None:
    weight, own = problem(32, 64, seed=1)
    upper = hessian.factorise(own, 0.01, "w").upper
    said = {"sparsity": zeros, "mask_block": 32} if zeros else {}
    asked = options(group_size=GroupSize(group), clip="minmax", **said)
    ours = solve.sweep(weight, upper, matrices(asked, 32, columns=64), asked, torch.bfloat16).weight
    expected = plain_sweep(weight, upper, group, 4, 32, zeros).float()
    assert float((ours == expected).float().mean()) > 0.995


def test_a_group_across_a_block_has_its_scale_from_corrected_weights() -> None:
    """With M no part of the group a group begins in one block and ends in the next."""
    weight, own = problem(32, 48, seed=2)
    upper = hessian.factorise(own, 0.01, "w").upper
    asked = options(group_size=GroupSize(12), clip="minmax", pattern=Pattern(4, 8), mask_block=8)
    ours = solve.sweep(weight, upper, matrices(asked, 32), asked, torch.bfloat16)
    left, scale = weight.clone(), torch.ones(32)
    for j in range(48):
        if j % 12 == 0:
            scale = (left[:, j : j + 12].abs().amax(1) * 2 / 15).bfloat16().float()
            if j == 12:
                # columns 12 to 15 have their zeros by now, which the scale does not count on
                assert torch.allclose(ours.scale[:, 1].float(), scale)  # type: ignore[index]
                break
        left[:, j + 1 :] -= ((weight_of(left, ours, j) / upper[j, j])[:, None]) * upper[j, j + 1 :]


def weight_of(left: torch.Tensor, solved: solve.Solved, j: int) -> torch.Tensor:
    """What column j lost, as the sweep saw it."""
    return left[:, j] - solved.weight[:, j]


def relative_error(weight: torch.Tensor, result: torch.Tensor, own: torch.Tensor) -> float:
    """|W X - Q X|^2 / |W X|^2 from H = X X^T."""
    return hessian.quadratic(weight - result, own) / hessian.quadratic(weight, own)


def test_feedback_wins() -> None:
    weight, own = problem(64, 96)
    upper = hessian.factorise(own, 0.01, "w").upper
    for said in ({"bits": 4}, {"bits": 3}, {"bits": 4, "sparsity": 0.5}, {"bits": 16, "sparsity": 0.5}):
        asked = options(**{**said, "bits": Bits(said["bits"])}, group_size=GroupSize(16))
        (matrix,) = matrices(asked, 64, columns=96)
        swept = solve.sweep(weight, upper, [matrix], asked, torch.bfloat16, importance=own.diagonal())
        rounded = solve.round_nearest(weight, matrix, None, asked, torch.bfloat16)
        ours, theirs = (relative_error(weight, found.weight, own) for found in (swept, rounded))
        assert ours < 0.8 * theirs


def test_given_zeros_are_kept_and_known_to_the_grid() -> None:
    weight, own = problem(40, 48, seed=3)
    upper = hessian.factorise(own, 0.01, "w").upper
    kept = torch.rand(40, 48, generator=torch.Generator().manual_seed(1)) < 0.5
    # what is to go is so large that a grid which counts on it would have no codes for the rest
    weight = torch.where(kept, weight, 100.0)
    asked = options(group_size=GroupSize(16), sparsity=0.5)
    for clip in ("minmax", "hdiag"):
        said = replace(asked, clip=clip)
        solved = solve.sweep(
            weight * kept, upper, matrices(said, 40), said, torch.bfloat16, importance=own.diagonal(), kept=kept
        )
        assert solved.keep is not None
        assert torch.equal(solved.keep, kept)
        assert bool((solved.weight[~kept] == 0).all())
        assert solved.scale is not None
        assert float(solved.scale.max()) < 1


def test_quant_aware_saliency_takes_what_rounding_loses_anyway() -> None:
    """Of two weights of nearly equal size the one goes that a coarse grid would round to zero."""
    upper = hessian.factorise(torch.eye(4), 0.0, "w").upper
    # grids of 1 and of 0.1: 0.45 rounds to 0 in the first row, 0.4 has a code of its own in the second
    weight = torch.tensor([[7.5, 7.0, 0.45, 6.0], [0.75, 0.7, 0.4, 0.6]])
    asked = options(group_size=GroupSize(4), clip="minmax", sparsity=0.125, mask="sweep")
    for saliency, gone in (("obs", (1, 2)), ("quant-aware", (0, 2))):
        said = replace(asked, saliency=saliency)
        solved = solve.sweep(weight, upper, matrices(said, 2, columns=4), said, torch.bfloat16)
        assert solved.keep is not None
        assert (~solved.keep).nonzero().tolist() == [list(gone)]


def test_no_factor_at_any_damping() -> None:
    broken = -torch.eye(4)
    with pytest.raises(BoundError, match="the Hessian of `w` has no factor"):
        hessian.factorise(broken, 0.01, "w")
    singular = torch.ones(4, 4)
    found = hessian.factorise(singular, 0.0, "w")
    assert found.damp > 0
    inverse = found.upper.T @ found.upper
    assert torch.allclose(inverse @ damped(singular, found.damp), torch.eye(4), atol=1e-2)


def test_inputs_that_never_came_leave_their_column_alone() -> None:
    weight, own = problem(16, 24)
    own[5], own[:, 5] = 0, 0
    upper = hessian.factorise(own, 0.01, "w").upper
    asked = options(bits=Bits(8), group_size=GroupSize(None))
    solved = solve.sweep(weight, upper, matrices(asked, 16, columns=24), asked, torch.bfloat16)
    assert torch.allclose(solved.weight[:, 5], weight[:, 5], atol=float(weight.abs().max()) / 100)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.data())
@settings(deadline=None, max_examples=100)
def test_ties_are_broken_by_place(values: list[int], data: st.DataObject) -> None:
    prune = data.draw(st.integers(0, len(values)))
    keep = keep_largest(torch.tensor(values, dtype=torch.float32), prune)
    gone = sorted(range(len(values)), key=lambda i: (values[i], i))[:prune]
    assert sorted((~keep).nonzero().flatten().tolist()) == sorted(gone)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 6), st.data())
@settings(deadline=None, max_examples=60)
def test_patterns_keep_the_largest_of_every_run(rows: int, runs: int, of: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, of - 1))
    score = torch.randint(0, 3, (rows, runs * of), generator=torch.Generator().manual_seed(rows * runs)).float()
    asked = options(pattern=Pattern(keep, of))
    members = matrices(asked, rows, columns=runs * of)
    found = mask.choose(score, members, asked.pattern, (0, runs * of)).view(rows, runs, of)
    assert bool((found.sum(2) == keep).all())
    parts = score.view(rows, runs, of)
    assert bool((parts.masked_fill(~found, 9).amin(2) >= parts.masked_fill(found, -1).amax(2)).all())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0, 0.999)), min_size=1, max_size=3),
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.floats(0, 1),
)
@settings(deadline=None, max_examples=100)
def test_spans_make_up_every_matrix_s_own_count(
    members: list[tuple[int, float]], widths: list[int], share: float
) -> None:
    """Whatever blocks the columns are cut into, each matrix ends with the count of its own sparsity, to one weight."""
    columns = sum(widths)
    asked = options()
    planned = [
        replace(matrix, sparsity=sparsity)
        for matrix, (_, sparsity) in zip(
            matrices(asked, *(rows for rows, _ in members), columns=columns), members, strict=True
        )
    ]
    total = sum(rows for rows, _ in members)
    score = torch.rand(total, columns, generator=torch.Generator().manual_seed(total))
    parts, start = [], 0
    for width in widths:
        span = (start, start + width)
        parts.append(mask.choose(score[:, start : start + width], planned, Pattern(), span, share=share))
        start += width
    keep, first = torch.cat(parts, dim=1), 0
    for rows, sparsity in members:
        assert int((~keep[first : first + rows]).sum()) == round(rows * columns * sparsity * share)
        first += rows


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grids_are_finite_whatever_the_weights(stored: torch.dtype, symmetric: bool) -> None:
    rows = torch.tensor([[0.0, 0.0], [1e-30, -1e-30], [1e30, 5.0], [3e38, -3e38], [1.0, 1.0]])
    for clip in ("minmax", "mse"):
        scale, zero = grid.choose(rows.T, None, None, bits=4, symmetric=symmetric, clip=clip, stored=stored)
        assert bool(torch.isfinite(scale).all())
        assert bool((scale > 0).all())
        assert torch.equal(scale.to(stored).float(), scale)
        assert bool((zero.round() == zero).all())
        assert bool(((zero >= -8) & (zero <= 7)).all())


def test_the_searched_clip_is_never_worse() -> None:
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 200, generator=draws) ** 3
    importance = torch.exp(2 * torch.randn(32, generator=draws))
    errors, weighed = {}, {}
    for clip in ("minmax", "mse", "hdiag"):
        scale, _ = grid.choose(weight, None, importance, bits=3, symmetric=True, clip=clip, stored=torch.bfloat16)
        codes = (weight / scale).round().clamp(-4, 3)
        errors[clip] = ((codes * scale - weight) ** 2).sum(0)
        weighed[clip] = ((codes * scale - weight) ** 2 * importance[:, None]).sum(0)
    assert bool((errors["mse"] <= errors["minmax"]).all())
    assert bool((errors["mse"] <= errors["hdiag"]).all())
    assert float(errors["mse"].sum()) < 0.9 * float(errors["minmax"].sum())
    assert bool((weighed["hdiag"] <= weighed["mse"] * (1 + 1e-5)).all())
    assert float(weighed["hdiag"].sum()) < 0.9 * float(weighed["mse"].sum())
