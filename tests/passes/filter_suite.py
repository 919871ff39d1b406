"""Filters to fit, made by recipes: what long convolutions look like before training, and what no recurrence fits."""

from __future__ import annotations

import math

import torch

from rewright.kernels.vandermonde import vandermonde


def hyena(seed: int, length: int, *, emb: int = 5, frequency: float = 10.0, count: int = 1) -> torch.Tensor:
    """[count, length] float64: filters of a HyenaDNA layer of 128 channels as initialised, channels drawn.

    Three sine layers of width 64 over time and (`emb` - 1) / 2 bands of Fourier features, uniform weights of variance
    1 / (3 fan-in), and each channel's exponential decay (Hyena, arXiv:2302.10866).
    """
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, length, dtype=torch.float64)[:, None]
    bands = (emb - 1) // 2
    phase = 2 * math.pi * torch.arange(length, dtype=torch.float64)[:, None] / length
    phase = phase * torch.linspace(1e-4, bands - 1, bands, dtype=torch.float64)
    features = torch.cat([time, phase.cos(), -phase.sin()], dim=1)
    for width in (emb, 64, 64):
        weight, bias = _uniform(generator, 64, width), _uniform(generator, 64, 1, width)
        features = torch.sin(frequency * (features @ weight.T + bias.T))
    filters = features @ _uniform(generator, 128, 64).T
    decays = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, 128, dtype=torch.float64)
    filters = filters * torch.exp(-time * decays.abs())
    return filters.T[torch.randperm(128, generator=generator)[:count]].contiguous()


def _uniform(generator: torch.Generator, rows: int, columns: int, fan_in: int | None = None) -> torch.Tensor:
    drawn = 2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1
    return drawn / math.sqrt(fan_in or columns)


def s4d(seed: int, length: int, *, states: int = 64, count: int = 1) -> torch.Tensor:
    """[count, length] float64: S4D-Lin (arXiv:2206.11893) with so many real states, steps from 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(states // 2, dtype=torch.float64)
    poles = torch.complex(torch.full_like(number, -0.5), math.pi * number)
    low, high = math.log(1e-3), math.log(1e-1)
    step = (low + (high - low) * torch.rand(count, 1, generator=generator, dtype=torch.float64)).exp()
    drawn = torch.randn(count, states // 2, 2, generator=generator, dtype=torch.float64) * math.sqrt(0.5)
    weights = 2 * torch.view_as_complex(drawn) * torch.expm1(step * poles) / poles
    logs = torch.view_as_real(step * poles)
    return vandermonde(logs, torch.view_as_real(weights).contiguous(), length)


def noise(seed: int, length: int, *, rate: float = 20.0, count: int = 1) -> torch.Tensor:
    """[count, length] float64: white noise that shrinks by e^rate over its length."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(length, dtype=torch.float64) / length
    return torch.randn(count, length, generator=generator, dtype=torch.float64) * torch.exp(-rate * time)


def modal(seed: int, length: int, pairs: int, reals: int, *, count: int = 1) -> torch.Tensor:
    """[count, length] float64: recurrences of 2 * pairs + reals states, poles drawn from rings, h_0 at random."""
    generator = torch.Generator().manual_seed(seed)
    radius = 0.5 + 0.49 * torch.rand(count, pairs + reals, generator=generator, dtype=torch.float64)
    turn = torch.rand(count, pairs + reals, generator=generator, dtype=torch.float64)
    angle = torch.where(torch.arange(pairs + reals) < pairs, math.pi * turn, math.pi * turn.round())
    residues = torch.randn(count, pairs + reals, 2, generator=generator, dtype=torch.float64)
    rest = vandermonde(torch.stack([radius.log(), angle], dim=-1), residues, length - 1)
    return torch.cat([torch.randn(count, 1, generator=generator, dtype=torch.float64), rest], dim=1)
