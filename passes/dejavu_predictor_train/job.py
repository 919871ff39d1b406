"""A run under way: what it was asked, what it reads, and on which tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.passes.context import Context
from rewright.passes.dejavu_predictor_train.spec import DejavuOptions
from rewright.passes.models.sites import Shape, Site, Target


@dataclass(frozen=True, slots=True)
class Job:
    """`tokens` (rows, length): the first `fit` rows train predictors, the next `settling` settle thresholds, the rest
    is held out. `counted`, of the same shape, is False where a text begins: there the model is elsewhere, and decoding
    never starts."""

    context: Context
    options: DejavuOptions
    source: Checkpoint
    shape: Shape
    targets: tuple[Target, ...]
    tokens: torch.Tensor
    counted: torch.Tensor
    fit: int
    settling: int

    @property
    def walked(self) -> torch.Tensor:
        """The rows that go through the layers one by one."""
        return self.tokens[: self.fit + self.settling]

    @property
    def held_out(self) -> torch.Tensor:
        return self.tokens[self.fit + self.settling :]

    @property
    def sites(self) -> list[Site]:
        """The sites with a threshold a column."""
        return self.shape.covered(self.targets)["inputs"]

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight as a decoder reads it: what prices are counted by."""
        return 2


def counted(tokens: torch.Tensor, start: list[int]) -> torch.Tensor:
    """Where tokens (rows, length) count: not at the first place of a row, nor where a text starts."""
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 0] = False
    for token in start:
        kept &= tokens != token
    return kept
