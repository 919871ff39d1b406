"""The matrices of a plan as a run meets them: which share an input, how many tokens reach them, what is held."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rewright.passes.models.families import FUSED
from rewright.passes.values import UNQUANTISED

if TYPE_CHECKING:
    from rewright.passes.compress.plan import Matrix, Plan
    from rewright.passes.compress.spec import CompressOptions
    from rewright.passes.spec import Layout

FLOAT = 4


@dataclass(frozen=True)
class Group:
    """Matrices that share an input, and the share of all tokens that reaches it (1, but for experts)."""

    members: tuple[Matrix, ...]
    share: float
    writes: bool

    @property
    def rows(self) -> int:
        return sum(matrix.rows for matrix in self.members)

    @property
    def columns(self) -> int:
        return self.members[0].columns

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def expert(self) -> bool:
        return self.members[0].expert

    @property
    def prunes(self) -> bool:
        return any(matrix.sparsity for matrix in self.members)

    @property
    def rounds(self) -> bool:
        return any(matrix.bits < UNQUANTISED for matrix in self.members)


@dataclass(frozen=True)
class Counting:
    """A run under a plan: `samples` sequences to calibrate on and `held_out` more, each of `length` tokens."""

    options: CompressOptions
    plan: Plan
    layout: Layout
    samples: int
    held_out: int
    length: int
    file_bytes: int

    @cached_property
    def layers(self) -> list[list[Group]]:
        """The groups of each layer, in the order in which a forward reaches them."""
        config = self.layout.config
        writers = self.plan.family.writes(config)
        chosen = config.get("num_experts_per_tok", config.get("experts_per_token"))
        found: dict[int, dict[tuple[Any, ...], list[Matrix]]] = {}
        for matrix in self.plan.matrices:
            found.setdefault(matrix.layer, {}).setdefault(self._place(matrix), []).append(matrix)
        layers = []
        for groups in found.values():
            experts = max(1, sum(key[0] == 1 and key[1] == 0 for key in groups))
            share = min(1.0, chosen / experts) if isinstance(chosen, int) else 1.0
            layers.append(
                [
                    Group(tuple(members), share if key[0] else 1.0, members[0].local in writers)
                    for key, members in sorted(groups.items())
                ]
            )
        return layers

    def _place(self, matrix: Matrix) -> tuple[int, int, str]:
        """Where a forward reaches a matrix, alike for those of one input: (experts, place, which of them)."""
        family = self.plan.family
        local = re.sub(r"\[\d+\]$", "", matrix.local)
        if matrix.expert:
            leaf = local.rsplit(".", 1)[-1]
            second = leaf not in (FUSED[0], *(family.experts.parts[:2] if family.experts else ()))
            number = re.search(r"\.(\d+)\.|\[(\d+)\]$", matrix.local)
            return 1, int(second), "" if number is None else number[1] or number[2]
        joint = next((parts[0] for parts in family.fused_sets if local in parts), local)
        return 0, family.linears.index(joint) if joint in family.linears else len(family.linears), joint

    @cached_property
    def width(self) -> int:
        return min(matrix.columns for matrix in self.plan.matrices)

    @cached_property
    def largest(self) -> int:
        """Weights of the largest layer."""
        return max(sum(group.weights for group in groups) for groups in self.layers)

    @cached_property
    def table(self) -> int:
        """Weights of the embedding, which the head has as many of."""
        return max(math.prod(shape) for _, shape in self.layout.tensors.values())

    @cached_property
    def whole(self) -> int:
        return sum(math.prod(shape) for _, shape in self.layout.tensors.values())

    @property
    def both(self) -> bool:
        """Whether the dense stream carries every sequence, and not just those held out."""
        return bool(self.options.fits_dense or self.options.tune or self.options.polish)

    @property
    def base(self) -> int:
        """Bytes that are there all the time: the embedding, a layer, and what it was."""
        return FLOAT * (self.table + 2 * self.largest)

    @property
    def hidden(self) -> int:
        """Bytes of the hidden states: the compressed stream's, the dense one's before and after a layer."""
        dense = self.samples + self.held_out if self.both else self.held_out
        return FLOAT * self.width * self.length * (self.samples + self.held_out + 2 * dense)

    def work(self, groups: Sequence[Group]) -> float:
        """Operations of a forward through some matrices, a token."""
        return sum(2 * group.share * group.weights for group in groups)

    @property
    def attention(self) -> float:
        """Operations of a layer's attention, a token."""
        return 4.0 * self.length * self.width

    def visits(self, groups: Sequence[Group]) -> list[Sequence[Group]]:
        """What is looked at in one forward, with everything before it: the beginnings of a layer."""
        if self.options.sequential == "layer":
            return [groups]
        ends = [
            place
            for place in range(1, len(groups) + 1)
            # all experts' first matrices are one visit, and so are their second
            if place == len(groups) or not (groups[place].expert and self._alike(groups[place - 1], groups[place]))
        ]
        return [groups[:end] for end in ends]

    def _alike(self, one: Group, other: Group) -> bool:
        return self._place(one.members[0])[:2] == self._place(other.members[0])[:2]

    @property
    def moments(self) -> float:
        """The most bytes of statistics at once, for the calibration's rows and for those held out."""
        dense = self.options.fits_dense
        most = 0.0
        for groups in self.layers:
            before = 0
            for visit in self.visits(groups):
                sizes = [
                    group.columns**2 + dense * group.columns * (group.rows if group.writes else group.columns)
                    for group in visit[before:]
                ]
                most = max(most, 2 * FLOAT * sum(sizes))
                before = len(visit)
        return most
