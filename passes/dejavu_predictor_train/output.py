"""What is attached: the predictors' tensors and their config."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rewright.formats.checkpoint import Checkpoint
from rewright.formats.dejavu import CONFIG, FOLDER, SCHEMA, WEIGHTS, Attached, fingerprint, is_read
from rewright.formats.dtypes import from_torch
from rewright.formats.files import write_file
from rewright.formats.header import encode_header
from rewright.formats.layout import TensorSpec
from rewright.passes.dejavu_predictor_train.budget import Settled, Units
from rewright.passes.dejavu_predictor_train.job import Job
from rewright.passes.dejavu_predictor_train.layers import Trained
from rewright.passes.dejavu_predictor_train.sensitivity import Sensitivity
from rewright.passes.dejavu_predictor_train.thresholds import (
    bucket_shifts,
    column_factors,
    column_thresholds,
    offsets,
)


@dataclass(frozen=True, slots=True)
class Made:
    """Predictors ready to be attached: the file's bytes, and the config. `rungs` are the budgets of the ladder,
    `read_bytes` what a token reads of it all."""

    data: bytes
    config: dict[str, Any]
    rungs: tuple[Settled, ...]
    read_bytes: int

    def files(self) -> dict[str, bytes]:
        """The files of the attachment by their paths in a checkpoint."""
        told = json.dumps(self.config, indent=1, sort_keys=True) + "\n"
        return {f"{FOLDER}/{WEIGHTS}": self.data, f"{FOLDER}/{CONFIG}": told.encode()}

    def aside(self, folder: Path) -> Attached:
        """The same, opened from a scratch folder."""
        path = folder / WEIGHTS
        write_file(path, self.data)
        return Attached(Checkpoint.open(path), self.config)


def make(
    job: Job, trained: Sequence[Trained], sensitivity: Sensitivity, settled: Settled, rungs: Sequence[Settled]
) -> Made:
    """Thresholds at the settled prices, and at those of the ladder."""
    tensors: dict[str, torch.Tensor] = {}
    densities = []
    for layer in trained:
        units = layer.units
        if units.neurons is not None:
            spent, _ = units.neurons.spent(settled.prices[layer.index])
            densities.append(round(spent / units.neurons.total, 6))
            held = _neurons(job, layer, units.neurons, settled, rungs)
            held["weight"] = sensitivity[layer.index, "mlp_mid"]
            tensors |= _named(layer, "mlp", held)
        if units.groups is not None:
            tensors |= _named(layer, "attn", _groups(layer, units.groups, settled, rungs))
        for site, columns in units.columns.items():
            price = settled.prices[layer.index]
            held = {
                "threshold": column_thresholds(sensitivity[layer.index, site], columns.unit_bytes, price),
                "ladder": column_factors(settled, rungs, layer.index),
                "weight": sensitivity[layer.index, site],
            }
            tensors |= _named(layer, site, held)
    base = fingerprint(job.source)
    method = "imported" if job.options.predictors is not None else job.options.method
    config: dict[str, Any] = {
        "schema": SCHEMA,
        "base": base,
        "model_type": (job.source.config or {}).get("model_type"),
        "activation": job.shape.activation,
        "targets": list(job.targets),
        "method": method,
        "relu": [layer.index for layer in trained if layer.told.get("relu")],
        "input": job.options.input,
        "predictor_dtype": job.options.predictor_dtype,
        "buckets": list(job.options.batch_buckets.rows),
        "share": settled.share,
        "levels": [rung.share for rung in rungs],
        "densities": densities,
        "ranks": [layer.told["rank"] for layer in trained] if "mlp" in job.targets else [],
    }
    metadata = {"format": "pt", "schema": SCHEMA, "base": base, "method": method}
    data = _file(tensors, metadata)
    read = sum(tensor.nbytes for name, tensor in tensors.items() if is_read(name))
    return Made(data, config, tuple(rungs), read)


def _file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; its header's order is ours, which the library's is not where there is metadata."""
    specs = [TensorSpec(name, from_torch(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()]
    head, places = encode_header(specs, metadata)
    data = bytearray(sum(spec.nbytes for spec in specs))
    for name, (first, last) in places.items():
        data[first:last] = tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return head + bytes(data)


def _named(layer: Trained, part: str, held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"layers.{layer.index}.{part}.{leaf}": tensor for leaf, tensor in held.items()}


def _neurons(
    job: Job, layer: Trained, units: Units, settled: Settled, rungs: Sequence[Settled]
) -> dict[str, torch.Tensor]:
    held = {leaf: layer.tensors[f"mlp.{leaf}"] for leaf in ("A", "B", "a0")}
    held |= {leaf: layer.tensors[f"mlp.{leaf}"] for leaf in ("A_scale", "B_scale") if f"mlp.{leaf}" in layer.tensors}
    predictor = layer.predictor
    assert predictor is not None
    own = settled.prices[layer.index]
    held["c"] = offsets(units, predictor.c, [own])[0]
    held["ladder"] = offsets(units, predictor.c, [rung.prices[layer.index] for rung in rungs])
    scores = predictor.factors.scores(layer.tensors["sample.read"]) - predictor.c + held["c"]
    shifts = bucket_shifts(scores, layer.tensors["sample.costs"], job.options.batch_buckets.rows, job.context.seed)
    held["bucket_shift"] = torch.tensor(shifts)
    return held


def _groups(layer: Trained, units: Units, settled: Settled, rungs: Sequence[Settled]) -> dict[str, torch.Tensor]:
    weight, bias = layer.tensors["attn.W"], layer.tensors["attn.b"]
    prices = [rung.prices[layer.index] for rung in rungs]
    return {
        "W": weight,
        "b": offsets(units, bias, [settled.prices[layer.index]])[0],
        "ladder": offsets(units, bias, prices),
    }
