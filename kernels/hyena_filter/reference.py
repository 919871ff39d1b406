"""The definition of `hyena_filter`, some positions at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Activations held at a time: small enough for a core's cache.
ELEMENTS = 1 << 17


def hyena_filter(
    features: torch.Tensor,
    times: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    frequencies: Sequence[torch.Tensor],
    deltas: torch.Tensor,
    shift: float,
) -> torch.Tensor:
    """h [D, L]; see the package for the mathematics, shapes and dtypes."""
    dtype = features.dtype
    length = len(features)
    *inner, last = (weight.to(dtype) for weight in weights)
    rates = -deltas.to(dtype).abs()[:, None]
    out = torch.empty((len(last), length), dtype=dtype, device=features.device)
    step = max(64, ELEMENTS // max(max(map(len, weights)), 1))
    for start in range(0, length, step):
        here = slice(start, start + step)
        x = features[here].t()
        for weight, bias, frequency in zip(inner, biases, frequencies, strict=True):
            x = torch.addmm(bias.to(dtype)[:, None], weight, x).mul_(frequency.to(dtype)[:, None]).sin_()
        window = (rates * times[here].to(dtype)).exp_()
        out[:, here] = (last @ x).mul_(window.add_(shift))
    return out
