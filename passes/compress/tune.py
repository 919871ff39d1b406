"""Block tuning: what a layer has left, fitted to the dense layer's output by Adam before it is rounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from rewright.passes.compress.fit import Pruned
from rewright.passes.compress.plan import Matrix
from rewright.passes.layer import Layer
from rewright.passes.training import Training, shuffled

# Tokens of a step, in whole sequences.
STEP_TOKENS = 2048
# The peak learning rate, as a share of the root mean square of the weights that are left.
RATE = 0.02
STATE = "tune.safetensors"


def resume(layer: Layer, work: Path, steps: int) -> Training | None:
    """A tuning of this layer that was interrupted."""
    return Training.resume(layer.name, work / STATE, steps, layer.walk.assembly.device)


def begin(layer: Layer, work: Path, steps: int, pruned: Mapping[Matrix, Pruned]) -> Training:
    """Start from pruned weights. A matrix of experts, of which a step sees but some tokens, stays as it is."""
    names = dict(layer.module.named_parameters())
    parameters, rates, constants = {}, {}, {}
    for matrix, found in pruned.items():
        if found.keep is not None:
            constants[f"keep {matrix.local}"] = found.keep
        if f"{matrix.local}.weight" not in names:
            constants[f"fixed {matrix.local}"] = found.weight
            continue
        left = found.weight if found.keep is None else found.weight[found.keep]
        parameters[matrix.local] = found.weight
        rates[matrix.local] = RATE * float(left.square().mean().sqrt())
    return Training.begin(layer.name, work / STATE, steps, parameters, rates, constants)


def tune(
    layer: Layer, matrices: Mapping[str, Matrix], training: Training, seed: int, note: Callable[[float], None]
) -> dict[str, Pruned]:
    """Take the steps that are left; returns the matrices by name, each wanted as it has become.

    The loss is |layer(h) - d|^2 / |d|^2 over the rows of a step: h what the compressed stream gives the layer, d the
    dense stream after it. `matrices` are those of the layer by their names within it.
    """
    walk, dtype = layer.walk, layer.walk.assembly.dtype
    layer.look_ahead()
    fixed = {path: training.constants[f"fixed {path}"] for path in matrices if f"fixed {path}" in training.constants}
    for path, weight in fixed.items():
        layer.replace(path, matrices[path].turned(weight))
    size = max(1, STEP_TOKENS // walk.tokens.shape[1])
    keeps = {path: training.constants.get(f"keep {path}") for path in matrices}

    def masked(path: str, weight: torch.Tensor) -> torch.Tensor:
        keep = keeps[path]
        return weight if keep is None else weight * keep

    def loss_at(step: int) -> torch.Tensor:
        rows = shuffled(walk.samples, size, step, seed * 1009 + layer.index)
        weights = {
            f"{path}.weight": matrices[path].turned(masked(path, weight)).to(dtype)
            for path, weight in training.parameters.items()
        }
        output = walk.run_layer(layer.index, walk.pick("compressed", rows), weights).float()
        aim = walk.pick("next", rows).to(output.device).float()
        return (output - aim).square().sum() / aim.square().sum()

    training.run(training.by_autograd(loss_at), note)
    found = training.done()
    tuned: dict[str, Pruned] = {}
    for path, weight in {**found, **fixed}.items():
        left = masked(path, weight)
        tuned[matrices[path].name] = Pruned(left, left, keeps[path])
    return tuned


def stack(parts: list[Pruned]) -> Pruned:
    """Matrices of one input under each other."""
    keeps = [torch.ones_like(part.weight, dtype=torch.bool) if part.keep is None else part.keep for part in parts]
    kept = torch.cat(keeps) if any(part.keep is not None for part in parts) else None
    return Pruned(torch.cat([part.wanted for part in parts]), torch.cat([part.weight for part in parts]), kept)
