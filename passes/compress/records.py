"""Which N:M patterns the records of `--format bitmask-w4` can hold. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewright.formats.bitmask import FORM, Bitmask
from rewright.passes.errors import UsageError
from rewright.passes.values import Pattern

if TYPE_CHECKING:
    from rewright.passes.compress.plan import Matrix


def record_of(matrix: Matrix, pattern: Pattern) -> Bitmask:
    """What a matrix keeps of each of its groups; the pattern has an N and an M, and M divides the group."""
    assert pattern.keep is not None
    assert pattern.of is not None
    group = matrix.group or matrix.columns
    return Bitmask(group, group * pattern.keep // pattern.of)


def check(matrices: Sequence[Matrix], pattern: Pattern) -> None:
    """Raise UsageError naming a matrix whose groups the pattern, or the form, does not fit."""
    assert pattern.keep is not None
    assert pattern.of is not None
    for matrix in matrices:
        group = matrix.group or matrix.columns
        fault = record_of(matrix, pattern).fault()
        if group % pattern.of:
            said = f"`--pattern {pattern}` has no whole number of runs in groups of {group}, as `{matrix.name}` has"
        elif fault is not None:
            said = f"`--format {FORM}` cannot hold `--pattern {pattern}` in `{matrix.name}`: {fault}"
        else:
            continue
        raise UsageError(said, hint=_hint(matrices, pattern.keep / pattern.of))


def pattern_for(group: int, kept: float) -> str:
    """The N:M of one group that is nearest to keeping this share, an even N."""
    return f"{min(max(2, 2 * round(group * kept / 2)), group - 2)}:{group}"


def _hint(matrices: Sequence[Matrix], kept: float) -> str:
    shared = math.gcd(*(matrix.group or matrix.columns for matrix in matrices))
    if shared % 8 == 0:
        return f"use `--pattern {pattern_for(shared, kept)}`, or `--format pack-quantized`"
    return "use a `--group-size` that is a multiple of 8 and divides every width, or `--format pack-quantized`"
