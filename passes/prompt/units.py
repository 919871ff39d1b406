"""How the windows of a step are cut into units, by numbers alone. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Tokens that go through the model together, the prompt's included. Fixed: another number would round sums otherwise.
UNIT_TOKENS = 2048


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a model has; None where its config sets no limit."""
    text = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else config
    assert isinstance(text, Mapping)
    found = text.get("max_position_embeddings", text.get("n_positions"))
    return found if isinstance(found, int) else None


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
