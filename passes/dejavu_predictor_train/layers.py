"""Layers one by one: what each is trained to be, kept in a file of its own until all are there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from rewright.formats.files import write_file
from rewright.passes.dejavu_predictor_train import heads, neurons
from rewright.passes.dejavu_predictor_train.budget import Columns, LayerUnits, Units
from rewright.passes.dejavu_predictor_train.collect import Histogram, Seen, gather
from rewright.passes.dejavu_predictor_train.curves import Curves
from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.mlp import matrices
from rewright.passes.dejavu_predictor_train.predictor import Predictor, Stored
from rewright.passes.dejavu_predictor_train.sensitivity import Sensitivity
from rewright.passes.dejavu_predictor_train.spec import SAMPLED
from rewright.passes.layer import Layer
from rewright.passes.loading import Assembly
from rewright.passes.walk import Walk


def walk(job: Job, assembly: Assembly, sensitivity: Sensitivity) -> None:
    """Train every layer that is not on record yet."""
    context = job.context
    todo = [index for index in range(job.shape.layers) if _unit(index) not in context.journal.done]
    if not todo:
        return
    with context.reporter.progress("layers", job.shape.layers) as bar:
        for layer in Walk(assembly, job.walked, scratch=context.work, through=False):
            if layer.index in todo:
                told = _train(job, layer, sensitivity)
                context.journal.record(_unit(layer.index), told)
                context.reporter.event("layer", index=layer.index, **told)
            bar.advance(1, _note(context.journal.done[_unit(layer.index)]))
            if layer.index == todo[-1]:
                break


def _unit(index: int) -> str:
    return f"layer {index}"


def _note(told: Mapping[str, Any]) -> str:
    return f"rank {told['rank']}" if "rank" in told else ""


def _train(job: Job, layer: Layer, sensitivity: Sensitivity) -> dict[str, Any]:
    seen = gather(job, layer, sensitivity)
    tensors: dict[str, torch.Tensor] = {}
    told: dict[str, Any] = {}
    if "mlp" in job.targets:
        matters = sensitivity[layer.index, "mlp_mid"].to(job.context.device)
        made = neurons.train(job, layer, seen, matters)
        tensors |= _of_predictor(made.predictor) | _of_curves("mlp", made.curves)
        told["rank"] = made.predictor.rank
        if made.predictor.relu:
            told["relu"] = True
        tensors |= _sample(job, layer, seen, matters)
    if "heads" in job.targets:
        routed = heads.route(seen)
        tensors |= {"attn.W": routed.weight, "attn.b": routed.bias} | _of_curves("attn", routed.curves)
    for site, histogram in seen.histograms.items():
        tensors |= {f"{site}.count": histogram.count, f"{site}.cost": histogram.cost}
        told[f"{site}.tokens"] = histogram.tokens
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file(_path(job, layer.index), save(held))
    return told


def _sample(job: Job, layer: Layer, seen: Seen, sensitivity: torch.Tensor) -> dict[str, torch.Tensor]:
    """Tokens spread over those that settle thresholds: what a predictor reads, and what each neuron's absence costs."""
    assert seen.read is not None
    assert seen.fed is not None
    step = max(1, len(seen.read) // SAMPLED)
    some = slice(None, step * SAMPLED, step)
    costs = matrices(job, layer).made(seen.fed[some], slice(None)).square_().mul_(0.5 * sensitivity)
    return {"sample.read": seen.read[some], "sample.costs": costs}


def _path(job: Job, index: int) -> Path:
    return job.context.work / f"layer-{index}.safetensors"


def _of_curves(name: str, found: Curves) -> dict[str, torch.Tensor]:
    return {f"{name}.slopes": found.slopes, f"{name}.thresholds": found.thresholds, f"{name}.share": found.share}


def _of_predictor(found: Predictor) -> dict[str, torch.Tensor]:
    tensors = {"mlp.A": found.a.codes, "mlp.B": found.b.codes, "mlp.a0": found.a0, "mlp.c": found.c}
    if found.a.scale is not None and found.b.scale is not None:
        tensors |= {"mlp.A_scale": found.a.scale, "mlp.B_scale": found.b.scale}
    return tensors


class Trained:
    """A layer that is on record."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.tensors = load_file(_path(job, index))
        self.told: Mapping[str, Any] = job.context.journal.done[_unit(index)]

    @property
    def predictor(self) -> Predictor | None:
        """The predictor of neurons."""
        if "mlp.A" not in self.tensors:
            return None
        a, b = (Stored(self.tensors[f"mlp.{leaf}"], self.tensors.get(f"mlp.{leaf}_scale")) for leaf in "AB")
        return Predictor(a, b, self.tensors["mlp.a0"], self.tensors["mlp.c"], bool(self.told.get("relu")))

    def curves(self, name: str) -> Curves | None:
        if f"{name}.slopes" not in self.tensors:
            return None
        return Curves(*(self.tensors[f"{name}.{leaf}"] for leaf in ("slopes", "thresholds", "share")))

    @property
    def units(self) -> LayerUnits:
        """What of the layer may be left unread."""
        shape, each = self.job.shape, self.job.weight_bytes
        found: dict[str, Units | None] = {}
        for name, neuron in (("mlp", True), ("attn", False)):
            held = self.curves(name)
            size = shape.row_weights(neuron) * each
            if not neuron:
                # keys and values of a group, half a sequence of them
                size += each * shape.head_width * self.job.options.sequence_length
            found[name] = None if held is None else Units(held, size)
        columns = {}
        for site in self.job.sites:
            tokens = int(self.told[f"{site}.tokens"])
            histogram = Histogram(self.tensors[f"{site}.count"], self.tensors[f"{site}.cost"], tokens)
            columns[site] = Columns(histogram, shape.columns(site), shape.rows(site) * each)
        return LayerUnits(found["mlp"], found["attn"], columns)
