"""The definition of `vp_gram`: nine closed sums for each pair of poles, no work that grows with the length."""

from __future__ import annotations

import torch

from rewright.kernels.modal import groups, reduced
from rewright.kernels.vp_gram.series import TERMS, coefficients


def vp_gram(logs: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gram`, `gram_t` and `gram_tt` [C, 2K, 2K]; see the package for the mathematics and shapes."""
    channels, entries, _ = logs.shape
    found = logs.new_zeros((3, channels, 2 * entries, 2 * entries))
    if found.numel() == 0 or length == 0:
        return found[0], found[1], found[2]
    span = torch.tensor(float(length), dtype=logs.dtype, device=logs.device)
    whole = reduced(logs[..., 1], span)
    for part in groups(channels, 16 * entries * entries):
        rate, angle, turned = logs[part, :, 0], logs[part, :, 1], whole[part]
        total = rate[:, :, None] + rate[:, None, :]
        # Of p_i p_j, and of p_i conj(p_j).
        plus = _sums(total, angle[:, :, None] + angle[:, None, :], turned[:, :, None] + turned[:, None, :], length)
        minus = _sums(total, angle[:, :, None] - angle[:, None, :], turned[:, :, None] - turned[:, None, :], length)
        for out, z, w in zip(found, plus, minus, strict=True):
            out[part, :entries, :entries] = (z.real + w.real) / 2
            out[part, entries:, entries:] = (w.real - z.real) / 2
            cross = (w.imag - z.imag) / 2
            out[part, :entries, entries:] = cross
            out[part, entries:, :entries] = cross.transpose(1, 2)
    return found[0], found[1], found[2]


def _sums(rate: torch.Tensor, angle: torch.Tensor, whole: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
    """Sums over t = 0 .. L-1 of q^t, t q^t and t^2 q^t, q = exp(rate + i angle), where `whole` is L angle in turns."""
    angle = reduced(angle, torch.ones_like(angle))
    # Of two phases that agree up to turns, the one that is exact where q is near 1.
    whole = torch.where((length * angle).abs() < 3.0, length * angle, whole)
    # Where q is too near 1 for the quotients, a series in log q^L.
    near = torch.hypot(length * rate, length * angle) < 1.0
    base = torch.where(near, 1.0, angle)
    down, below = _expm1(rate, base), _expm1(length * rate, whole)
    q, last = torch.polar(rate.exp(), base), torch.polar((length * rate).exp(), whole)
    first = below / down
    second = (length * last - first * q) / down
    third = (float(length) ** 2 * last - (2 * second + first) * q) / down
    found = [first, second, third]
    power = length * torch.complex(rate[near], angle[near])
    factors = coefficients(length)
    for moment, sums in enumerate(found):
        value = torch.full_like(power, factors[moment + TERMS] / TERMS)
        for term in range(TERMS - 1, -1, -1):
            value = (factors[moment + term] + power * value) / max(term, 1)
        sums[near] = float(length) ** (moment + 1) * value
    return tuple(found)


def _expm1(rate: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """exp(rate + i angle) - 1 without a loss of digits near 0, for rate at most 0."""
    half = torch.sin(angle / 2)
    return torch.complex(rate.expm1() * angle.cos() - 2 * half * half, rate.exp() * angle.sin())
