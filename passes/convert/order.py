"""In which order tensors are laid out, so that a conversion and back makes the same files. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Callable

from rewright.formats.dtypes import BITS
from rewright.passes.convert.plan import Plan
from rewright.passes.spec import Layout


def ordered(plan: Plan, layout: Layout) -> list[str]:
    """The packed modules of a source and its other tensors, in the order that they were laid out in.

    Files have their widest elements first, and only among tensors of one width the order of the layout. A tensor's
    place between two modules is read where modules have tensors as wide. Where they have none, it goes by name, in the
    order that the modules are in, as writers of dense files sort by it.
    """
    index = {module: number for number, module in enumerate(plan.modules)}
    lines: dict[int, list[tuple[str, str | None]]] = {}
    for name, (dtype, _) in layout.tensors.items():
        module = plan.owner(name)
        lines.setdefault(BITS[dtype], []).append((name, module.name if module is not None else None))
    gaps: dict[str, int] = {}
    key = _key(list(plan.modules))
    names = [key(f"{module}.weight") for module in plan.modules]
    for line in lines.values():
        apart = all(owner is None for _, owner in line)
        gap = 0
        for name, owner in line:
            if owner is not None:
                gap = max(gap, index[owner] + 1)
                continue
            while apart and gap < len(names) and names[gap] < key(name):
                gap += 1
            gaps[name] = gap
    before: dict[int, list[str]] = {}
    for name in layout.tensors:
        if name in gaps:
            before.setdefault(gaps[name], []).append(name)
    found: list[str] = []
    for number, module_name in enumerate(plan.modules):
        found += [*before.get(number, ()), module_name]
    return found + before.get(len(index), [])


def _key(modules: list[str]) -> Callable[[str], list[tuple[int, str]]]:
    """What modules are sorted by: their names as text, or with numbers in them as numbers."""
    if modules == sorted(modules, key=lambda name: f"{name}.weight"):
        return lambda name: [(0, name)]
    return lambda name: [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
