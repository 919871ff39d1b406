"""What the parts of a `compress` run share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.draft import Draft
from rewright.formats.dtypes import to_torch
from rewright.passes.compress import output
from rewright.passes.compress.fit import Fitter
from rewright.passes.compress.plan import Matrix, Plan
from rewright.passes.compress.solve import Solved
from rewright.passes.compress.spec import CompressOptions
from rewright.passes.context import Context
from rewright.passes.loading import Assembly, stored_dtype


@dataclass(frozen=True, slots=True)
class Job:
    """A run on its way from a source to a draft, under a plan."""

    context: Context
    options: CompressOptions
    plan: Plan
    source: Checkpoint
    assembly: Assembly
    draft: Draft

    @property
    def fitter(self) -> Fitter:
        stored = to_torch(self.plan.scales)
        assert stored is not None
        return Fitter(self.options, stored, self.context.reporter, self.context.world)

    @property
    def writers(self) -> tuple[str, ...]:
        """The matrices of a layer that write to the residual stream."""
        return self.plan.family.writes(self.source.config or {})

    def original(self, matrix: Matrix) -> torch.Tensor:
        """A matrix of the source, float32 (rows, columns): from the file, as `--dtype` may round what is run."""
        return matrix.turned(output.read_matrix(self.source, matrix)).float().to(self.context.device)

    def stored(self, solved: Solved) -> torch.Tensor:
        """A compressed matrix, float32 (rows, columns), with the rounding that the model's own dtype brings."""
        return solved.weight.to(stored_dtype(self.source)).float()

    def running(self, matrix: Matrix) -> torch.Tensor:
        """A written matrix as the walk goes on with it, in the dtype and layout of the running model."""
        return output.read_back(self.draft, matrix, self.options, self.assembly.dtype)
