"""Small helpers shared by the launchers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def cdiv(a: int, b: int) -> int:
    """The quotient of two non-negative integers, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def interpreter() -> bool:
    """True when Triton runs kernels in its Python interpreter (`TRITON_INTERPRET=1`).

    Triton reads the flag when a kernel is *defined*, so it has to be set before the first call of any op.
    """
    from triton import knobs

    return bool(knobs.runtime.interpret)


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one, as a Triton launch needs; does nothing for CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
