"""How the windows of a step are cut into units, by numbers alone. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence

# Tokens that go through the model together, the prompt's included. Fixed: another number would round sums otherwise.
UNIT_TOKENS = 2048


def units(lengths: Sequence[int], before: int) -> list[list[int]]:
    """Windows, by their places among `lengths`, in groups of like length that go through the model together.

    `before` tokens of prompt stand in front of each, and a group is padded to its longest.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        if not found or (len(found[-1]) + 1) * (before + lengths[place]) > UNIT_TOKENS:
            found.append([])
        found[-1].append(place)
    return found
