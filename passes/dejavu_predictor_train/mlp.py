"""The first matrices of an MLP, and what neurons make of what they are fed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.layer import Layer
from rewright.passes.models.activations import activate


@dataclass(frozen=True, slots=True)
class Matrices:
    """The first matrices of an MLP, float32: `gate` is that whose outputs decide which neurons are on."""

    activation: str
    first: torch.Tensor
    bias: torch.Tensor
    up: torch.Tensor | None
    up_bias: torch.Tensor | None

    def made(self, fed: torch.Tensor, rows: slice) -> torch.Tensor:
        """What some neurons make of [tokens, width], [tokens, neurons]."""
        first = torch.addmm(self.bias[rows], fed, self.first[rows].t())
        if self.up is None:
            return activate(self.activation, first)
        assert self.up_bias is not None
        return activate(self.activation, torch.addmm(self.up_bias[rows], fed, self.up[rows].t()), first)


def matrices(job: Job, layer: Layer) -> Matrices:
    """The MLP's first matrices of a layer."""

    def one(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        slot = layer.linears[name]
        weight = slot.weight.float()
        return weight, weight.new_zeros(len(weight)) if slot.bias is None else slot.bias.float()

    places = job.shape.places
    if not places.gate:
        return Matrices(job.shape.activation, *one(places.up), None, None)
    return Matrices(job.shape.activation, *one(places.gate), *one(places.up))
