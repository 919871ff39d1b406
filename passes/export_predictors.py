"""Attached predictors of neurons as files that other programs read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rewright.formats import dejavu, predictors
from rewright.formats.checkpoint import Checkpoint
from rewright.passes.errors import InputError

_MOST = 1e30


def files(model: Path, *, relu: bool) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each layer's file, `model_0.pt` and so on.

    A neuron is on where fc2 (fc1 x) + fc2.bias > 0, or with `relu` where fc2 relu(fc1 x) + fc2.bias > 0, which takes
    twice the rank. Raises InputError where no predictors of neurons are attached, FormatError for damaged ones.
    """
    import torch

    found = dejavu.attached(Checkpoint.open(model))
    if found is None or "mlp" not in found.config["targets"]:
        raise InputError(
            f"`{model}` has no predictors of neurons", hint="train them with `rewright dejavu-predictor-train`"
        )
    between = found.config.get("relu") or []
    for layer in range(len(found.config["densities"])):
        held = {
            leaf: found.source.read(name)
            for leaf in ("A", "B", "a0", "c", "A_scale", "B_scale")
            if (name := f"layers.{layer}.mlp.{leaf}") in found.source.entries
        }
        a, b = (
            held[leaf].float() * (held[f"{leaf}_scale"][:, None] if f"{leaf}_scale" in held else 1.0) for leaf in "AB"
        )
        if layer in between and not relu:
            raise InputError(
                f"the predictor of layer {layer} has a ReLU between its halves", hint="write it with `--relu`"
            )
        # a neuron that is never on, or always, has no finite threshold
        bias = held["c"].clamp(-_MOST, _MOST)
        if layer not in between:
            bias = bias + b @ held["a0"]
            if relu:
                a, b = torch.cat([a, -a]), torch.cat([b, -b], 1)
        yield f"model_{layer}.pt", predictors.write(predictors.Halves(a, b, bias, relu))
