"""What passes share that write a checkpoint tensor by tensor: layers as units of work, and sidecars."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.passes.context import Context, Progress
from rewright.passes.sharing import each


def unit_of(name: str) -> str:
    """What a tensor is written together with: its layer, by the first number in its name, or `rest`."""
    found = re.match(r"(.*?\.\d+)(\.|$)", name)
    return found[1] if found else "rest"


def units(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the unit that they are written in, in their order."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(unit_of(name), []).append(name)
    return found


def write_by_layer(
    context: Context, draft: Draft, label: str, names: Iterable[str], write: Callable[[str], Any]
) -> dict[str, Any]:
    """Call `write` for every name; a layer is on the disk and on record before the next, and a resume goes on from it.

    `write` puts what the name stands for into the draft; what it returns is JSON, and comes back by name. Processes
    share the layers.
    """

    def layer(unit: str, members: list[str], bar: Progress) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in members:
            found[name] = write(name)
            bar.advance()
        draft.sync()
        context.reporter.event("written", unit=unit, names=len(members))
        return found

    made = each(context, label, units(names), len, layer)
    return {name: value for found in made.values() for name, value in found.items()}


def carry(context: Context, source: Checkpoint, draft: Draft) -> None:
    """Carry the sidecars over, and warn of what stays behind."""
    behind = draft.carry(source)
    if behind:
        context.reporter.warn(f"not carried over: {', '.join(behind)}")
