"""Philox-4x32-10 against its authors' vectors, and the shape of what is drawn. Triton's equality is in test_conform."""

from __future__ import annotations

import pytest
import torch

from rewright.kernels.rng import random_bits, uniform
from rewright.kernels.rng.reference import Words, philox

# kat_vectors of the Random123 distribution: counter, key, result.
VECTORS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_known_answers(counter: str, key: str, result: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in _words(counter))
    k0, k1 = _words(key)
    words: Words = philox((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in words] == _words(result)


def test_elements_are_lanes_of_numbered_blocks() -> None:
    whole = random_bits(41, seed=9, counter=3)
    assert torch.equal(random_bits(9, seed=9, counter=11), whole[32:])
    key = (9, 0)
    block = torch.arange(3, 14)
    nothing = torch.zeros_like(block)
    lanes = torch.stack(philox((block, nothing, nothing, nothing), key), dim=1).view(-1)[:41]
    assert torch.equal(lanes, whole.to(torch.int64) & 0xFFFFFFFF)
    assert not torch.equal(whole, random_bits(41, seed=10, counter=3))


def test_uniform_is_in_range_and_flat() -> None:
    drawn = uniform(1 << 16, seed=5)
    assert drawn.dtype == torch.float32
    assert 0.0 <= drawn.min() < 0.001 < 0.999 < drawn.max() < 1.0
    # Sixteen bins of 4096: chi-square with 15 degrees of freedom passes 37.7 once in a thousand seeds; this is one.
    counts = torch.histc(drawn, 16, 0.0, 1.0)
    assert ((counts - 4096) ** 2 / 4096).sum() < 37.7


@pytest.mark.parametrize(("count", "seed", "counter"), [(-1, 0, 0), (1, -1, 0), (1, 1 << 64, 0), (1, 0, -1)])
def test_out_of_range_is_refused(count: int, seed: int, counter: int) -> None:
    with pytest.raises(ValueError, match="out of range"):
        random_bits(count, seed=seed, counter=counter)
