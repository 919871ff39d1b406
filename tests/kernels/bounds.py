"""The bound that errors are held to, as `docs/decisions/0005-conformance.md` sets it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

# The c of the bound. Errors near it come from a different order of summation, never from a lost digit.
SLACK = 4.0


class Verdict(NamedTuple):
    """Whether a case passes, the worst of its errors over their bounds, and what failed."""

    ok: bool
    worst: float
    detail: str


def on(arguments: dict[str, Any], device: str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The arguments, also those in lists, on a device with their strides, in another floating dtype where asked."""

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, torch.Tensor) or (device == "cpu" and dtype is None):
            return value
        target = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
        return torch.empty_strided(value.shape, value.stride(), dtype=target, device=device).copy_(value)

    return {name: move(value) for name, value in arguments.items()}


class Bounds:
    """Collects errors and what they may be."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.eps = torch.finfo(dtype).eps
        self.worst = 0.0
        self.failures: list[str] = []

    def add(self, name: str, error: torch.Tensor, reference: torch.Tensor, scale: torch.Tensor) -> None:
        if error.numel() == 0:
            return
        bound = 2 * reference.abs().max().item() + SLACK * self.eps * scale.abs().max().item()
        found = error.abs().max().item()
        # Written so that NaN fails.
        if not found <= bound:
            self.failures.append(f"{name}: error {found:.3e}, bound {bound:.3e}")
        if found > 0:
            self.worst = max(self.worst, found / bound if bound else float("inf"))

    def check(self, name: str, holds: bool) -> None:
        if not holds:
            self.failures.append(name)

    def verdict(self) -> Verdict:
        return Verdict(not self.failures, self.worst, "; ".join(self.failures))
