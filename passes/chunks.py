"""How token rows are cut for a walk, and partial sums over the cuts, by numbers alone. Standard library only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

# Tokens that go through a layer together. Fixed: another number would round the sums otherwise.
BATCH_TOKENS = 1024
# What is summed over tokens is summed in so many runs of batches at most, which processes share.
CHUNKS = 16

# Elements that go through an exchange at a time, so that its buffers stay small beside what is added up.
PIECE = 1 << 23

# Numbers of logits that are there at a time.
LOGITS = 1 << 24

# (first term, number of terms)
Span = tuple[int, int]


def batches(rows: int, length: int, cuts: Iterable[int]) -> list[slice]:
    """Rows that go through a layer together, none across a cut."""
    size = max(1, BATCH_TOKENS // max(1, length))
    ends = sorted({0, rows, *(cut for cut in cuts if cut < rows)})
    return [slice(i, min(i + size, stop)) for start, stop in pairwise(ends) for i in range(start, stop, size)]


def rows_scored(length: int, vocabulary: int) -> int:
    """Rows of so many tokens that go through a whole model together: a batch's, fewer where their logits are large."""
    return max(1, min(BATCH_TOKENS, LOGITS // max(1, vocabulary)) // max(1, length))


def chunks(every: Sequence[slice]) -> list[list[slice]]:
    """Batches in runs that are summed apart."""
    count = min(CHUNKS, len(every))
    found: list[list[slice]] = [[] for _ in range(count)]
    for index, rows in enumerate(every):
        found[index * count // len(every)].append(rows)
    return found


def merge(spans: list[Span]) -> bool:
    """Put the last span and the one before together, if they are siblings in a binary tree over all terms."""
    if len(spans) < 2:
        return False
    (first, size), (second, other) = spans[-2:]
    if size != other or second != first + size or first % (2 * size):
        return False
    spans[-2:] = [(first, 2 * size)]
    return True


def merged(numbers: Iterable[int]) -> list[Span]:
    """The partial sums that are left of terms with these numbers."""
    spans: list[Span] = []
    for number in numbers:
        spans.append((number, 1))
        while merge(spans):
            pass
    return spans


def sent_of_piece(numel: int, width: int, parts: int, rank: int, world: int) -> int:
    """Bytes that a process sends of a piece of `parts` partial sums: others' slices, then its own slice to all."""
    slab = -(-numel // world)
    mine = max(0, min((rank + 1) * slab, numel) - rank * slab)
    return width * (parts * (numel - mine) + slab * (world - 1))


def sent(numel: int, width: int, parts: int, rank: int, world: int) -> int:
    """Bytes that a process sends for the sum of a tensor of which it has so many partial sums."""
    if world == 1:
        return 0
    pieces = [min(PIECE, numel - start) for start in range(0, numel, PIECE)]
    return sum(sent_of_piece(piece, width, parts, rank, world) for piece in pieces)
