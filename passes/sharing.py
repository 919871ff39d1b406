"""Work in units that stand alone: done once, journalled, shared among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rewright.passes.context import Context, Progress

T = TypeVar("T")


def each(
    context: Context,
    label: str,
    units: Mapping[str, T],
    size: Callable[[T], float],
    work: Callable[[str, T, Progress], Any],
) -> dict[str, Any]:
    """What `work` makes of every unit, which is JSON, by the unit's name and in the order of `units`.

    Each process does a run of units, of like `size` in all, one after the other. `work` takes a unit's name, the unit,
    and a bar that it advances by the unit's size; when it returns, what it wrote must be on the disk, for then the unit
    is on record, and a resume with any number of processes does not do it again.
    """
    names, done, world = list(units), context.journal.done, context.world
    own = [names[place] for place in world.share([size(units[name]) for name in names])]
    with context.reporter.progress(label, sum(size(units[name]) for name in own)) as bar:
        for name in own:
            if name in done:
                bar.advance(size(units[name]))
            else:
                context.journal.record(name, work(name, units[name], bar))
    found: dict[str, Any] = {}
    for theirs in world.together({name: done[name] for name in own}):
        found |= theirs
    return found
