"""The definition of `keep_largest` and `keep_of`, arranged to be fast on a CPU.

The order statistic comes from numpy, whose partition and sort use the widest vectors that a CPU has: ten times and
more faster than `torch.kthvalue` and `torch.sort`. Short patterns are ranked by comparing every pair of columns.
"""

from __future__ import annotations

import numpy as np
import torch

# Patterns up to this length are ranked by pairs, which takes length / 2 comparisons a score.
_PAIRS = 32
# Scores ranked at a time, so that they and their ranks stay in a core's cache.
_PIECE = 1 << 16


def keep_largest(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest; see the package for shapes and dtypes."""
    if prune == 0:
        return torch.ones(score.shape, dtype=torch.bool, device=score.device)
    flat = _sortable(score.reshape(1, -1))
    return _above(flat, prune).view(score.shape)


def keep_of(score: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """The `keep` largest of every `of` columns; see the package for shapes and dtypes."""
    rows, columns = score.shape
    by_column = columns_first(score)
    if score.numel() == 0 or keep in (0, of):
        found = torch.full((columns, rows) if by_column else (rows, columns), keep == of, device=score.device)
        return found.t() if by_column else found
    if of <= _PAIRS:
        kept = _by_pairs(score.t(), keep, of).t()
    else:
        kept = _above(_sortable(score.reshape(-1, of)), of - keep).view(rows, columns)
    return kept.t().contiguous().t() if by_column else kept.contiguous()


def columns_first(score: torch.Tensor) -> bool:
    """Whether the columns of a matrix are contiguous and its rows are not."""
    return score.stride(0) == 1 and score.stride(1) != 1


def _sortable(score: torch.Tensor) -> torch.Tensor:
    """Half precision widened, which keeps order and ties; numpy has no bfloat16."""
    return score.to(torch.promote_types(score.dtype, torch.float32)).contiguous()


def _above(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` >= 1 smallest of each row of a contiguous matrix."""
    threshold = _smallest(score, prune)[:, None]
    keep = score >= threshold
    # All below the threshold are gone; of those that equal it, the first ones still have to go.
    short = prune - (score.shape[1] - keep.sum(dim=1))
    row, column = (score == threshold).nonzero(as_tuple=True)
    ties = torch.bincount(row, minlength=len(score))
    place = torch.arange(len(row), device=score.device) - (ties.cumsum(0) - ties)[row]
    gone = place < short[row]
    keep[row[gone], column[gone]] = False
    return keep


def _smallest(score: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th smallest of each row."""
    if score.device.type != "cpu":
        return score.kthvalue(count, dim=1).values
    # numpy's partition takes quadratic steps where much is equal, as zeros of an earlier pruning are.
    tied = int((score == score.amin(dim=1, keepdim=True)).count_nonzero())
    values = score.numpy()
    order = np.sort(values) if tied * 16 > score.numel() else np.partition(values, count - 1)
    return torch.from_numpy(order[:, count - 1].copy())


def _by_pairs(columns: torch.Tensor, keep: int, of: int) -> torch.Tensor:
    """`columns` (c, r) to bool (c, r): a score stays when at least `of - keep` of its pattern are below it."""
    columns = columns.contiguous()
    rows = columns.shape[1]
    patterns = columns.view(-1, of, rows)
    kept = torch.empty(patterns.shape, dtype=torch.bool, device=columns.device)
    step = max(1, _PIECE // (of * rows))
    for start in range(0, len(patterns), step):
        part = patterns[start : start + step].unbind(1)
        below = torch.zeros((of, *part[0].shape), dtype=torch.uint8, device=columns.device).unbind(0)
        earlier = torch.empty_like(part[0], dtype=torch.bool)
        less = earlier.view(torch.uint8)
        for later in range(1, of):
            for first in range(later):
                torch.le(part[first], part[later], out=earlier)
                below[later].add_(less)
                # Below by one where the other is not: adding 1 and taking 1 off again, in eight bits.
                below[first].sub_(less)
        for place, (mine, out) in enumerate(zip(below, kept[start : start + step].unbind(1), strict=True)):
            mine.add_(of - 1 - place)
            torch.ge(mine, of - keep, out=out)
    return kept.view(columns.shape)
