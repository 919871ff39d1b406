"""What a solve is split into: all matrices of an input, or one of them, or where it is large some of its rows.

The cut depends on shapes alone and each unit's arithmetic on the unit alone, so a result has the same bytes
whichever process solves which unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rewright.passes.compress.plan import Matrix

# Weights past which the matrices of an input are solved apart, and past which a matrix is cut. With fewer, the calls
# of a column cost more than its arithmetic.
APART, WEIGHTS = 1 << 18, 1 << 20
# Rows come in multiples of this, which hold whole words of packed codes and zero points whatever their bits.
ROWS = 32


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows `first` to `stop` of the stacked matrices of an input; `members` are those matrices, or a part of one."""

    members: tuple[Matrix, ...]
    first: int
    stop: int

    @property
    def cost(self) -> float:
        """Operations of a solve, but for a factor."""
        return (self.stop - self.first) * self.members[0].columns ** 2

    @property
    def rows(self) -> slice:
        return slice(self.first, self.stop)


def whole(matrices: Sequence[Matrix]) -> list[Unit]:
    """All matrices of an input as one unit."""
    return [Unit(tuple(matrices), 0, sum(matrix.rows for matrix in matrices))]


def units_of(matrices: Sequence[Matrix]) -> list[Unit]:
    """The units of the matrices of an input, by their rows.

    Experts stay whole: there are enough of them. So do those whose rows are not the rows of a stored tensor.
    """
    columns, rows = matrices[0].columns, sum(matrix.rows for matrix in matrices)
    kept = any(matrix.expert or matrix.transposed or matrix.part is not None for matrix in matrices)
    if kept or rows * columns <= min(APART, WEIGHTS):
        return whole(matrices)
    found: list[Unit] = []
    first = 0
    for matrix in matrices:
        pieces = math.ceil(matrix.rows * columns / WEIGHTS)
        size = math.ceil(matrix.rows / pieces / ROWS) * ROWS
        for start in range(0, matrix.rows, size):
            stop = min(start + size, matrix.rows)
            piece = matrix if stop - start == matrix.rows else matrix.cut(start, stop)
            found.append(Unit((piece,), first + start, first + stop))
        first += matrix.rows
    return found
