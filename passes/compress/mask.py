"""Which weights stay: exact counts, ties broken by position."""

from __future__ import annotations

import torch

from rewright.passes.values import Pattern


def keep_largest(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest of a tensor, as bool of its shape; of equals the earlier goes first."""
    flat = score.flatten()
    if prune <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = flat.kthvalue(prune).values
    below = flat < threshold
    tied = flat == threshold
    short = prune - int(below.sum())
    gone = below | (tied & (tied.cumsum(0) <= short))
    return ~gone.view(score.shape)


def keep_pattern(score: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """The `pattern.keep` largest of every `pattern.of` columns of a row; `score` (rows, columns) -> bool."""
    assert pattern.of is not None
    assert pattern.keep is not None
    parts = score.reshape(score.shape[0], -1, pattern.of)
    order = parts.argsort(dim=2, descending=False, stable=True)
    keep = torch.ones_like(parts, dtype=torch.bool)
    keep.scatter_(2, order[:, :, : pattern.of - pattern.keep], False)
    return keep.view(score.shape)


def keep_rows(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest of each row; `score` (rows, columns) -> bool."""
    order = score.argsort(dim=1, stable=True)
    keep = torch.ones_like(score, dtype=torch.bool)
    return keep.scatter_(1, order[:, :prune], False)
