"""Which weights stay: exact counts, ties broken by position."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rewright.kernels.select import keep_largest, keep_of
from rewright.passes.compress.plan import Matrix
from rewright.passes.values import Pattern


def choose(
    score: torch.Tensor,
    members: Sequence[Matrix],
    pattern: Pattern,
    span: tuple[int, int],
    *,
    share: float = 1.0,
) -> torch.Tensor:
    """The weights of the highest scores in some columns of stacked matrices, as bool of the score's shape.

    `score` (rows, stop - start) for the columns `span` = (start, stop); `members` are the matrices whose rows are
    stacked, each with its own sparsity, of which `share` is due. Spans that follow each other make up a matrix's
    count exactly. With an N:M pattern the span holds whole runs of M.
    """
    start, stop = span
    keep = torch.empty_like(score, dtype=torch.bool)
    first = 0
    for matrix in members:
        part = slice(first, first + matrix.rows)
        own = score[part]
        if pattern.of is not None and pattern.keep is not None:
            keep[part] = keep_of(own, pattern.of - round((pattern.of - pattern.keep) * share), pattern.of)
        else:
            due = [round(matrix.rows * column * matrix.sparsity * share) for column in (start, stop)]
            keep[part] = keep_largest(own, due[1] - due[0])
        first += matrix.rows
    return keep


def keep_rows(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest of each row; `score` (rows, columns) -> bool."""
    return keep_of(score, score.shape[1] - prune, score.shape[1])
