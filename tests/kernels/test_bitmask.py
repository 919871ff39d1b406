"""The bitmask form of codes: as it is defined, a column at a time, and back again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.kernels.bitmask import counts, fits, pack_bitmask, reference, unpack_bitmask
from tests.kernels.cases import masked_codes


def spelled_out(codes: list[int], nnz: int) -> tuple[list[int], list[int]]:
    """Mask bytes and value bytes of one group, from the definition."""
    kept = [column for column, code in enumerate(codes) if code]
    kept += [column for column, code in enumerate(codes) if not code][: nnz - len(kept)]
    mask = [0] * (len(codes) // 8)
    for column in kept:
        mask[column // 8] |= 1 << column % 8
    halves = [codes[column] + 8 for column in sorted(kept)]
    return mask, [low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True)]


@st.composite
def records(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    group = 8 * draw(st.integers(1, 20))
    nnz = 2 * draw(st.integers(1, group // 2))
    rows, groups, seed = draw(st.integers(0, 4)), draw(st.integers(0, 3)), draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    return masked_codes(generator, rows, groups * group, group, nnz), group, nnz


@settings(max_examples=60, deadline=None)
@given(records())
def test_packs_as_it_is_defined_and_comes_back(record: tuple[torch.Tensor, int, int]) -> None:
    codes, group, nnz = record
    assert fits(codes, group, nnz)
    mask, values = pack_bitmask(codes, group, nnz)
    assert torch.equal(unpack_bitmask(mask, values), codes)
    assert (counts(mask) == nnz).all()
    for row in range(codes.shape[0]):
        for at in range(codes.shape[1] // group):
            expected = spelled_out(codes[row, at * group : (at + 1) * group].tolist(), nnz)
            assert (mask[row, at].tolist(), values[row, at].tolist()) == expected


def test_a_record_of_zeros_keeps_its_first_columns() -> None:
    mask, values = pack_bitmask(torch.zeros(1, 16, dtype=torch.int8), 16, 10)
    assert mask.tolist() == [[[255, 3]]]
    assert values.tolist() == [[[0x88] * 5]]


def test_many_rows_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = masked_codes(torch.Generator().manual_seed(1), 37, 64, 32, 16)
    packed = pack_bitmask(codes, 32, 16)
    monkeypatch.setattr(reference, "BLOCK", 300)
    assert torch.equal(unpack_bitmask(*packed), codes)


def test_what_does_not_fit_is_told() -> None:
    codes = torch.ones(2, 16, dtype=torch.int8)
    codes[:, 10:] = 0
    assert fits(codes, 16, 10)
    assert not fits(codes, 16, 8)
    assert not fits(codes, 8, 6)


@pytest.mark.parametrize("bits", [0, 0b11111111, 0b1])
def test_a_mask_of_another_count_reads_nothing_outside(bits: int) -> None:
    """What comes out is undefined, but for where it may come from."""
    mask, values = torch.full((3, 2, 1), bits, dtype=torch.uint8), torch.full((3, 2, 2), 0x88, dtype=torch.uint8)
    assert (counts(mask) == bits.bit_count()).all()
    found = unpack_bitmask(mask, values)
    assert found.shape == (3, 16)
    assert found.min() >= -8
    assert found.max() <= 7


_CODES = torch.zeros(2, 16, dtype=torch.int8)
_MASK, _VALUES = torch.zeros(2, 2, 1, dtype=torch.uint8), torch.zeros(2, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack_bitmask(_CODES.int(), 8, 4),
        lambda: pack_bitmask(_CODES[0], 8, 4),
        lambda: pack_bitmask(_CODES, 12, 4),
        lambda: pack_bitmask(_CODES, 24, 4),
        lambda: pack_bitmask(_CODES, 0, 4),
        lambda: pack_bitmask(_CODES, 8, 3),
        lambda: pack_bitmask(_CODES, 8, 0),
        lambda: pack_bitmask(_CODES, 8, 10),
        lambda: unpack_bitmask(_MASK.int(), _VALUES),
        lambda: unpack_bitmask(_MASK[0], _VALUES[0]),
        lambda: unpack_bitmask(_MASK[:1], _VALUES),
        lambda: unpack_bitmask(_MASK, _VALUES.repeat(1, 1, 3)),
        lambda: unpack_bitmask(_MASK, _VALUES[..., :0]),
    ],
)
def test_other_inputs_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"codes must|multiples of 8|even number|mask and values"):
        call()
