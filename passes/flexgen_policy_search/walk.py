"""From a pair of batch sizes to better ones near it, by what each reaches as a linear program, pieces cut.

The scan shares caches of all kinds out alike, and experts in halves; so where a model has several kinds of caches, or
experts, its hills are a few percent off. A program of each pair is exact but takes milliseconds: a walk asks few.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from rewright.passes.flexgen_policy_search.hills import Problem, pair
from rewright.passes.flexgen_policy_search.place import place
from rewright.passes.flexgen_policy_search.roofline import Setting

# Steps along an axis, as ratios, wide ones first; then to the next whole numbers.
RATIOS = (1.5, 1.2, 1.07, 1.0)
# Less is no better place.
GAIN = 1e-7
Key = tuple[Setting, int, int]


@dataclass(slots=True)
class Walks:
    """What pairs reach at most, as far as any walk asked; a walk ends where none of its neighbours is better."""

    problem: Problem
    batch: int
    block: int
    known: dict[Key, float] = field(default_factory=dict)

    def reach(self, key: Key) -> float:
        """Tokens a second of a setting and a pair when pieces may be cut; 0 where nothing fits."""
        if key not in self.known:
            problem = self.problem
            made = place(pair(problem, *key), 0, problem.machine, most=problem.most, relaxed=True)
            self.known[key] = made.throughput if made is not None else 0.0
        return self.known[key]

    def walk(self, here: Key) -> Key:
        """The end of the walk from a pair."""
        for ratio in RATIOS:
            while True:
                setting, gbs, nb = here
                top = max(
                    ((setting, *near) for near in self._near(gbs, nb, ratio, row=setting.schedule == "row")),
                    key=self.reach,
                    default=here,
                )
                if self.reach(top) <= self.reach(here) * (1 + GAIN):
                    break
                here = top
        return here

    def _near(self, gbs: int, nb: int, ratio: float, *, row: bool) -> Iterator[tuple[int, int]]:
        """Pairs a step away along either axis, and along the ridge on which a block stays as large."""
        found = []
        for g in (max(gbs + 1, math.floor(gbs * ratio)), min(gbs - 1, math.ceil(gbs / ratio))):
            found += [(g, nb), (g, gbs * nb // max(1, g)), (g, gbs * nb // max(1, g) + 1)]
        for n in (max(nb + 1, math.floor(nb * ratio)), min(nb - 1, math.ceil(nb / ratio))):
            found += [(gbs, n), (gbs * nb // max(1, n), n)]
        for g, n in dict.fromkeys(found):
            if 1 <= g <= self.batch and n >= 1 and g * n <= self.block and (n == 1 or not row):
                yield g, n
