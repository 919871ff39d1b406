"""Other people's reductions of a filter, in the terms of ours."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import torch

from rewright.passes.hyena_distill.closed_form import longest
from rewright.passes.hyena_distill.residues import residues
from rewright.passes.hyena_distill.states import from_poles


def aaa(filter_: torch.Tensor, order: int) -> float:
    """Relative l2 error over t >= 1 of `filter_` [L] with the poles of scipy's AAA and residues of least squares.

    AAA interpolates greedily on the unit circle and knows of no stability or symmetry: poles outside are reflected, of
    those that are not real the upper half plane's are taken with their conjugates, the slowest first.
    """
    from scipy.interpolate import AAA

    samples = filter_[1:]
    norm = samples.norm()
    spectrum = torch.fft.fft(samples / norm, 2 * len(samples)).numpy()
    points = np.exp(2j * np.pi * np.arange(len(spectrum)) / len(spectrum))
    with warnings.catch_warnings():
        # that so many terms do not reach machine precision is what is measured
        warnings.simplefilter("ignore", RuntimeWarning)
        found = torch.from_numpy(AAA(points, spectrum, max_terms=order + 1, rtol=0.0, clean_up=False).poles())
    found = found[found.isfinite() & (found != 0)]
    found = torch.where(found.abs() > 1, 1 / found.conj(), found)
    real = found.imag.abs() < 1e-9
    chosen: list[complex] = []
    for pole in found[real | (found.imag > 0)].tolist():
        several = [complex(pole.real, 0.0)] if abs(pole.imag) < 1e-9 else [pole, pole.conjugate()]
        if len(chosen) + len(several) <= order:
            chosen += several
    states = from_poles(torch.tensor([chosen], dtype=torch.complex128), longest(len(filter_)))
    return float(residues(states, samples[None] / norm)[1])


def slycot_balanced(filter_: torch.Tensor, order: int) -> float:
    """Relative l2 error over t >= 1 of SLICOT's balanced truncation (AB09AD) of the filter's delay line."""
    from slycot import ab09ad

    samples = filter_[1:].numpy()
    states = len(samples)
    line: Any = np.eye(states, k=-1)
    first = np.zeros((states, 1))
    first[0] = 1
    _, A, B, C, *_ = ab09ad("D", "B", "N", states, 1, 1, line, first, samples[None].copy(), nr=order, tol=0.0)
    vector = B[:, 0]
    made = np.empty(states)
    for step in range(states):
        made[step] = C[0] @ vector
        vector = A @ vector
    return math.sqrt(float(((made - samples) ** 2).sum() / (samples**2).sum()))
