"""Predictors of neurons as other systems keep them: one file a layer, a state dict of two matrices.

| keys | from | a neuron is on where |
| --- | --- | --- |
| `0.weight` [rank, width], `1.weight` [neurons, rank] | Deja Vu (arXiv:2310.17157) | B A x > 0 |
| `fc1.weight`, `fc2.weight` of these shapes | PowerInfer (arXiv:2312.12456) | B relu(A x) > 0 |
| the same and `fc2.bias` [neurons] | SVDP (arXiv:2603.14110) | B A x + b > 0 |

A `.pt` file is opened by torch's reader of plain tensors, which runs nothing that a file says.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rewright.formats.errors import FormatError

if TYPE_CHECKING:
    import torch

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
# Of a file's name what says its layer, likelier words first, and what says that it is of attention.
_LAYER = (r"layers?[_.-]?(\d+)", r"model[_.-](\d+)", r"(?:router|mlp|predictor)[_.-](\d+)", r"^(\d+)")
_ATTENTION = re.compile(r"(^|[_.-])(att|attn|attention|head|heads)([_.-]|$)")


@dataclass(frozen=True, slots=True)
class Halves:
    """A predictor: `a` [rank, width], `b` [neurons, rank], `bias` [neurons] or None, float32; `relu` stands between."""

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None
    relu: bool


def by_layer(folder: Path) -> dict[int, Path]:
    """The files of a folder by layer, those of attention left out. Raises FormatError."""
    if not folder.is_dir():
        raise FormatError(f"`{folder}` is no folder", hint="name the folder that has a predictor's file for each layer")
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or _ATTENTION.search(path.stem):
            continue
        matches = (re.search(pattern, path.stem) for pattern in _LAYER)
        number = next((int(match[1]) for match in matches if match), None)
        if number is None:
            raise FormatError(f"the name of `{path}` does not say of which layer it is", hint="call it `model_0.pt`")
        if number in found:
            raise FormatError(f"`{found[number].name}` and `{path.name}` of `{folder}` are both of layer {number}")
        found[number] = path
    if not found:
        raise FormatError(
            f"`{folder}` has no predictors", hint=f"they are files as `model_0.pt`, {', '.join(SUFFIXES)}"
        )
    return found


def read(path: Path, data: bytes, width: int, neurons: int) -> Halves:
    """A layer's predictor from a file's bytes. Raises FormatError for what is none, or is another model's."""
    state = {name.removeprefix("module."): tensor for name, tensor in _state(path, data).items()}
    keys = set(state)
    if keys == {"0.weight", "1.weight"}:
        found = Halves(state["0.weight"], state["1.weight"], None, relu=False)
    elif keys in ({"fc1.weight", "fc2.weight"}, {"fc1.weight", "fc2.weight", "fc2.bias"}):
        bias = state.get("fc2.bias")
        found = Halves(state["fc1.weight"], state["fc2.weight"], bias, relu=bias is None)
    else:
        told = ", ".join(sorted(keys)[:4]) or "nothing"
        raise FormatError(
            f"`{path}` is no predictor that is known: it has {told}",
            hint="known are `0.weight` and `1.weight` (Deja Vu), `fc1.weight` and `fc2.weight` (PowerInfer)",
        )
    wanted: dict[str, tuple[torch.Tensor, tuple[int, ...]]] = {
        "A": (found.a, (len(found.a), width)),
        "B": (found.b, (neurons, len(found.a))),
    }
    if found.bias is not None:
        wanted["bias"] = (found.bias, (neurons,))
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"`{path}` is of another model: its {name} is {list(tensor.shape)}, and not {list(shape)}"
            )
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise FormatError(f"`{path}` has numbers that are not finite, or no floats, in its {name}")
    return Halves(found.a.float(), found.b.float(), None if found.bias is None else found.bias.float(), found.relu)


def _state(path: Path, data: bytes) -> Mapping[str, torch.Tensor]:
    import torch
    from safetensors.torch import load

    try:
        held = load(data) if path.suffix == ".safetensors" else torch.load(io.BytesIO(data), "cpu", weights_only=True)
    except Exception as error:
        said = f"{error}".partition("\n")[0][:100]
        raise FormatError(
            f"`{path}` cannot be read as plain tensors: {said or 'it is damaged'}",
            hint="save it again with `torch.save(model.state_dict(), ...)`",
        ) from None
    if not isinstance(held, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.ndim for name, tensor in held.items()
    ):
        raise FormatError(f"`{path}` is no state dict")
    return held


def write(halves: Halves) -> bytes:
    """The bytes of a `.pt` file with the keys that PowerInfer's has, and `fc2.bias` where there is a bias."""
    import torch

    state = {"fc1.weight": halves.a, "fc2.weight": halves.b}
    if halves.bias is not None:
        state["fc2.bias"] = halves.bias
    buffer = io.BytesIO()
    torch.save({name: tensor.contiguous() for name, tensor in state.items()}, buffer)
    return buffer.getvalue()
