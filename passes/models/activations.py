"""What an MLP does between its matrices, by the activation's name."""

from __future__ import annotations

import torch
from torch.nn import functional


def activate(name: str, up: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """Activations of `up`, or of `gate` times `up`."""
    from transformers.activations import ACT2FN

    held = up if gate is None else gate
    if name == "relu":
        made = functional.relu(held)
    elif name == "relu2":
        made = functional.relu(held).square()
    else:
        made = ACT2FN[name](held)
    return made if gate is None else made * up
