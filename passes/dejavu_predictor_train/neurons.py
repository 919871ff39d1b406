"""A layer's predictor of neurons: its rank, how it is stored, and what raising each neuron's threshold costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rewright.formats import predictors
from rewright.passes.dejavu_predictor_train import learned
from rewright.passes.dejavu_predictor_train.collect import Seen
from rewright.passes.dejavu_predictor_train.curves import Curves, curves
from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.mlp import Matrices, matrices
from rewright.passes.dejavu_predictor_train.predictor import Factors, Predictor, fit, settle
from rewright.passes.dejavu_predictor_train.spec import COMPARED, RANKS, RECALL, predictor_bytes
from rewright.passes.layer import Layer

# Neurons that are gone through together.
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Trained:
    """A layer's predictor and its curves."""

    predictor: Predictor
    curves: Curves


def train(job: Job, layer: Layer, seen: Seen, sensitivity: torch.Tensor) -> Trained:
    """Fit a layer's predictor and settle what its thresholds cost. `sensitivity` float32 [neurons]."""
    assert seen.read is not None
    assert seen.fed is not None
    held = matrices(job, layer)
    found = imported(job, layer.index) or _fitted(job, layer.index, seen, held, sensitivity)
    spread = found.scores(seen.read[:4096]).std(0)
    predictor = settle(found, spread, job.options.predictor_dtype)
    parts = [_curves(seen, held, predictor.factors, sensitivity, rows) for rows in _blocks(len(held.first))]
    return Trained(predictor, _joined(parts))


def imported(job: Job, index: int) -> Factors | None:
    """The predictor that the run was given for a layer."""
    if job.options.predictors is None:
        return None
    path = job.options.predictors.files[index]
    halves = predictors.read(path, job.context.inputs.read(path), job.shape.width, job.shape.neurons)
    device = job.context.device
    none = torch.zeros(job.shape.neurons) if halves.bias is None else halves.bias
    a, b = halves.a.to(device), halves.b.to(device)
    return Factors(a, torch.zeros(len(a), device=device), b, none.to(device), halves.relu)


def _fitted(job: Job, index: int, seen: Seen, held: Matrices, sensitivity: torch.Tensor) -> Factors:
    """The predictor that this run fits, and learns."""
    assert seen.moments is not None
    assert seen.fed is not None
    options, most = job.options, job.options.rank.count or min(RANKS[-1], job.shape.width)
    importance = None if options.method == "svd" else _importance(held, seen.fed, sensitivity)
    whole = fit(seen.moments, held.first, held.bias, importance, most)
    ranks = [options.rank.count] if options.rank.count else [rank for rank in RANKS if rank <= max(8, most // 2)]
    rank = ranks[0] if len(ranks) == 1 else _cheapest(job, seen, held, whole, sensitivity, ranks)
    found = whole.cut(rank)
    if options.method == "bce":
        assert seen.training is not None
        found = learned.learn(job, index, found, held, seen.training)
    return found


def _blocks(neurons: int) -> list[slice]:
    return [slice(first, min(first + BLOCK, neurons)) for first in range(0, neurons, BLOCK)]


def _joined(parts: list[Curves]) -> Curves:
    return Curves(
        torch.cat([part.slopes for part in parts]), torch.cat([part.thresholds for part in parts]), parts[0].share
    )


def _importance(held: Matrices, fed: torch.Tensor, sensitivity: torch.Tensor) -> torch.Tensor:
    """How much an error in a neuron's input matters: what its output's does, and of a gated one times its partner."""
    if held.up is None:
        return sensitivity
    assert held.up_bias is not None
    partner = torch.addmm(held.up_bias, fed[:4096], held.up.t())
    return sensitivity * partner.square().mean(0)


def _curves(seen: Seen, held: Matrices, factors: Factors, sensitivity: torch.Tensor, rows: slice) -> Curves:
    """The curves of some neurons."""
    assert seen.read is not None
    assert seen.fed is not None
    scores = torch.addmm(factors.c[rows], factors.hidden(seen.read), factors.b[rows].t())
    costs = held.made(seen.fed, rows).square_().mul_(0.5 * sensitivity[rows])
    return curves(scores.t().contiguous(), costs.t().contiguous())


def _cheapest(job: Job, seen: Seen, held: Matrices, whole: Factors, sensitivity: torch.Tensor, ranks: list[int]) -> int:
    """The rank at which predictor and rows together are the fewest bytes, for the recall that runs keep by default."""
    neurons = len(held.first)
    step = max(1, neurons // COMPARED)
    some = torch.arange(0, neurons, step)
    part = Matrices(
        held.activation,
        held.first[some],
        held.bias[some],
        None if held.up is None else held.up[some],
        None if held.up_bias is None else held.up_bias[some],
    )
    row_bytes = job.shape.row_weights(neuron=True) * job.weight_bytes
    recall = job.options.recall or RECALL
    found: dict[int, float] = {}
    for rank in ranks:
        cut = whole.cut(rank)
        density = density_at(_curves(seen, part, cut.of(some), sensitivity[some], slice(None)), recall)
        found[rank] = predictor_bytes(job.options, job.shape, rank) + density * neurons * row_bytes
    return min(found, key=lambda rank: found[rank])


def density_at(found: Curves, recall: float) -> float:
    """The share of token-reads that are left when units at one price keep this share of what dropping all would
    cost."""
    order = found.slopes.flatten().argsort()
    share = found.share.expand_as(found.slopes).flatten()[order]
    lost = (found.slopes.flatten()[order] * share).cumsum(0)
    allowed = (1 - recall) * float(lost[-1])
    taken = int(torch.searchsorted(lost, lost.new_tensor(allowed), right=True))
    return 1 - float(share[:taken].sum()) / found.units
