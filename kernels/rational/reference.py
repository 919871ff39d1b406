"""The definition of `rational` and of its gradient, some channels and points at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rewright.kernels.modal import ELEMENTS


def rational(points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor, direct: torch.Tensor) -> torch.Tensor:
    """values [C, P, 2]; see the package for the mathematics, shapes and dtypes."""
    x, p, r, d = (torch.view_as_complex(t.contiguous()) for t in (points, poles, residues, direct))
    out = d[:, None].repeat(1, len(x))
    for channels, some in _parts(len(p), len(x), p.shape[1]):
        out[channels, some] += (_inverse(x[some], p[channels], r[channels]) * r[channels, None]).sum(dim=2)
    return torch.view_as_real(out)


def rational_backward(
    gradient: torch.Tensor, points: torch.Tensor, poles: torch.Tensor, residues: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in poles, residues and direct of a sum of gradient times values."""
    g, x, p, r = (torch.view_as_complex(t.contiguous()) for t in (gradient, points, poles, residues))
    back, slope = torch.zeros_like(p), torch.zeros_like(p)
    for channels, some in _parts(len(p), len(x), p.shape[1]):
        inverse = _inverse(x[some], p[channels], r[channels])
        # conj(v^T f) is what conj(f) gives when it is weighted by v.
        weights = g[channels, some].conj()[:, None]
        back[channels] += (weights @ inverse)[:, 0]
        slope[channels] += (weights @ inverse.square())[:, 0]
    found = (slope * r).conj().resolve_conj(), back.conj().resolve_conj(), g.sum(dim=1)
    return torch.view_as_real(found[0]), torch.view_as_real(found[1]), torch.view_as_real(found[2])


def _inverse(x: torch.Tensor, p: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """1 / (x - p) [C, P, K], and 0 where an entry without a residue is at the point itself."""
    apart = x[None, :, None] - p[:, None]
    return torch.where((apart == 0) & (r[:, None] == 0), 0, apart.reciprocal())


def _parts(channels: int, points: int, entries: int) -> Iterator[tuple[slice, slice]]:
    """Channels and points that go through at a time, in tables of at most `ELEMENTS` / 4."""
    some = max(1, min(points, ELEMENTS // 4 // max(entries, 1)))
    step = max(1, ELEMENTS // 4 // (some * max(entries, 1)))
    for first in range(0, channels, step):
        for start in range(0, points, some):
            yield slice(first, first + step), slice(start, start + some)
