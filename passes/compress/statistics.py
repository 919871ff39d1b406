"""What a layer's matrices see: one Hessian for each input that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rewright.kernels.hessian_update import hessian_update
from rewright.passes.compress.plan import Matrix
from rewright.passes.errors import BoundError
from rewright.passes.walk import Layer


@dataclass(frozen=True, slots=True)
class SharedInput:
    """Matrices fed by one tensor, and H = X^T X / tokens of it, float32 (columns, columns).

    `own` is taken over the calibration rows, `held_out` over the others (None without any); `tokens` counts the
    former.
    """

    matrices: list[Matrix]
    own: torch.Tensor
    held_out: torch.Tensor | None
    tokens: int


@dataclass(slots=True)
class _Sum:
    matrices: list[Matrix] = field(default_factory=list)
    own: torch.Tensor | None = None
    held_out: torch.Tensor | None = None
    own_tokens: int = 0
    held_out_tokens: int = 0

    def add(self, inputs: torch.Tensor, cut: int) -> None:
        """Rows before `cut` belong to the calibration, the rest are held out."""
        size = inputs.shape[1]
        own, apart = inputs[:cut], inputs[cut:]
        if len(own):
            self.own = self._update(self.own, own, size)
            self.own_tokens += len(own)
        if len(apart):
            self.held_out = self._update(self.held_out, apart, size)
            self.held_out_tokens += len(apart)

    @staticmethod
    def _update(total: torch.Tensor | None, part: torch.Tensor, size: int) -> torch.Tensor:
        if total is None:
            total = part.new_zeros(size, size, dtype=torch.float32)
        hessian_update(total, part, 1.0)
        return total

    def finished(self) -> SharedInput:
        assert self.own is not None
        if not bool(torch.isfinite(self.own.diagonal()).all()):
            raise BoundError(f"activations into `{self.matrices[0].name}` are not finite", hint="try `--dtype f32`")
        apart = None if self.held_out is None else self.held_out.div_(self.held_out_tokens)
        return SharedInput(self.matrices, self.own.div_(self.own_tokens), apart, self.own_tokens)


def gather(layer: Layer, matrices: Sequence[Matrix], samples: int) -> list[SharedInput]:
    """Run a layer's batches and sum the Hessians; the first `samples` token rows are the calibration's.

    Raises BoundError naming a matrix whose inputs are not finite.
    """
    wanted = {matrix.local: matrix for matrix in matrices}
    sums: dict[str, _Sum] = {}
    for batch in layer.inputs():
        leaders: dict[int, str] = {}
        inside = max(0, min(samples, batch.rows.stop) - batch.rows.start)
        for path, matrix in wanted.items():
            inputs = batch.inputs[path]["compressed"]
            leader = leaders.setdefault(id(inputs), path)
            shared = sums.setdefault(leader, _Sum())
            if matrix not in shared.matrices:
                shared.matrices.append(matrix)
            if leader == path:
                length = inputs.shape[0] // (batch.rows.stop - batch.rows.start)
                shared.add(inputs, inside * length)
    return [shared.finished() for shared in sums.values()]
