"""What a solve is split into, sums in a fixed order, a choice by counts: the same for any number of processes."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewright.kernels.select import keep_largest
from rewright.passes.chunks import sent
from rewright.passes.compress import units
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.spread import keep_largest_spread
from rewright.passes.sums import OrderedSum, exchange
from rewright.passes.world import World
from tests.passes.processes import together


def matrix(rows: int, columns: int, **said: object) -> Matrix:
    plain = {"layer": 0, "dtype": "F32", "group": None, "transposed": False, "bits": 4, "sparsity": 0.5}
    name = f"model.layers.0.m{rows}.weight"
    return Matrix(name=name, written=name, rows=rows, columns=columns, **{**plain, **said})  # type: ignore[arg-type]


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=4), st.sampled_from([64, 576, 4096]))
def test_units_hold_every_row_once(rows: list[int], columns: int) -> None:
    found = units.units_of([matrix(count, columns) for count in rows])
    assert [unit.first for unit in found] == [0, *accumulate(unit.stop - unit.first for unit in found)][:-1]
    assert found[-1].stop == sum(rows)
    for unit in found:
        assert sum(member.rows for member in unit.members) == unit.stop - unit.first
        if len(found) > 1:
            (member,) = unit.members
            assert member.first % units.ROWS == 0
            assert member.rows * columns <= units.WEIGHTS + units.ROWS * columns


def test_what_cannot_be_cut_stays_whole() -> None:
    for said in ({"expert": True}, {"transposed": True}, {"part": 3}):
        assert len(units.units_of([matrix(4096, 4096, **said)])) == 1
    assert len(units.units_of([matrix(4096, 4096)])) == 16


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 7))
def test_shares_are_runs_that_hold_every_unit_once(costs: list[float], size: int) -> None:
    world = World()
    world.size = size
    shares = world.shares(costs)
    assert [unit for share in shares for unit in share] == list(range(len(costs)))
    if costs and max(costs) > 0:
        worst = max(sum(costs[unit] for unit in share) for share in shares)
        assert worst <= sum(costs) / size + max(costs) + 1e-6


def _sum(numbers: list[int], terms: torch.Tensor) -> OrderedSum:
    found = OrderedSum(lambda: torch.zeros(terms.shape[1:]))
    for number in numbers:
        found.term(number).add_(terms[number])
    return found


@given(st.integers(1, 16), st.integers(1, 5), st.data())
def test_a_sum_does_not_hang_on_who_adds(count: int, size: int, data: st.DataObject) -> None:
    """Also where some terms are missing, and processes have none."""
    terms = torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(count)) * 10.0 ** torch.arange(5)
    present = [number for number in range(count) if data.draw(st.booleans())]
    cuts = sorted(data.draw(st.lists(st.integers(0, count), min_size=size - 1, max_size=size - 1)))
    alone = _sum(present, terms)
    if len(present) == count:
        assert len(alone.spans) == count.bit_count(), "one part for each power of two"
    expected = alone.total()
    shares = [
        [number for number in present if first <= number < last]
        for first, last in zip([0, *cuts], [*cuts, count], strict=True)
    ]
    sums = [_sum(share, terms) for share in shares]
    spans = [one.spans for one in sums]
    found = together(size, lambda world, group: exchange(world, group, sums[world.rank], spans))
    assert all(torch.equal(one, expected) for one in found)


VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3.0e-39, 1e30, float("inf"), 0.1])


@given(st.integers(1, 4), st.lists(st.lists(VALUES, min_size=4, max_size=4), min_size=1, max_size=12), st.data())
def test_a_choice_by_counts_is_the_choice_among_all(size: int, rows: list[list[float]], data: st.DataObject) -> None:
    """With ties, of which the first go; two matrices at a time, and processes without a row of one."""
    score = torch.tensor(rows)
    prune = data.draw(st.integers(0, score.numel()))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), min_size=size - 1, max_size=size - 1)))
    bounds = list(zip([0, *cuts], [*cuts, len(rows)], strict=True))
    whole = [keep_largest(score, prune), keep_largest(score + 1, 3)]

    def choose(world: World, group: object) -> list[list[torch.Tensor]]:
        first, last = bounds[world.rank]
        own = score[first:last]
        parts = [own[:1], own[1:]] if len(own) > 1 else [own] if len(own) else []
        return keep_largest_spread([parts, [part + 1 for part in parts]], [prune, 3], world)

    found = together(size, choose)
    for place, expected in enumerate(whole):
        pieces = [piece for theirs in found for piece in theirs[place]]
        assert torch.equal(torch.cat(pieces), expected)


@pytest.mark.parametrize("size", [2, 3])
def test_bytes_sent_are_those_of_the_formula(size: int) -> None:
    terms = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    sums = [_sum([rank], terms) for rank in range(size)]
    spans = [one.spans for one in sums]
    found = together(size, lambda world, group: [exchange(world, group, sums[world.rank], spans), world.sent][1])
    assert found == [sent(21, 4, 1, rank, size) for rank in range(size)]
