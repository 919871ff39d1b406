"""Scales and zero points of groups of weights, chosen in the dtype they are stored in."""

from __future__ import annotations

import torch

# Shares of the full range that the search tries as clips.
CLIPS = tuple(1 - 0.025 * step for step in range(25))


def code_range(bits: int) -> tuple[int, int]:
    """The lowest and highest code: signed, zero included."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _guarded(scale: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """Scales rounded to their stored dtype and kept positive and finite there; returned in float32.

    A group of zeros gets scale 1, so that its codes are zeros and not NaN.
    """
    facts = torch.finfo(stored)
    # float16 reaches down to its subnormals; those of bfloat16 are subnormal in float32 too, where they may be lost
    least = facts.smallest_normal * (facts.eps if stored == torch.float16 else 1)
    rounded = scale.clamp(max=facts.max).to(stored).float().clamp(min=least)
    return torch.where(scale > 0, rounded, 1.0)


def _ends(weight: torch.Tensor, keep: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    kept = weight if keep is None else weight * keep
    return kept.amin(dim=0).clamp(max=0), kept.amax(dim=0).clamp(min=0)


def _grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool, stored: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    steps = (1 << bits) - 1
    if symmetric:
        return _guarded(torch.maximum(-low, high) * 2 / steps, stored), torch.zeros_like(low)
    scale = _guarded((high - low) / steps, stored)
    first, last = code_range(bits)
    return scale, (torch.round(-low / scale) + first).clamp(first, last)


def choose(
    weight: torch.Tensor,
    keep: torch.Tensor | None,
    *,
    bits: int,
    symmetric: bool,
    clip: str,
    stored: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row for one group.

    `weight` float32 (columns, rows): a group's columns, each contiguous. `keep` bool, same shape, or None; weights
    that are not kept do not count. With `clip="mse"` the clip of least squared rounding error, else the full range.
    Returns (scale, zero), float32 (rows): the scale is a value of the dtype `stored`, the zero point a whole number
    among the codes.
    """
    low, high = _ends(weight, keep)
    scale, zero = _grid(low, high, bits, symmetric, stored)
    if clip == "minmax":
        return scale, zero
    best = _error(weight, keep, scale, zero, bits)
    for share in CLIPS[1:]:
        tried, shifted = _grid(low * share, high * share, bits, symmetric, stored)
        error = _error(weight, keep, tried, shifted, bits)
        better = error < best
        scale = torch.where(better, tried, scale)
        zero = torch.where(better, shifted, zero)
        best = torch.minimum(error, best)
    return scale, zero


def _error(
    weight: torch.Tensor, keep: torch.Tensor | None, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    first, last = code_range(bits)
    codes = (weight / scale).round_().add_(zero).clamp_(first, last)
    gap = codes.sub_(zero).mul_(scale).sub_(weight)
    if keep is not None:
        gap.mul_(keep)
    return gap.mul_(gap).sum(dim=0)
