"""The matrices of a decoder layer, where a running model has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

Note = Callable[[torch.Tensor, torch.Tensor], None]


class Linear:
    """The weight of a linear module: its value now, and who looks on when it is used.

    The weight is in the layout of the module: (outputs, inputs), or (inputs, outputs) for GPT-2's Conv1D.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def weight(self) -> torch.Tensor:
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    @property
    def bias(self) -> torch.Tensor | None:
        bias = self.module.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return bias

    def put(self, weight: torch.Tensor) -> None:
        """Use this weight from now on; nothing is copied where device and dtype are the module's already."""
        held = self.weight
        assert weight.shape == held.shape
        self.module.weight = nn.Parameter(weight.to(held.device, held.dtype), requires_grad=False)

    @contextmanager
    def watched(self, note: Note) -> Iterator[None]:
        """Call `note` with input and output of every use, as the module has them."""

        # Falcon adds the attention's output to what this returns, in place
        mutated = type(self.module).__name__ == "FalconLinear"

        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            note(args[0], output.clone() if mutated else output)

        handle = self.module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def is_linear(module: nn.Module) -> bool:
    """A matrix with inputs and outputs: `nn.Linear`, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linears_of(layer: nn.Module) -> dict[str, Linear]:
    """The matrices of a decoder layer by their names within it, in the order of the module's definition."""
    return {path: Linear(module) for path, module in layer.named_modules() if is_linear(module)}
