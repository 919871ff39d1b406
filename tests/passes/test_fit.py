"""Fitting one input's matrices: zeros by ADMM, codes by the sweep, both refined, and whatever the inputs are like."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes.compress import admm, hessian, solve, units
from rewright.passes.compress.fit import Fitted, Fitter, Pruned, round_off
from rewright.passes.compress.mask import Spread
from rewright.passes.compress.refine import refine
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.compress.statistics import Moments, SharedInput
from rewright.passes.compress.tune import stack as tune_stack
from rewright.passes.compress.units import whole
from rewright.passes.context import Silent
from rewright.passes.values import Bits, GroupSize, Pattern
from rewright.passes.world import World
from tests.passes.problems import damped, decoded, matrices, options, problem


def rest(weight: torch.Tensor, result: torch.Tensor, own: torch.Tensor) -> float:
    """tr (Q - W) H (Q - W)^T in float64."""
    gap = (result - weight).double()
    return float((gap @ own.double() * gap).sum())


def best(weight: torch.Tensor, own: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The weights of least error that are zero where they must be, row by row in float64."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    wide = own.double()
    for row in range(len(weight)):
        there = keep[row].nonzero().flatten()
        right = (wide @ weight[row].double())[there]
        found[row, there] = torch.linalg.solve(wide[there][:, there], right)
    return found.float()


PATTERNS = [
    {"sparsity": 0.5},
    {"sparsity": 0.7, "mask_block": 16},
    {"sparsity": 0.33, "mask_block": 7},
    {"pattern": Pattern(2, 4)},
    {"pattern": Pattern(8, 16), "mask_block": 20},
    {"pattern": Pattern(1, 3)},
]


def _prune(
    weight: torch.Tensor, own: torch.Tensor, asked: CompressOptions, *rows: int, keep: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    members = matrices(asked, *rows, columns=weight.shape[1])
    keeps = None if keep is None else [keep]
    (found,) = admm.prune([weight], own, [members], asked.pattern, asked.mask_block, keeps, spread=Spread((), World()))
    return found


@pytest.mark.parametrize("said", PATTERNS, ids=str)
def test_admm_makes_exactly_the_zeros_that_are_asked_for(said: dict[str, object]) -> None:
    weight, own = problem(40, 48, seed=4)
    asked = options(**said)
    keep, found = _prune(weight, own, asked, 24, 16)
    assert bool((found[~keep] == 0).all())
    for first, rows in ((0, 24), (24, 16)):
        part = keep[first : first + rows]
        assert int((~part).sum()) == round(rows * 48 * asked.zeros)
        if asked.pattern.of is not None:
            assert bool((part.view(rows, -1, asked.pattern.of).sum(2) == asked.pattern.keep).all())
        elif asked.mask_block is not None:
            for start in range(0, 48, asked.mask_block):
                end = min(start + asked.mask_block, 48)
                due = [round(rows * column * asked.zeros) for column in (start, end)]
                assert int((~part[:, start:end]).sum()) == due[1] - due[0]


@pytest.mark.parametrize("said", PATTERNS, ids=str)
@pytest.mark.parametrize("seed", [5, 6])
def test_admm_finds_better_zeros_than_the_sweep(said: dict[str, object], seed: int) -> None:
    """With the best weights that either mask allows, and with the weights that ADMM stops at."""
    weight, own = problem(64, 48, seed=seed)
    asked = options(bits=Bits(16), **said)
    upper = hessian.factorise(own, 0.01, "w").upper
    swept = solve.sweep(weight, upper, matrices(asked, 64), asked, torch.bfloat16)
    assert swept.keep is not None
    keep, found = _prune(weight, own, asked, 64)
    aim = damped(own, 0.01)
    ours, theirs = (rest(weight, best(weight, aim, mask), aim) for mask in (keep, swept.keep))
    assert ours < 0.95 * theirs
    assert rest(weight, found, aim) < 1.05 * ours


def test_given_zeros_stay_and_the_rest_makes_up_for_them() -> None:
    weight, own = problem(24, 48, seed=7)
    keep = torch.rand(24, 48, generator=torch.Generator().manual_seed(0)) < 0.6
    asked = options(mask="keep")
    kept, found = _prune(weight * keep, own, asked, 24, keep=keep)
    assert kept is keep
    assert bool((found[~keep] == 0).all())
    # a source with zeros is as good as it can be already
    assert torch.allclose(found, weight * keep, atol=1e-5)
    # another target is not: the weights move to make up for what the zeros cannot say
    _, moved = _prune(weight, own, asked, 24, keep=keep)
    aim = damped(own, 0.01)
    assert rest(weight, moved, aim) < 0.6 * rest(weight, weight * keep, aim)
    assert rest(weight, moved, aim) < 1.05 * rest(weight, best(weight, aim, keep), aim)


GRIDS = [
    {"bits": Bits(4), "group_size": GroupSize(16)},
    {"bits": Bits(3), "group_size": GroupSize(None)},
    {"bits": Bits(2), "group_size": GroupSize(8), "symmetric": False},
    {"bits": Bits(8), "group_size": GroupSize(48)},
    {"bits": Bits(4), "group_size": GroupSize(16), "sparsity": 0.5},
    {"bits": Bits(3), "group_size": GroupSize(12), "pattern": Pattern(2, 4), "symmetric": False},
    {"bits": Bits(16), "sparsity": 0.5},
]


@pytest.mark.parametrize("said", GRIDS, ids=str)
def test_refinement_only_lowers_the_error(said: dict[str, object]) -> None:
    """Pass after pass, with codes that say what the weights are and zeros where they were."""
    asked = options(**said)
    weight, own = problem(40, 48, seed=8)
    factor = hessian.factorise(own, 0.01, "w")
    solved = solve.sweep(weight, factor.upper, matrices(asked, 40), asked, torch.bfloat16, importance=own.diagonal())
    aim = damped(own, 0.01)
    errors = [rest(weight, solved.weight, aim)]
    for passes in (1, 2, 4):
        found = refine(solved, weight, aim, bits=int(asked.bits.number), passes=passes)
        errors.append(rest(weight, found.weight, aim))
        if found.codes is not None:
            assert found.scale is not None
            assert found.scale.dtype == torch.bfloat16
            assert torch.equal(decoded(found, 48), found.weight)
            low, high = -(1 << (int(asked.bits.number) - 1)), (1 << (int(asked.bits.number) - 1)) - 1
            assert bool(((found.codes >= low) & (found.codes <= high)).all())
        if solved.keep is not None:
            assert found.keep is not None
            assert torch.equal(found.keep, solved.keep)
            assert bool((found.weight[~solved.keep] == 0).all())
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    assert errors[1] < 0.999 * errors[0]


def test_refinement_without_a_grid_ends_at_the_best_weights() -> None:
    asked = options(bits=Bits(16), sparsity=0.5)
    weight, own = problem(16, 48, seed=9)
    aim = damped(own, 0.05)
    factor = hessian.factorise(own, 0.05, "w")
    solved = solve.sweep(weight, factor.upper, matrices(asked, 16), asked, torch.bfloat16)
    assert solved.keep is not None
    found = refine(solved, weight, aim, bits=16, passes=100)
    assert rest(weight, found.weight, aim) < 1.001 * rest(weight, best(weight, aim, solved.keep), aim)


def shared(asked: CompressOptions, own: torch.Tensor, *rows: int, tokens: int = 100) -> SharedInput:
    return SharedInput(tuple(matrices(asked, *rows, columns=len(own))), Moments(tokens=tokens, hessian=own))


def fitted(
    asked: CompressOptions,
    weight: torch.Tensor,
    own: torch.Tensor,
    *rows: int,
    stored: torch.dtype = torch.bfloat16,
) -> list[Fitted]:
    fitter = Fitter(asked, stored, Silent())
    met = shared(asked, own, *rows)
    return solve_whole(fitter, met, weight)


def solve_whole(fitter: Fitter, met: SharedInput, weight: torch.Tensor) -> list[Fitted]:
    """All matrices of an input as one unit."""
    units = whole(met.matrices)
    (found,) = fitter.fit(met, units, fitter.prune(met, units, [weight]))
    return found


@pytest.mark.parametrize("group", [8, 16, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_in_another_order_are_back_in_their_places(group: int | None, symmetric: bool) -> None:
    """Codes, scales and zero points say what the weight is, in the columns of the source, and a little better."""
    draws = torch.Generator().manual_seed(2)
    errors = {"natural": 0.0, "act": 0.0}
    for seed in range(4):
        weight, own = problem(40, 48, seed=seed)
        # a few inputs far larger than the others, the largest last
        gain = torch.exp(2 * torch.rand(48, generator=draws)).sort().values
        own = own * gain * gain[:, None]
        for order in ("natural", "act"):
            asked = options(bits=Bits(3), group_size=GroupSize(group), symmetric=symmetric, order=order, refine=0)
            (one,) = fitted(asked, weight, own, 40)
            assert torch.equal(decoded(one.solved, 48), one.solved.weight)
            errors[order] += rest(weight, one.solved.weight, own)
            # in its place every column is near what it was
            assert float((one.solved.weight - weight).norm() / weight.norm()) < 1
    assert errors["act"] < 0.9 * errors["natural"]


def test_order_of_alike_inputs_is_their_own() -> None:
    weight, own = problem(16, 32, seed=1)
    flat = own / own.diagonal().sqrt() / own.diagonal().sqrt()[:, None]
    flat.fill_diagonal_(1.0)
    results = []
    for order in ("natural", "act"):
        asked = options(group_size=GroupSize(8), order=order)
        results.append(fitted(asked, weight, flat, 16)[0].solved)
    assert torch.equal(results[0].weight, results[1].weight)


def test_matrices_of_other_bits_are_solved_apart() -> None:
    """And come in the order in which they were given, each with codes of its own bits."""
    asked = options(group_size=GroupSize(16))
    weight, own = problem(40, 48, seed=3)
    fitter = Fitter(asked, torch.bfloat16, Silent())
    met = shared(asked, own, 16, 8, 16)
    bits = (4, 2, 16)
    members = tuple(replace(matrix, bits=each) for matrix, each in zip(met.matrices, bits, strict=True))
    met.matrices = members
    found = solve_whole(fitter, met, weight)
    assert [one.matrix for one in found] == list(members)
    assert [one.solved.codes is None for one in found] == [False, False, True]
    assert int(found[1].solved.codes.abs().max()) <= 2  # type: ignore[union-attr]  # it has codes
    assert torch.equal(found[2].solved.weight, weight[24:])
    alone = fitted(replace(asked, bits=Bits(2)), weight[16:24], own, 8)
    assert torch.equal(alone[0].solved.weight, found[1].solved.weight)


def test_zeros_of_the_source_are_the_zeros_of_the_result() -> None:
    weight, own = problem(40, 48, seed=3)
    keep = torch.rand(40, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    for said in ({}, {"bits": Bits(16)}, {"method": "rtn"}, {"order": "act"}):
        asked = options(mask="keep", group_size=GroupSize(16), **said)
        if asked.method == "rtn":
            one = round_off(matrices(asked, 40)[0], weight * keep, None, asked, torch.bfloat16)
        else:
            (one,) = fitted(asked, weight * keep, own, 40)
        assert bool((one.solved.weight[~keep] == 0).all())
        assert int((one.solved.weight != 0).sum()) > (0.9 if asked.quantises else 1) * int(keep.sum()) - 1


def test_a_sweep_s_own_zeros_can_be_tuned_before_it_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `--tune` the sweep's mask is found first, by a sweep that rounds nothing, in whatever units it is fitted."""
    weight, own = problem(40, 48, seed=3)
    asked = options(sparsity=0.5, mask="sweep", group_size=GroupSize(16))
    monkeypatch.setattr(units, "WEIGHTS", 400)
    monkeypatch.setattr(units, "ROWS", 8)
    for tune in (0, 5):
        fitter = Fitter(replace(asked, tune=tune), torch.bfloat16, Silent())
        met = shared(asked, own, 24, 16)
        every = whole(met.matrices)
        (pruned,) = fitter.prune(met, every, [weight])
        assert (pruned.keep is None) == (tune == 0)
        if tune:
            cut = units.units_of([*met.matrices])
            weights = [weight[unit.rows] for unit in cut]
            apart = tune_stack(fitter.prune(met, cut, weights))
            assert len(cut) > 2
            assert torch.equal(apart.weight, pruned.weight)
            assert pruned.keep is not None
            assert int((~pruned.keep[24:]).sum()) == 16 * 24
        for one in next(fitter.fit(met, every, [pruned])):
            assert one.solved.keep is not None
            assert int((~one.solved.keep).sum()) == one.matrix.rows * 24


