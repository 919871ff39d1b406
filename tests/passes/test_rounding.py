"""Rounding to a narrower dtype, held against the list of all values that the dtype has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.passes import rounding
from rewright.passes.errors import BoundError
from rewright.passes.rounding import rounded

BITS = {torch.float8_e4m3fn: torch.uint8, torch.float16: torch.int16, torch.bfloat16: torch.int16}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.float16: 65504.0, torch.bfloat16: 255 * 2.0**120}
TARGETS = list(BITS)


def _values(dtype: torch.dtype) -> np.ndarray:
    """The finite values of a dtype that are not negative, by their codes, which rise with them."""
    codes = torch.arange(1 << (8 * dtype.itemsize - 1)).to(BITS[dtype]).view(dtype).double()
    return codes[codes.isfinite()].numpy()


VALUES = {dtype: _values(dtype) for dtype in TARGETS}


def _nearest(exact: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Of all values of a dtype the nearest to each float64, of two as near the one of even code."""
    values, size = VALUES[dtype], np.abs(exact)
    above = np.minimum(np.searchsorted(values, size), len(values) - 1)
    below = np.maximum(above - 1, 0)
    # no rounding here: half of the sum of two neighbours has few bits
    middle = (values[below] + values[above]) / 2
    up = (size > middle) | ((size == middle) & (above % 2 == 0))
    return np.copysign(np.where(up, values[above], values[below]), exact)


def _bits(values: np.ndarray) -> list[bytes]:
    return [value.tobytes() for value in values.astype(np.float64)]


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
def test_the_list_is_the_dtype(dtype: torch.dtype) -> None:
    assert VALUES[dtype][0] == 0
    assert VALUES[dtype][-1] == LARGEST[dtype] == torch.finfo(dtype).max
    assert (np.diff(VALUES[dtype]) > 0).all()


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
def test_every_value_of_16_bits(source: torch.dtype, dtype: torch.dtype) -> None:
    every = torch.arange(1 << 16).to(torch.int16).view(source)
    every = every[every.double().abs() <= LARGEST[dtype]]
    found, _, zeroed = rounded(every, dtype, "w")
    exact = every.double().numpy()
    assert _bits(found.double().numpy()) == _bits(_nearest(exact, dtype))
    assert zeroed == int(((_nearest(exact, dtype) == 0) & (exact != 0)).sum())


@st.composite
def _hard(draw: st.DrawFn, dtype: torch.dtype) -> float:
    """Any value in range; more often one just beside the middle of two that the dtype has."""
    if draw(st.booleans()):
        return draw(st.floats(-LARGEST[dtype], LARGEST[dtype]))
    values = VALUES[dtype]
    at = draw(st.integers(1, len(values) - 1))
    middle = (values[at - 1] + values[at]) / 2
    # one float64 beside, as far as a float32 can tell, or on it
    beside = middle * (1 + draw(st.sampled_from([0, 2.0**-52, -(2.0**-52), 2.0**-23, -(2.0**-23), 2.0**-40])))
    return float(beside) * draw(st.sampled_from([1, -1]))


@pytest.mark.parametrize("dtype", TARGETS, ids=str)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_floats_of_32_and_64_bits(dtype: torch.dtype, data: st.DataObject) -> None:
    exact = np.array(data.draw(st.lists(_hard(dtype), min_size=1, max_size=40)))
    for source in (np.float64, np.float32):
        held = exact.astype(source)
        found, largest, _ = rounded(torch.from_numpy(held), dtype, "w")
        wanted = _nearest(held.astype(np.float64), dtype)
        assert _bits(found.double().numpy()) == _bits(wanted)
        stays = (wanted != 0) & (held != 0)
        error = np.abs(wanted[stays] - held[stays]) / np.abs(held[stays].astype(np.float64))
        assert largest == pytest.approx(error.max(initial=0), rel=1e-5)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_to_32_bits_is_what_numpy_does(values: list[float]) -> None:
    exact = np.array(values) * (1 + 2.0**-30)
    exact = exact[(np.abs(exact) <= np.finfo(np.float32).max) | np.isinf(exact)]
    found = rounded(torch.from_numpy(exact), torch.float32, "w")[0]
    assert found.numpy().tobytes() == exact.astype(np.float32).tobytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    held = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0, 1.0], dtype=torch.float64)
    found, largest, zeroed = rounded(held, dtype, "w")
    assert found.tolist()[:2] == [float("inf"), -float("inf")]
    assert found[2].isnan()
    assert str(found[3].item()) == "-0.0"
    assert (largest, zeroed) == (0.0, 0)


def test_8_bits_have_no_infinity() -> None:
    assert rounded(torch.tensor([float("nan")]), torch.float8_e4m3fn, "w")[0].float().isnan().all()
    with pytest.raises(BoundError, match="tensor `w` holds inf, past the 448 that float8_e4m3fn reaches"):
        rounded(torch.tensor([float("inf")]), torch.float8_e4m3fn, "w")


@pytest.mark.parametrize("dtype", [*TARGETS, torch.float32], ids=str)
def test_past_the_largest_is_refused(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little past it, in whichever piece of the tensor."""
    monkeypatch.setattr(rounding, "PIECE", 4)
    most = torch.finfo(dtype).max
    held = torch.full((3, 3), most, dtype=torch.float64)
    assert rounded(held, dtype, "w")[0].double().tolist() == held.tolist()
    held[2, 1] = -np.nextafter(most, np.inf)
    with pytest.raises(BoundError, match=r"tensor `a\.weight` holds -.*, past the .* reaches") as refused:
        rounded(held, dtype, "a.weight")
    assert "--keep" in (refused.value.hint or "")


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    held = torch.full(shape, 1 / 3)
    found, _, zeroed = rounded(held, torch.bfloat16, "w")
    assert torch.equal(found, held.bfloat16())
    assert zeroed == 0
