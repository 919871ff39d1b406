"""Fits by gradient descent, as Laughing Hyena Distillery makes them (arXiv:2310.18780): a method and a baseline.

Poles r e^(i theta) and Cartesian residues of conjugate pairs, started as the paper's modal filter is (r and theta
uniform, residues normal) and moved by Adam (arXiv:1412.6980) with a cosine's fall of its rate. The paper's own rate
and number of steps are not published; r is kept inside the unit circle, which the paper leaves to the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewright.kernels.modal_fit_step import modal_fit_step
from rewright.passes.hyena_distill.polish import Polished
from rewright.passes.hyena_distill.states import States

STEPS = 3000


@dataclass(frozen=True, slots=True)
class Begin:
    """Where poles start, r uniform in `radii` and theta in [0, `turn`), and Adam's rate."""

    radii: tuple[float, float] = (0.5, 0.99)
    turn: float = 2 * math.pi
    rate: float = 1e-2


PUBLISHED = Begin()
# The best of these for each filter is what a careful user would have: two rates, and rings of longer memory.
FOUR = (
    PUBLISHED,
    Begin(rate=3e-3),
    Begin(radii=(0.9, 0.9999)),
    Begin(radii=(0.9, 0.9999), turn=math.pi / 25),
)


def gradient(
    samples: torch.Tensor,
    order: int,
    *,
    limit: float,
    seed: int,
    steps: int = STEPS,
    begins: Sequence[Begin] = (PUBLISHED,),
) -> Polished:
    """Recurrences of `order` // 2 pairs for `samples` [C, n] by so many steps from each of `begins`, the best of all.

    Of a run the best iterate counts. Modes shrink by 1 / `limit` a step at least; `seed` draws the starts, each
    filter's from its place in the batch.
    """
    best: Polished | None = None
    for place, begin in enumerate(begins):
        found = _run(samples, order // 2, limit, seed + place, steps, begin)
        best = found if best is None else best.better(found)
    assert best is not None
    return best


def _run(samples: torch.Tensor, pairs: int, limit: float, seed: int, steps: int, begin: Begin) -> Polished:
    channels = samples.shape[0]
    # residues near one fit samples near one
    scale = samples.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    target = samples / scale
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(channels, pairs, 2, generator=generator, dtype=torch.float64)
    low, high = begin.radii
    polar = torch.stack([low + (high - low) * drawn[..., 0], begin.turn * drawn[..., 1]], dim=-1).to(samples.device)
    normal = torch.randn(channels, pairs, 2, generator=generator, dtype=torch.float64).to(samples.device)
    parameters = torch.cat([polar, normal / math.sqrt(max(pairs, 1))], dim=-1)
    moments = torch.zeros_like(parameters), torch.zeros_like(parameters)
    least = samples.new_full((channels,), float("inf"))
    kept = parameters
    for step in range(steps + 1):
        radius = parameters[..., :1]
        logs = torch.cat([radius.log(), parameters[..., 1:2]], dim=-1)
        loss, d_logs, d_residues = modal_fit_step(target, logs, parameters[..., 2:].contiguous())
        better = loss < least
        least = torch.where(better, loss, least)
        kept = torch.where(better[:, None, None], parameters, kept)
        if step == steps:
            break
        slope = torch.cat([d_logs[..., :1] / radius, d_logs[..., 1:], d_residues], dim=-1)
        rate = begin.rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        parameters, moments = _adam(parameters, moments, slope, rate, step + 1)
        parameters[..., 0].clamp_(1e-3, math.exp(-1 / limit))
    states, coefficients = _columns(kept)
    return Polished(states, coefficients * scale, least.sqrt() * scale[:, 0])


def _adam(
    parameters: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor],
    slope: torch.Tensor,
    rate: float,
    count: int,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    first = 0.9 * moments[0] + 0.1 * slope
    second = 0.999 * moments[1] + 0.001 * slope.square()
    spread = (second / (1 - 0.999**count)).sqrt() + 1e-12
    return parameters - rate * (first / (1 - 0.9**count)) / spread, (first, second)


def _columns(parameters: torch.Tensor) -> tuple[States, torch.Tensor]:
    """States of poles (r, theta), each a pair, and the coefficients of their columns."""
    radius, angle, real, imaginary = parameters.unbind(dim=-1)
    angle = angle.remainder(2 * math.pi)
    # a pole of the lower half plane stands for its conjugate
    below = angle > math.pi
    angle = torch.where(below, 2 * math.pi - angle, angle)
    imaginary = torch.where(below, -imaginary, imaginary)
    pairs = torch.full((len(radius),), radius.shape[1], dtype=torch.int64, device=radius.device)
    states = States(-radius.log().repeat_interleave(2, dim=1), angle.repeat_interleave(2, dim=1), pairs)
    return states, torch.stack([real, imaginary], dim=-1).flatten(1)
