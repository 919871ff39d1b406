"""What those who read a packed result ask of it: plain transformers, and servers. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rewright.passes.errors import InputError
from rewright.passes.models.families import Family, listed

if TYPE_CHECKING:
    from rewright.passes.compress.plan import Matrix, Plan

_HINT = "use `--format dense`, which writes the compressed weights decoded"


def shared_width(matrices: Sequence[Matrix]) -> int:
    """The greatest width that divides those of all experts, whose groups must be alike; 0 where there are none."""
    return math.gcd(*(matrix.columns for matrix in matrices if matrix.expert))


def refuse(
    family: Family, model_type: str, matrices: Sequence[Matrix], left: Sequence[str], *, symmetric: bool
) -> None:
    """Raise InputError for packed matrices that plain transformers would refuse, or take for noise.

    Beside other packed matrices it reads experts packed in one way, or all of them dense in one tensor. `left` has the
    modules that stay as they are.
    """
    packed = [matrix for matrix in matrices if matrix.quantised]
    if not packed:
        return
    if family.matrix_class != "Linear":
        raise InputError(
            f"plain transformers cannot run a packed `{model_type}`: its matrices are {family.matrix_class}", hint=_HINT
        )
    experts = [matrix for matrix in matrices if matrix.expert]
    if not symmetric and any(matrix.quantised for matrix in experts):
        raise InputError(
            "plain transformers cannot read packed experts with zero points",
            hint="use `--symmetric`, or `--format dense`",
        )
    fused = next((matrix for matrix in experts if matrix.quantised and matrix.part is not None), None)
    if fused is not None:
        raise InputError(
            f"plain transformers cannot read packed experts from one tensor, as `{fused.tensor}` is",
            hint=f"{_HINT}, or leave experts as they are with `--skip experts`",
        )
    apart = [matrix for matrix in experts if matrix.part is None]
    named = {matrix.module: f"{matrix.bits} bits" for matrix in apart}
    named.update((module, "left as it is") for module in left if family.experts_of(module) == "one")
    one, said = next(iter(named.items()), ("", ""))
    odd = next((module for module in named if named[module] != said), None)
    if odd is not None:
        raise InputError(
            f"plain transformers reads all packed experts alike: `{one}` is {said}, `{odd}` {named[odd]}",
            hint="let `--skip`, `--bits-for` and `--bits` treat experts as one, or use `--format dense`",
        )
    if one and not (apart and apart[0].quantised):
        raise InputError(
            f"plain transformers cannot read `{one}` in 16 bits beside packed matrices",
            hint="compress the experts too, or use `--format dense`",
        )


def splits(plan: Plan) -> list[str]:
    """What to warn of: matrices that servers fuse, and want in one scheme, but that are packed in several."""
    said: dict[tuple[str, ...], list[int]] = {}
    layers: dict[int, dict[str, tuple[int, int | None] | None]] = {}
    for matrix in plan.matrices:
        scheme = (matrix.bits, matrix.group) if matrix.quantised else None
        layers.setdefault(matrix.layer, {})[matrix.local] = scheme
    for layer, found in layers.items():
        for parts in plan.family.fused_sets:
            if len({found.get(part) for part in parts}) > 1:
                said.setdefault(parts, []).append(layer)
    return [
        f"servers fuse {listed(parts)} and want them alike, which they are not in"
        f" {f'layer {at[0]}' if len(at) == 1 else f'{len(at)} layers'}"
        for parts, at in said.items()
    ]
