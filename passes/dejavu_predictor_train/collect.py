"""What a layer's sites are fed, as far as predictors and thresholds need it.

Moments of all tokens that predictors are fitted on are summed and the tokens are gone. Of those that settle thresholds
the inputs of this one layer are kept until it is done: never of two layers, and never what neurons make of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.predictor import Moments
from rewright.passes.dejavu_predictor_train.sensitivity import Sensitivity
from rewright.passes.layer import Layer
from rewright.passes.models.sites import Site

# Prices, in cost a byte, are counted in steps of an eighth of an octave from 2^LOWEST on.
PER_OCTAVE, LOWEST, STEPS = 8, -80.0, 8 * 112


@dataclass(slots=True)
class Histogram:
    """How many numbers at a site, and what leaving them out costs, by their cost a byte; float64 [STEPS]."""

    count: torch.Tensor
    cost: torch.Tensor
    tokens: int = 0

    @classmethod
    def empty(cls) -> Histogram:
        return cls(torch.zeros(STEPS, dtype=torch.float64), torch.zeros(STEPS, dtype=torch.float64))

    def add(self, inputs: torch.Tensor, sensitivity: torch.Tensor, bytes_each: int) -> None:
        """Take in tokens [tokens, columns]; a number costs half its square times `sensitivity` [columns]."""
        costs = inputs.float().square().mul_(0.5 * sensitivity).double()
        place = ((costs / bytes_each).log2_().sub_(LOWEST).mul_(PER_OCTAVE)).nan_to_num_(0.0, 0.0, 0.0)
        place = place.clamp_(0, STEPS - 1).long().flatten()
        self.count += torch.bincount(place.cpu(), minlength=STEPS)
        self.cost += torch.bincount(place.cpu(), costs.flatten().cpu(), minlength=STEPS)
        self.tokens += len(inputs)


@dataclass(slots=True)
class Seen:
    """What a layer met.

    `moments` of the predictor's input with that of the MLP; `attention` those of the attention's input, and `routed`
    [width + 1, groups] of it with the logarithm of what each group's absence costs. Of the settling tokens: `read` and
    `fed` [tokens, width], what the predictor and what the MLP is given, `attended` [tokens, width] and `group_costs`
    [tokens, groups]. `training` pairs the first two of the tokens that predictors are fitted on, where they are
    learned.
    """

    moments: Moments | None = None
    attention: Moments | None = None
    routed: torch.Tensor | None = None
    read: torch.Tensor | None = None
    fed: torch.Tensor | None = None
    attended: torch.Tensor | None = None
    group_costs: torch.Tensor | None = None
    training: tuple[torch.Tensor, torch.Tensor] | None = None
    histograms: dict[Site, Histogram] = field(default_factory=dict)


def gather(job: Job, layer: Layer, sensitivity: Sensitivity) -> Seen:
    """Run a layer's tokens up to what its sites need."""
    predicts, routes = "mlp" in job.targets, "heads" in job.targets
    needed: dict[Site, str] = {site: job.shape.members(site)[0] for site in job.sites}
    if predicts:
        needed["mlp_in"] = job.shape.members("mlp_in")[0]
    if routes:
        needed |= {site: job.shape.members(site)[0] for site in ("attn_in", "attn_out")}
    seen = Seen(histograms={site: Histogram.empty() for site in job.sites})
    kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("read", "fed", "attended", "group_costs", "x", "y")}
    own, cross, attention, routed = None, None, None, None
    tokens = 0
    for batch in layer.meet(list(needed.values()), dense=False):
        met = {site: batch.seen[path]["compressed"].inputs for site, path in needed.items()}
        places = torch.arange(batch.rows.start, batch.rows.stop).repeat_interleave(job.tokens.shape[1])
        counts = job.counted[batch.rows].flatten()
        fits, settles = counts & (places < job.fit), counts & (places >= job.fit)
        device = next(iter(met.values())).device
        fits, settles = fits.to(device), settles.to(device)
        for site, histogram in seen.histograms.items():
            histogram.add(
                met[site][settles], sensitivity[layer.index, site].to(device), job.shape.rows(site) * job.weight_bytes
            )
        tokens += int(fits.sum())
        if predicts:
            y = met["mlp_in"]
            x = (
                y
                if job.options.input == "post_norm"
                else layer.walk.hidden("compressed", batch.rows).flatten(0, 1).to(device)
            )
            own = _plus(own, _moment(x[fits], x[fits]))
            if x is not y:
                cross = _plus(cross, _moment(y[fits], x[fits])[:-1])
            kept["read"].append(x[settles].float())
            kept["fed"].append(y[settles].float())
            if job.options.method == "bce":
                kept["x"].append(x[fits].float())
                kept["y"].append(y[fits].float())
        if routes:
            a = met["attn_in"]
            costs = group_costs(job, met["attn_out"], sensitivity[layer.index, "attn_out"].to(device))
            attention = _plus(attention, _moment(a[fits], a[fits]))
            routed = _plus(routed, _with_one(a[fits]).t() @ costs[fits].clamp(min=1e-30).log().double())
            kept["attended"].append(a[settles].float())
            kept["group_costs"].append(costs[settles])
    if own is not None:
        seen.moments = Moments(tokens, own, cross)
        seen.read, seen.fed = torch.cat(kept["read"]), torch.cat(kept["fed"])
    if attention is not None:
        seen.attention, seen.routed = Moments(tokens, attention, None), routed
        seen.attended, seen.group_costs = torch.cat(kept["attended"]), torch.cat(kept["group_costs"])
    if kept["x"]:
        seen.training = torch.cat(kept["x"]), torch.cat(kept["y"])
    return seen


def group_costs(job: Job, attended: torch.Tensor, sensitivity: torch.Tensor) -> torch.Tensor:
    """What it costs to leave each group of heads out, float32 [tokens, groups], for what o is fed [tokens, columns]."""
    costs = attended.float().square() * (0.5 * sensitivity)
    return costs.view(len(attended), job.shape.groups, job.shape.group_width).sum(-1)


def _with_one(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.double(), x.new_ones(len(x), 1, dtype=torch.float64)], dim=1)


def _moment(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The sum of products of (left, 1) and (right, 1), float64."""
    return _with_one(left).t() @ _with_one(right)


def _plus(total: torch.Tensor | None, term: torch.Tensor) -> torch.Tensor:
    return term if total is None else total.add_(term)
