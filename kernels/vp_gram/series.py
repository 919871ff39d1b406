"""The sums of powers of 0 .. L-1 that the series of `vp_gram` is made of."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from math import comb

# Below 1 the first term left out is below 1 / 19!.
TERMS = 18


@lru_cache(maxsize=64)
def coefficients(length: int) -> tuple[float, ...]:
    """The sum over t = 0 .. L-1 of t^j, over L^(j+1), for j = 0 .. TERMS + 2: Faulhaber's formula, in fractions."""
    bernoulli = [Fraction(1)]
    for n in range(1, TERMS + 3):
        bernoulli.append(-sum((comb(n + 1, k) * b for k, b in enumerate(bernoulli)), Fraction()) / (n + 1))
    return tuple(
        float(sum(comb(j + 1, k) * bernoulli[k] / Fraction(length) ** k for k in range(j + 1)) / (j + 1))
        for j in range(TERMS + 3)
    )