WILD = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8, 16]),
        "group": st.sampled_from([4, 8, 12, None]),
        "symmetric": st.booleans(),
        "mask": st.sampled_from(["admm", "sweep", "keep"]),
        "zeros": st.sampled_from([None, 0.3, 0.97, "2:4", "1:8"]),
        "clip": st.sampled_from(["hdiag", "mse", "minmax"]),
        "saliency": st.sampled_from(["obs", "quant-aware"]),
        "block": st.sampled_from([None, 1, 10, 100]),
        "order": st.sampled_from(["natural", "act"]),
        "stored": st.sampled_from([torch.bfloat16, torch.float16]),
    }
)


@given(WILD, st.data())
@settings(deadline=None, max_examples=120)
def test_whatever_comes_in_a_matrix_comes_out(said: dict[str, object], data: st.DataObject) -> None:
    """Dead inputs, inputs that say the same, empty rows, huge and tiny values, fewer tokens than columns: the counts
    are exact, the codes say what the weights are, and nothing is worse than all zeros."""
    zeros = said["zeros"]
    pattern = Pattern.parse(zeros) if isinstance(zeros, str) else Pattern()
    sparsity = zeros if isinstance(zeros, float) else None
    if said["mask"] == "keep":
        pattern, sparsity = Pattern(), None
    elif said["bits"] == 16 and zeros is None:
        sparsity = 0.5
    prunes = sparsity is not None or pattern.of is not None
    asked = options(
        bits=Bits(said["bits"]),  # type: ignore[arg-type]  # a whole number
        group_size=GroupSize(said["group"]),  # type: ignore[arg-type]  # the same, or None
        symmetric=said["symmetric"],
        mask=said["mask"],
        sparsity=sparsity,
        pattern=pattern,
        clip=said["clip"],
        saliency=said["saliency"] if prunes and said["mask"] == "sweep" else "obs",
        mask_block=said["block"] if prunes else None,
        order="natural" if prunes else said["order"],
    )
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 99), "seed"))
    tokens = data.draw(st.sampled_from([1, 10, 100]), "tokens")
    inputs = torch.randn(tokens, 24, generator=draws)
    inputs[:, data.draw(st.lists(st.integers(0, 23), max_size=4), "dead")] = 0
    for column in data.draw(st.lists(st.integers(1, 23), max_size=4), "doubled"):
        inputs[:, column] = inputs[:, column - 1]
    inputs[:, data.draw(st.integers(0, 23), "large")] *= 1e3
    weight = torch.randn(12, 24, generator=draws) * data.draw(st.sampled_from([1e-6, 0.05, 1e4]), "size")
    weight[data.draw(st.lists(st.integers(0, 11), max_size=4), "empty")] = 0
    weight[:, data.draw(st.lists(st.integers(0, 23), max_size=4), "unused")] = 0
    own = inputs.t() @ inputs / tokens
    if not bool(own.diagonal().any()):
        return
    found = fitted(asked, weight, own, 8, 4, stored=said["stored"])  # type: ignore[arg-type]  # a dtype
    for one, before in zip(found, weight.split([8, 4]), strict=True):
        solved = one.solved
        assert bool(torch.isfinite(solved.weight).all())
        if solved.codes is not None:
            assert torch.equal(decoded(solved, 24), solved.weight)
        if asked.mask == "keep":
            assert bool((solved.weight[before == 0] == 0).all())
        elif asked.prunes:
            assert solved.keep is not None
            assert int((~solved.keep).sum()) == round(len(before) * 24 * asked.zeros)
            assert bool((solved.weight[~solved.keep] == 0).all())
        assert one.damp is not None
        aim = damped(own, one.damp)
        whole = rest(before, torch.zeros_like(before), aim)
        assert rest(before, solved.weight, aim) <= 1.01 * whole


def test_rows_of_pruned_matrices_are_matrices_of_their_own() -> None:
    weight = torch.arange(12.0).view(4, 3)
    assert Pruned(weight, weight, None).rows(1, 3).keep is None
    part = Pruned(weight, 2 * weight, weight > 4).rows(1, 3)
    assert torch.equal(part.wanted, weight[1:3])
    assert torch.equal(part.weight, 2 * weight[1:3])
    assert part.keep is not None
    assert part.keep.tolist() == [[False, False, True], [True, True, True]]
