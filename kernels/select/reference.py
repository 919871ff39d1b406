"""The definition of `keep_largest` and `keep_of`, arranged to be fast on a CPU.

The order statistic comes from numpy, whose partition and sort use the widest vectors that a CPU has: ten times and
more faster than `torch.kthvalue` and `torch.sort`; scores on another device go through host memory for it. Short
patterns are ranked by comparing every pair of columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

# Patterns up to this length are ranked by pairs, which takes length / 2 comparisons a score.
_PAIRS = 8
# Scores ranked at a time, so that they and their ranks stay in a core's cache.
_PIECE = 1 << 16


def keep_largest(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest; see the package for shapes and dtypes."""
    if prune == 0:
        return torch.ones(score.shape, dtype=torch.bool, device=score.device)
    kept = _above(_sortable(score.reshape(1, -1)), prune)
    return torch.from_numpy(kept).view(score.shape).to(score.device)


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
        above = _above(_sortable(score.reshape(-1, of)), of - keep)
        kept = torch.from_numpy(above).view(rows, columns).to(score.device)
    return kept.t().contiguous().t() if by_column else kept.contiguous()


def columns_first(score: torch.Tensor) -> bool:
    """Whether the columns of a matrix are contiguous and its rows are not."""
    return score.stride(0) == 1 and score.stride(1) != 1


def _sortable(score: torch.Tensor) -> npt.NDArray[Any]:
    """The scores in host memory; half precision widened, which keeps order and ties: numpy has no bfloat16."""
    values: npt.NDArray[Any] = score.to("cpu", torch.promote_types(score.dtype, torch.float32)).contiguous().numpy()
    return values


def _above(score: npt.NDArray[Any], prune: int) -> npt.NDArray[np.bool_]:
    """All but the `prune` >= 1 smallest of each row of a contiguous matrix."""
    threshold = _smallest(score, prune)
    keep: npt.NDArray[np.bool_] = score >= threshold
    # All below the threshold are gone; of those that equal it, the first ones still have to go.
    short = prune - (score.shape[1] - np.add.reduce(keep.view(np.uint8), axis=1, dtype=np.int64))
    tied = np.flatnonzero(score == threshold)
    row = tied // score.shape[1]
    place = np.arange(len(tied)) - np.searchsorted(row, np.arange(len(score)))[row]
    keep.reshape(-1)[tied[place < short[row]]] = False
    return keep


def _smallest(score: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """The `count`-th smallest of each row, as a column."""
    # numpy's partition is many times slower than its sort where much is equal, as zeros of an earlier pruning are.
    tied = np.count_nonzero(score == score.min(axis=1, keepdims=True))
    order = np.sort(score) if tied * 16 > score.size else np.partition(score, count - 1)
    return order[:, count - 1 : count]


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
