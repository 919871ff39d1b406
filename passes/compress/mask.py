"""Which weights stay: exact counts, ties broken by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rewright.kernels.select import keep_largest, keep_of
from rewright.passes.compress.plan import Matrix
from rewright.passes.compress.spread import keep_largest_spread
from rewright.passes.values import Pattern
from rewright.passes.world import World


@dataclass(frozen=True, slots=True)
class Spread:
    """Matrices that are cut, in the order of their rows, and the processes that have their parts."""

    matrices: tuple[Matrix, ...]
    world: World


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
    count exactly. With an N:M pattern the span holds whole runs of M. Rows of a cut matrix are chosen among alone.
    """
    keep = torch.empty_like(score, dtype=torch.bool)
    first = 0
    for matrix in members:
        part = slice(first, first + matrix.rows)
        own = score[part]
        if pattern.of is not None and pattern.keep is not None:
            keep[part] = keep_of(own, pattern.of - round((pattern.of - pattern.keep) * share), pattern.of)
        else:
            keep[part] = keep_largest(own, _due(matrix, matrix.rows, span, share))
        first += matrix.rows
    return keep


def choose_spread(
    scores: Sequence[torch.Tensor],
    stacks: Sequence[Sequence[Matrix]],
    pattern: Pattern,
    span: tuple[int, int],
    spread: Spread,
    *,
    share: float = 1.0,
) -> list[torch.Tensor]:
    """`choose` for several stacks, of which some are parts of one matrix, whose weights are then chosen among together.

    Every process comes here, be it with no stack at all, where a matrix of `spread` is cut.
    """
    if pattern.of is not None or not spread.matrices:
        return [
            choose(score, members, pattern, span, share=share) for score, members in zip(scores, stacks, strict=True)
        ]
    names = [members[0].name if members[0].is_cut else None for members in stacks]
    places = [[place for place, name in enumerate(names) if name == matrix.name] for matrix in spread.matrices]
    found = keep_largest_spread(
        [[scores[place] for place in mine] for mine in places],
        [_due(matrix, matrix.rows, span, share) for matrix in spread.matrices],
        spread.world,
    )
    kept = {
        place: keep for mine, keeps in zip(places, found, strict=True) for place, keep in zip(mine, keeps, strict=True)
    }
    # what is not cut, beside what is
    return [
        kept[place] if place in kept else choose(scores[place], stacks[place], pattern, span, share=share)
        for place in range(len(scores))
    ]


def _due(matrix: Matrix, rows: int, span: tuple[int, int], share: float) -> int:
    """The zeros that some columns must have."""
    start, stop = (round(rows * column * matrix.sparsity * share) for column in span)
    return stop - start


def keep_rows(score: torch.Tensor, prune: int) -> torch.Tensor:
    """All but the `prune` smallest of each row; `score` (rows, columns) -> bool."""
    return keep_of(score, score.shape[1] - prune, score.shape[1])
