"""What a fit is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rules:
    """The norm that a fit minimises, and the recurrences that it may choose.

    limit      every mode shrinks by 1 / limit a step at least.
    horizon    None for the window of the samples; else the number of steps up to which the recurrence counts, the
               samples being followed by zeros.
    noise      relative precision in which the recurrence will run. Each mode's rounding is an error like any other: its
               norm times `noise` counts beside the misfit, so that modes that cancel are chosen only where they pay.
    weighting  None, or [W] or [C, W] float64: the error is convolved with this before its norm is taken.
    """

    limit: float = float("inf")
    horizon: int | None = None
    noise: float = 1e-15
    weighting: torch.Tensor | None = None

    def rows(self, chosen: torch.Tensor) -> Rules:
        """Those of some of the filters."""
        if self.weighting is None or self.weighting.dim() == 1:
            return self
        return Rules(self.limit, self.horizon, self.noise, self.weighting[chosen])


PLAIN = Rules()
