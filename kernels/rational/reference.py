"""The definition of `rational` and of its gradient, some channels and points at a time, in real numbers.

1 / (x - p) is made once for a block, both planes side by side; all sums over it are matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Quotients that are held at a time: what a core's cache takes.
ELEMENTS = 1 << 16


def rational(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """values [C, P, 2]; see the package for the mathematics, shapes and dtypes."""
    out = direct[:, None].repeat(1, len(points), 1)
    turned = torch.stack((-residues[..., 1], residues[..., 0]), dim=-1)
    weights = torch.cat((residues, turned), dim=1).transpose(1, 2)
    for channels, some in _parts(len(poles), len(points), poles.shape[1]):
        f = _inverse(points[some], poles[channels], residues[channels])
        out[channels, some] += (weights[channels] @ f).transpose(1, 2)
    return out


def rational_backward(
    gradient: torch.Tensor, points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in poles, residues and direct of a sum of gradient times values."""
    entries = poles.shape[1]
    back, slope = torch.zeros_like(residues), torch.zeros_like(poles)
    for channels, some in _parts(len(poles), len(points), entries):
        f = _inverse(points[some], poles[channels], residues[channels])
        g = gradient[channels, some]
        back[channels] += _conjugated(f, g)
        real, imaginary = f[:, :entries].clone(), f[:, entries:]
        f[:, :entries] = (real - imaginary) * (real + imaginary)
        imaginary.mul_(real).mul_(2)
        slope[channels] += _conjugated(f, g)
    real = (residues * slope).sum(dim=2)
    imaginary = residues[..., 0] * slope[..., 1] - residues[..., 1] * slope[..., 0]
    return torch.stack((real, imaginary), dim=-1), back, gradient.sum(dim=1)


def _conjugated(f: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The sum over points of conj(f) g, [C, K, 2]."""
    straight, crossed = (f @ g).chunk(2, dim=1)
    return torch.stack((straight[..., 0] + crossed[..., 1], straight[..., 1] - crossed[..., 0]), dim=-1)


def _inverse(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor) -> torch.Tensor:
    """Both planes of 1 / (x - p) as [C, 2 K, P], and 0 where an entry without a residue is at the point itself."""
    x, y = points.t().contiguous()
    right = x - poles[:, :, None, 0]
    up = poles[:, :, None, 1] - y
    size = torch.addcmul(right.square(), up, up)
    idle = (residues == 0).all(dim=2)
    if bool(idle.any()):
        size.masked_fill_((size == 0) & idle[:, :, None], 1.0)
    return torch.cat((right.div_(size), up.div_(size)), dim=1)


def _parts(channels: int, points: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Channels and points that go through at a time."""
    some = max(1, min(points, ELEMENTS // max(entries, 1)))
    step = max(1, ELEMENTS // (some * max(entries, 1)))
    for first in range(0, channels, step):
        for start in range(0, points, some):
            yield slice(first, first + step), slice(start, start + some)
