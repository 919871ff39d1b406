"""`pack` is what compressed-tensors reads and writes, to the bit."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from rewright.kernels.pack import WIDTHS, pack, unpack


def _codes(bits: int, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    half = 1 << (bits - 1)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-half, half, (rows, columns), generator=generator).to(torch.int8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WIDTHS), st.integers(1, 9), st.integers(1, 140), st.integers(0, 1 << 20))
def test_equals_compressed_tensors_and_comes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = _codes(bits, rows, columns, seed)
    packed = pack(codes, bits)
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack(packed, bits, columns), unpack_from_int32(packed, bits, codes.shape))


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_points_are_packed_along_rows(bits: int) -> None:
    zero = _codes(bits, 37, 5)
    assert torch.equal(pack(zero.t(), bits).t(), pack_to_int32(zero, bits, packed_dim=0))


def test_the_layout_of_four_bits() -> None:
    codes = torch.tensor([[-8, -7, 0, 7, -8, -8, -8, 7, 1]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[int.from_bytes(bytes([0x10, 0xF8, 0x00, 0xF0]), "little", signed=True), 9]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: pack(torch.zeros(2, 2, dtype=torch.int32), 4),
        lambda: pack(torch.zeros(2, dtype=torch.int8), 4),
        lambda: pack(torch.zeros(2, 2, dtype=torch.int8), 5),
        lambda: unpack(torch.zeros(2, 2, dtype=torch.int32), 4, 17),
        lambda: unpack(torch.zeros(2, 2, dtype=torch.int64), 4, 16),
    ],
)
def test_other_inputs_are_refused(call: object) -> None:
    with pytest.raises(ValueError, match=r"bits|int8"):
        call()  # type: ignore[operator]  # the parameters are functions
