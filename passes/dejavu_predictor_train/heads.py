"""A layer's router: one linear map from what the attention is fed to what each group of heads is worth."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.passes.dejavu_predictor_train.collect import Seen
from rewright.passes.dejavu_predictor_train.curves import Curves, curves
from rewright.passes.dejavu_predictor_train.predictor import RIDGE


@dataclass(frozen=True, slots=True)
class Routed:
    """`weight` [groups, width], `bias` [groups], float32, and the curves of the groups."""

    weight: torch.Tensor
    bias: torch.Tensor
    curves: Curves


def route(seen: Seen) -> Routed:
    """Least squares for the logarithm of what a group's absence costs, and what thresholds on it cost."""
    assert seen.attention is not None
    assert seen.routed is not None
    assert seen.attended is not None
    assert seen.group_costs is not None
    own = seen.attention.own / seen.attention.tokens
    ridge = RIDGE * own.diagonal()[:-1].mean() * torch.eye(len(own), dtype=torch.float64, device=own.device)
    ridge[-1, -1] = 0
    found = torch.linalg.solve(own + ridge, seen.routed / seen.attention.tokens).t().float()
    weight, bias = found[:, :-1].contiguous(), found[:, -1].contiguous()
    scores = torch.addmm(bias, seen.attended, weight.t())
    return Routed(weight, bias, curves(scores.t().contiguous(), seen.group_costs.t().contiguous()))
